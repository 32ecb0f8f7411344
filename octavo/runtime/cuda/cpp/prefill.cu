// Paged prefill attention for Hopper: the copy engine brings K and V, two warpgroups multiply in turn.
//
// A program takes 128 rows (queries x the query heads of one KV head) of one tile after the other, whichever is next
// when it is free. One warp asks for them and for the blocks of K and V, page by page, two tiles of 128 keys ahead
// (cp.async.bulk.tensor, completing on mbarriers), so that the next tile's are there when the last one's end.
// Two warpgroups of 64 rows each multiply (wgmma): the scores of the next keys and the values of the last run while
// the exponentials between them are computed, and the two take turns at the tensor cores, so that one multiplies while
// the other exponentiates (Shah et al. 2024, FlashAttention-3). Softmax is online, in float32, base 2. Tiles of keys
// are walked from the diagonal to the front, so that masks come first and the loop over the rest has none.
//
// K and V: [blocks, KV heads, 16, D], bfloat16. Positions that nobody wrote may hold anything: whole pages behind a
// context are asked for outside the tensor, which fills zeros, and the rest of the last page is cleared.

#include "hopper.cuh"

struct Prefill {
  const __nv_bfloat16* q;  // [T, heads, D]
  const void* keys;
  const void* values;
  __nv_bfloat16* out;      // [T, heads, D]
  const int* tile_rows;    // [tiles]: which request
  const int* tile_starts;  // [tiles]: its first query of this tile
  const int* query_start_loc;
  const int* seq_lens;
  const int* tables;  // [groups, requests, stride]
  const int* table_stride;
  int* progress;  // [2]: tiles taken beyond the first ones, programs that have ended; zero between launches
  int64_t num_blocks;
  int num_tokens;
  int num_tiles;
  int num_heads;
  int num_kv_heads;
  int first_table;  // row of `tables` where those of this layer's group begin
  float scale;      // of the scores, base 2
};

namespace {

constexpr int kPage = 16;       // positions of a KV block
constexpr int kRows = 128;      // of a program, half of them a warpgroup's
constexpr int kKeys = 128;      // of one turn
constexpr int kStages = 2;      // tiles of K, and of V, in shared memory; of Q as many
constexpr float kMinusInfinity = -__builtin_huge_valf();

// A tile of queries and how far its keys go.
struct Tile {
  int head;                           // KV head; below 0: there is no more tile
  int token, num_queries;             // the first one's, and how many are left of its request
  int lowest, highest;                // positions of the first and the last
  int request;

  __device__ __forceinline__ void find(const Prefill& p, int work, int queries) {
    head = work / p.num_tiles;  // one after the other: K and V of the heads at work stay in the second cache
    const int tile = work % p.num_tiles;
    request = p.tile_rows[tile];
    const int first = p.tile_starts[tile], start = p.query_start_loc[request];
    token = start + first;
    num_queries = p.query_start_loc[request + 1] - token;
    highest = p.seq_lens[request] - 1;
    lowest = highest + 1 - num_queries;
    highest = min(lowest + queries - 1, highest);
  }

  // The same in every lane, and known to be: products must not be in branches that might diverge.
  __device__ __forceinline__ Tile uniform() const {
    const auto same = [](int x) { return __shfl_sync(0xffffffff, x, 0); };
    return Tile{same(head), same(token), same(num_queries), same(lowest), same(highest), same(request)};
  }

  __device__ __forceinline__ int num_turns() const { return highest / kKeys + 1; }
};

template <int D>
struct Shared {
  __nv_bfloat16 q[2][D / kSwizzled][kRows][kSwizzled];  // of this tile and the next; the output, too, on its way out
  __nv_bfloat16 k[kStages][D / kSwizzled][kKeys][kSwizzled];
  __nv_bfloat16 v[kStages][D / kSwizzled][kKeys][kSwizzled];
  Tile tiles[2];
  uint64_t q_full[2], k_full[kStages], v_full[kStages];     // data has come
  uint64_t q_empty[2], k_empty[kStages], v_empty[kStages];  // all eight warps have read it
};

// Asks for 64 columns of some heads of some tokens.
__device__ __forceinline__ void bring(void* to, const CUtensorMap& from, int column, int head, int token,
                                      uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          address(to)),
      "l"(&from), "r"(column), "r"(head), "r"(token), "r"(address(&barrier))
      : "memory");
}

// scores [64, 128] (+)= q [64, 16] k [128, 16]^T, both in shared memory.
__device__ __forceinline__ void multiply_keys(float (&d)[64], uint64_t q, uint64_t k, int adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : D32(d, 0), D32(d, 32)
      : "l"(q), "l"(k), "r"(adds));
}

// out [64, D] += weights [64, 16] in registers, v [16, D] in shared memory.
__device__ __forceinline__ void multiply_values(float (&d)[64], const uint32_t* w, uint64_t v) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : D32(d, 0), D32(d, 32)
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(v));
}

__device__ __forceinline__ void multiply_values(float (&d)[32], const uint32_t* w, uint64_t v) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : D32(d, 0)
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(v));
}

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The running softmax of the two rows that a thread holds a quarter of: row g and g + 8 of its warp's 16.
struct Softmax {
  float best[2] = {kMinusInfinity, kMinusInfinity};
  float total[2] = {0.0f, 0.0f};  // of this thread's columns
  float keep[2];                  // what the sums so far are to be multiplied by

  // Scores become weights.
  template <bool kMasked>
  __device__ __forceinline__ void take(float (&s)[64], float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = best[h];
#pragma unroll
      for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      const float shift = kMasked && largest == kMinusInfinity ? 0.0f : largest * scale;
      keep[h] = power_of_2(best[h] * scale - shift);
      best[h] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int j = 4 * i + 2 * h; j < 4 * i + 2 * h + 2; ++j) {
          s[j] = power_of_2(fmaf(s[j], scale, -shift));
          sum += s[j];
        }
      }
      total[h] = total[h] * keep[h] + sum;
    }
  }
};

// Keys behind a row's own position do not count. A thread holds columns 8 i + 2 t and the one after.
__device__ __forceinline__ void mask(float (&s)[64], int first_key, const int (&position)[2]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int key = first_key + i / 4 * 8 + i % 2;
    if (key > position[i / 2 % 2]) s[i] = kMinusInfinity;
  }
}

__device__ __forceinline__ void to_operands(uint32_t (&w)[32], const float (&s)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(s[2 * i], s[2 * i + 1]);
    w[i] = reinterpret_cast<const uint32_t&>(both);
  }
}

// Where 16 bytes of a row lie in rows of 128 swizzled bytes.
template <int D>
__device__ __forceinline__ char* chunk_of(__nv_bfloat16 (&q)[D / kSwizzled][kRows][kSwizzled], int row, int chunk) {
  return reinterpret_cast<char*>(q[chunk / 8][row]) + (((chunk % 8) ^ (row % 8)) * 16);
}

template <int D>
__device__ void produce(const Prefill& p, const CUtensorMap& q, const CUtensorMap& keys, const CUtensorMap& values,
                        Shared<D>& shared, int group, int queries) {
  const int lane = threadIdx.x % 32, num_works = p.num_tiles * p.num_kv_heads;
  int turn = 0, count = 0;
  for (int work = blockIdx.x, next = 0; ; work = __shfl_sync(0xffffffff, next, 0)) {
    Tile tile{-1};
    if (work < num_works) {
      if (lane == 0) next = gridDim.x + atomicAdd(p.progress, 1);
      tile.find(p, work, queries);
      if (tile.num_queries <= 0) continue;  // padding
    }
    const int slot = count % 2;
    barrier_wait(shared.q_empty[slot], count / 2 % 2 ^ 1);
    if (lane == 0) {
      shared.tiles[slot] = tile;
      barrier_expect(shared.q_full[slot], tile.head < 0 ? 0 : queries * group * D * 2);
      if (tile.head >= 0) {
#pragma unroll
        for (int i = 0; i < D / kSwizzled; ++i) {
          bring(shared.q[slot][i], q, i * kSwizzled, tile.head * group, tile.token, shared.q_full[slot]);
        }
      }
    }
    __syncwarp();
    if (tile.head < 0) break;
    ++count;
    const int* table = p.tables + int64_t(p.first_table + tile.request) * *p.table_stride;
    for (int j = tile.num_turns() - 1; j >= 0; --j, ++turn) {
      const int page = j * (kKeys / kPage) + lane;
      const bool is_there = lane < kKeys / kPage && page <= tile.highest / kPage;
      const int64_t block = is_there ? table[page] : p.num_blocks;
      const int row = static_cast<int>((block * p.num_kv_heads + (is_there ? tile.head : 0)) * kPage);
      const int stage = turn % kStages, parity = turn / kStages % 2 ^ 1;
      const auto fetch = [&](auto& to, const CUtensorMap& from, uint64_t& full, uint64_t& empty) {
        barrier_wait(empty, parity);
        if (lane == 0) barrier_expect(full, sizeof(to));
        __syncwarp();
        if (lane < kKeys / kPage) {
#pragma unroll
          for (int i = 0; i < D / kSwizzled; ++i) bring(to[i][lane * kPage], from, i * kSwizzled, row, full);
        }
      };
      fetch(shared.k[stage], keys, shared.k_full[stage], shared.k_empty[stage]);
      fetch(shared.v[stage], values, shared.v_full[stage], shared.v_empty[stage]);
    }
  }
  if (lane == 0 && atomicAdd(p.progress + 1, 1) == gridDim.x - 1) p.progress[0] = p.progress[1] = 0;
}

template <int D>
struct Consumer {
  const Prefill& p;
  Shared<D>& shared;
  const int group, rows, reciprocal;  // query heads of a KV head, rows of a tile, how to divide one by the other
  const int me, warp, lane;           // warpgroup 0 or 1, warp within it
  float out[D / 2];
  uint32_t weights[32];
  int turn = 0, count = 0;  // of keys, of tiles

  __device__ __forceinline__ Consumer(const Prefill& p, Shared<D>& shared, int group, int queries, int me)
      : p(p), shared(shared), group(group), rows(queries * group), reciprocal(65536 / group + 1), me(me),
        warp(__shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0)), lane(threadIdx.x % 32) {
    if (me == 1) let_other();
  }

  __device__ __forceinline__ void my_turn() { asm volatile("bar.sync %0, 256;" ::"r"(1 + me) : "memory"); }
  __device__ __forceinline__ void let_other() { asm volatile("bar.arrive %0, 256;" ::"r"(2 - me) : "memory"); }
  __device__ __forceinline__ void all_of_mine() { asm volatile("bar.sync %0, 128;" ::"r"(3 + me) : "memory"); }
  __device__ __forceinline__ int parity(int turn) const { return turn / 2 % 2; }
  __device__ __forceinline__ void read(uint64_t& empty) {
    if (lane == 0) barrier_arrive(empty);
  }

  __device__ __forceinline__ int query_of(int row) const { return row * reciprocal >> 16; }

  __device__ __forceinline__ void store_output(const Tile& tile, const Softmax& softmax) {
    constexpr int kChunks = D / 8;
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = softmax.total[h];
      total += __shfl_xor_sync(0xffffffff, total, 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      factor[h] = 1.0f / (total > 0.0f ? total : 1.0f);
    }
    auto& staged = shared.q[count % 2];
    const int first = me * (kRows / 2) + warp * 16;
    all_of_mine();  // nobody multiplies by these queries any more
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
      const int h = i % 2, chunk = i / 2;
      const __nv_bfloat162 both = __floats2bfloat162_rn(out[2 * i] * factor[h], out[2 * i + 1] * factor[h]);
      char* at = chunk_of<D>(staged, first + lane / 4 + 8 * h, chunk) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(at) = reinterpret_cast<const uint32_t&>(both);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int row = first + i / kChunks, query = query_of(row);
      const int64_t head = int64_t(tile.token + query) * p.num_heads + tile.head * group + row - query * group;
      const uint4 value = *reinterpret_cast<const uint4*>(chunk_of<D>(staged, row, i % kChunks));
      if (row < rows && query < tile.num_queries) *reinterpret_cast<uint4*>(p.out + head * D + i % kChunks * 8) = value;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the next queries come here
    __syncwarp();
  }

  __device__ __forceinline__ void begin_scores(float (&s)[64]) {
    const int stage = turn % kStages;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int half = i / 4, column = i % 4 * 16;
      multiply_keys(s, matrix(&shared.q[count % 2][half][me * (kRows / 2)][column], 16),
                    matrix(&shared.k[stage][half][0][column], 16), i > 0);
    }
    products_end();
  }

  __device__ __forceinline__ void begin_output(int turn) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      multiply_values(out, weights + 4 * i,
                      matrix(shared.v[turn % kStages][0][i * 16], kKeys * kSwizzled * 2));
    }
    products_end();
  }

  // Positions of the last page that nobody may have written: their weight is zero, and they must be numbers.
  __device__ __forceinline__ void clear_behind(int end) {
    if (end % kPage == 0) return;
    const int first = end % kKeys, last = first / kPage * kPage + kPage;
    for (int i = threadIdx.x % 128; i < (last - first) * (D / 8); i += 128) {
      const int row = first + i / (D / 8), chunk = i % (D / 8);
      char* at = reinterpret_cast<char*>(shared.v[turn % kStages][chunk / 8][row]) + chunk % 8 * 16;
      *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    all_of_mine();
  }

  __device__ __forceinline__ void rescale(const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= softmax.keep[i / 2 % 2];
  }

  // One turn: scores of these keys beside the values of the keys before them.
  template <bool kMasked>
  __device__ __forceinline__ void step(Softmax& softmax, int j, const int (&position)[2]) {
    float s[64];
    barrier_wait(shared.k_full[turn % kStages], parity(turn));
    my_turn();
    products_begin();
    begin_scores(s);
    barrier_wait(shared.v_full[(turn - 1) % kStages], parity(turn - 1));
    begin_output(turn - 1);
    let_other();
    products_wait<1>();
    pin(s);
    read(shared.k_empty[turn % kStages]);
    if (kMasked) mask(s, j * kKeys + lane % 4 * 2, position);
    softmax.take<kMasked>(s, p.scale);
    products_wait<0>();
    pin(out);
    read(shared.v_empty[(turn - 1) % kStages]);
    rescale(softmax);
    to_operands(weights, s);
    ++turn;
  }

  __device__ __forceinline__ void run() {
    for (;; ++count) {
      barrier_wait(shared.q_full[count % 2], parity(count));
      Tile tile{};
      if (lane == 0) tile = shared.tiles[count % 2];  // who reads it is who says that it was read
      tile = tile.uniform();
      if (tile.head < 0) return;
      attend(tile);
      read(shared.q_empty[count % 2]);
    }
  }

  __device__ __forceinline__ void attend(const Tile& tile) {
    Softmax softmax;
    int position[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = me * (kRows / 2) + warp * 16 + lane / 4 + 8 * h;
      position[h] = min(tile.lowest + query_of(row), tile.highest);
    }
    const int full = (tile.lowest + 1) / kKeys;  // turns in which every row sees every key
    int j = tile.num_turns() - 1;
    {
      float s[64];
      barrier_wait(shared.k_full[turn % kStages], parity(turn));
      products_begin();
      begin_scores(s);
      products_wait<0>();
      pin(s);
      read(shared.k_empty[turn % kStages]);
      if (j >= full) mask(s, j * kKeys + lane % 4 * 2, position);
      softmax.take<true>(s, p.scale);
      to_operands(weights, s);
      barrier_wait(shared.v_full[turn % kStages], parity(turn));
      clear_behind(tile.highest + 1);
      ++turn;
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    for (--j; j >= full; --j) step<true>(softmax, j, position);
    for (; j >= 0; --j) step<false>(softmax, j, position);
    barrier_wait(shared.v_full[(turn - 1) % kStages], parity(turn - 1));
    products_begin();
    begin_output(turn - 1);
    products_wait<0>();
    pin(out);
    read(shared.v_empty[(turn - 1) % kStages]);
    store_output(tile, softmax);
  }
};

template <int D>
__global__ void __launch_bounds__(384, 1)
    prefill_attention(const Prefill p, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap keys,
                      const __grid_constant__ CUtensorMap values) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Shared<D>*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  const int group = p.num_heads / p.num_kv_heads, queries = kRows / group;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.q_full[i], 1), barrier_init(shared.k_full[i], 1), barrier_init(shared.v_full[i], 1);
      barrier_init(shared.q_empty[i], 8), barrier_init(shared.k_empty[i], 8), barrier_init(shared.v_empty[i], 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  const int role = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // which the compiler then knows to be one for a warp
  if (role == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x < 32) produce<D>(p, q, keys, values, shared, group, queries);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    Consumer<D> consumer(p, shared, group, queries, role - 1);
    consumer.run();
  }
#endif
}

template <int D>
int launch(const Prefill& p, cudaStream_t stream) {
  const cuuint32_t group = p.num_heads / p.num_kv_heads;
  const cuuint64_t tokens[3] = {D, cuuint64_t(p.num_heads), cuuint64_t(p.num_tokens)};
  const cuuint64_t pool[2] = {D, cuuint64_t(p.num_blocks) * p.num_kv_heads * kPage};
  const cuuint32_t queries[3] = {kSwizzled, group, kRows / group}, page[2] = {kSwizzled, kPage};
  CUtensorMap q, keys, values;
  if (const int code = describe(q, p.q, 3, tokens, queries)) return code;
  if (const int code = describe(keys, p.keys, 2, pool, page)) return code;
  if (const int code = describe(values, p.values, 2, pool, page)) return code;
  const int bytes = sizeof(Shared<D>) + 1024;
  static const int num_programs = [&] {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    cudaFuncSetAttribute(prefill_attention<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return count;
  }();
  const int num_works = p.num_tiles * p.num_kv_heads;
  const int programs = num_works < num_programs ? num_works : num_programs;
  prefill_attention<D><<<programs, 384, bytes, stream>>>(p, q, keys, values);
  return cudaGetLastError();
}

}  // namespace

// Returns a CUDA error code; 1 (invalid value) for a shape that has no kernel.
extern "C" int octavo_prefill_attention(const Prefill* prefill, int head_dim, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (head_dim == 64) return launch<64>(*prefill, s);
  if (head_dim == 128) return launch<128>(*prefill, s);
  return cudaErrorInvalidValue;
}
