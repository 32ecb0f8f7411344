// Paged decode attention on the tensor cores, without shared memory in its loop.
//
// A warp takes one KV block (16 positions) at a time. K and V go from memory to registers by 16-byte loads and are
// operands of mma.m16n8k16 as they lie: a product does not care in which order its inner dimension is numbered, nor
// its outer one, so each is numbered the way the loads bring it. Both products are transposed (keys, then head
// dimensions, are the 16 rows; up to 8 query heads of one KV head the 8 columns), which fills the tile without padding
// heads to 16. Softmax is online, in float32, base 2 (Milakov & Gimelshein 2018). Warps join at the end in shared
// memory; splits of one context join in the program that ends last.
//
// K and V: [blocks, KV heads, 16, D], bfloat16 or e4m3 (multiplied as float16, which holds each value exactly).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

struct Decode {
  const __nv_bfloat16* q;  // [T, heads, D]; with `cosines`, of q, k and v as the product left them
  void* keys;
  void* values;
  __nv_bfloat16* out;       // [T, heads, D]
  float* partial;           // [decodes, heads, splits, D]
  float* partial_sums;      // [decodes, heads, splits]: log2 of the sum of exponentials
  int* arrived;             // [decodes, KV heads], zero between launches
  const int* rows;          // [decodes]: their requests
  const int* query_start_loc;
  const int* seq_lens;
  const int* tables;        // [groups, requests, stride]
  const int* table_stride;  // [1]
  const int* positions;     // [T]; this and what follows for a kernel that norms and rotates heads and writes k and v
  const int* slots;         // [T]
  const float* cosines;     // [positions, D / 2], or null: k and v are in the cache, and q is finished
  const float* sines;
  const float* q_norm;      // [D], or null
  const float* k_norm;
  int num_heads;
  int num_kv_heads;
  int num_splits;
  float scale;    // of the scores, base 2
  float v_scale;  // of the output
  float softcap;  // base e; 0: none
  float eps;      // of the norms
  int window;     // 0: none
  int min_chunk;  // positions that a part has at least
  int first_table;  // row of `tables` where those of this layer's group begin
};

namespace {

constexpr int kBlock = 16;  // positions of a KV block
constexpr int kHeads = 8;   // query heads of a KV head, padded
constexpr float kMinusInfinity = -__builtin_huge_valf();

__device__ __forceinline__ void load16(uint32_t (&to)[4], const void* from) {
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}

template <bool kHalf>
__device__ __forceinline__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two e4m3 numbers (the low 16 bits) as a pair of float16.
__device__ __forceinline__ uint32_t widened(uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  uint32_t y;
  asm("{ .reg .b16 p; cvt.u16.u32 p, %1; cvt.rn.f16x2.e4m3x2 %0, p; }" : "=r"(y) : "r"(pair));
  return y;
#else
  // sign and the 7 other bits to their places in float16, whose exponent bias is 8 larger: times 2^8
  const uint32_t spread = (pair & 0xff) | ((pair & 0xff00) << 8);
  const uint32_t bits = ((spread & 0x00800080u) << 8) | ((spread & 0x007f007fu) << 7);
  __half2 y = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.0f));
  return *reinterpret_cast<uint32_t*>(&y);
#endif
}

template <bool kHalf>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  if constexpr (kHalf) {
    __half2 y = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&y);
  } else {
    __nv_bfloat162 y = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&y);
  }
}

__device__ __forceinline__ uint32_t half_of_bfloat16(uint32_t pair) {
  const float2 f = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  return packed<true>(f.x, f.y);
}

// What a warp keeps of the softmax of its blocks; columns 2t and 2t + 1 of the 8 heads.
template <int D>
struct Running {
  float best[2] = {kMinusInfinity, kMinusInfinity};
  float total[2] = {0.0f, 0.0f};
  float mixed[D / 16][4];  // [i]: two head dimensions x two heads
};

// In all of this a lane is (g, t) = (lane / 4, lane % 4), as in the fragments of mma.
//
// kBytes 2: lane loads K[g and g + 8][32 c + 8 t ..], V[2t, 2t + 1, 2t + 8, 2t + 9][64 c + 8 g ..]
// kBytes 1: lane loads K[g and g + 8][64 c + 16 t ..], V[the same four][128 c + 16 g ..]
template <int D, int kBytes>
struct Tile {
  static constexpr int kChunksK = D * kBytes / 64;
  static constexpr int kChunksV = D * kBytes / 128;
  uint32_t k[2][kChunksK][4];
  uint32_t v[4][kChunksV][4];

  __device__ __forceinline__ void load(const uint8_t* keys, const uint8_t* values, int g, int t) {
#pragma unroll
    for (int c = 0; c < kChunksK; ++c) {
      load16(k[0][c], keys + g * D * kBytes + c * 64 + t * 16);
      load16(k[1][c], keys + (g + 8) * D * kBytes + c * 64 + t * 16);
    }
#pragma unroll
    for (int c = 0; c < kChunksV; ++c) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        load16(v[r][c], values + (2 * t + (r & 1) + (r >> 1) * 8) * D * kBytes + c * 128 + g * 16);
      }
    }
  }

  // Rows from `count` on were never written: what lies there may be no number.
  __device__ __forceinline__ void clear_from(int count, int t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (2 * t + (r & 1) + (r >> 1) * 8 >= count) {
#pragma unroll
        for (int c = 0; c < kChunksV; ++c) v[r][c][0] = v[r][c][1] = v[r][c][2] = v[r][c][3] = 0;
      }
    }
  }

  // s[0..3]: keys g and g + 8 x heads 2t and 2t + 1
  __device__ __forceinline__ void scores(float (&s)[4], const uint32_t (&q)[D / 16][2]) const {
#pragma unroll
    for (int c = 0; c < kChunksK; ++c) {
      if constexpr (kBytes == 2) {
        multiply<false>(s, k[0][c][0], k[1][c][0], k[0][c][1], k[1][c][1], q[2 * c][0], q[2 * c][1]);
        multiply<false>(s, k[0][c][2], k[1][c][2], k[0][c][3], k[1][c][3], q[2 * c + 1][0], q[2 * c + 1][1]);
      } else {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          multiply<true>(s, widened(k[0][c][h]), widened(k[1][c][h]), widened(k[0][c][h] >> 16),
                         widened(k[1][c][h] >> 16), q[4 * c + h][0], q[4 * c + h][1]);
        }
      }
    }
  }

  // mixed += V^T p
  __device__ __forceinline__ void mix(float (&mixed)[D / 16][4], uint32_t p0, uint32_t p1) const {
#pragma unroll
    for (int c = 0; c < kChunksV; ++c) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        if constexpr (kBytes == 2) {
          multiply<false>(mixed[4 * c + f], __byte_perm(v[0][c][f], v[1][c][f], 0x5410),
                          __byte_perm(v[0][c][f], v[1][c][f], 0x7632), __byte_perm(v[2][c][f], v[3][c][f], 0x5410),
                          __byte_perm(v[2][c][f], v[3][c][f], 0x7632), p0, p1);
        } else {
          const uint32_t a = __byte_perm(v[0][c][f], v[1][c][f], 0x5140);
          const uint32_t b = __byte_perm(v[2][c][f], v[3][c][f], 0x5140);
          multiply<true>(mixed[8 * c + 2 * f], widened(a), widened(a >> 16), widened(b), widened(b >> 16), p0, p1);
          const uint32_t e = __byte_perm(v[0][c][f], v[1][c][f], 0x7362);
          const uint32_t h = __byte_perm(v[2][c][f], v[3][c][f], 0x7362);
          multiply<true>(mixed[8 * c + 2 * f + 1], widened(e), widened(e >> 16), widened(h), widened(h >> 16), p0, p1);
        }
      }
    }
  }

  // The head dimension that mixed[i][j] of lane g belongs to.
  static __device__ __forceinline__ int dimension(int i, int j, int g) {
    const int e = j >> 1;
    if constexpr (kBytes == 2) return (i / 4) * 64 + g * 8 + (i % 4) * 2 + e;
    return (i / 8) * 128 + g * 16 + (i % 8) * 2 + e;
  }

  static __device__ __forceinline__ void load_query(uint32_t (&q)[D / 16][2], const __nv_bfloat16* head, int t) {
#pragma unroll
    for (int c = 0; c < kChunksK; ++c) {
      if constexpr (kBytes == 2) {
        const uint4 x = *reinterpret_cast<const uint4*>(head + c * 32 + t * 8);
        q[2 * c][0] = x.x, q[2 * c][1] = x.y, q[2 * c + 1][0] = x.z, q[2 * c + 1][1] = x.w;
      } else {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const uint2 x = *reinterpret_cast<const uint2*>(head + c * 64 + t * 16 + h * 4);
          q[4 * c + h][0] = half_of_bfloat16(x.x), q[4 * c + h][1] = half_of_bfloat16(x.y);
        }
      }
    }
  }
};

template <int D, int kBytes>
__device__ __forceinline__ void attend(Running<D>& run, Tile<D, kBytes>& tile, const uint32_t (&q)[D / 16][2],
                                       const Decode& d, int first, int oldest, int seq_len, int g, int t) {
  float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  tile.scores(s, q);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s[i] *= d.scale;
    if (d.softcap > 0.0f) {
      const float cap = d.softcap * 1.44269504f;
      s[i] = cap * tanhf(s[i] / cap);
    }
  }
  if (first + kBlock > seq_len || first < oldest) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = first + g + (i >> 1) * 8;
      if (position >= seq_len || position < oldest) s[i] = kMinusInfinity;
    }
    tile.clear_from(seq_len - first, t);
  }
  float p[4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float best = fmaxf(s[h], s[h + 2]);
    best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 4));
    best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 8));
    best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, 16));
    best = fmaxf(best, run.best[h]);
    const float shift = best == kMinusInfinity ? 0.0f : best;
    const float keep = exp2f(run.best[h] - shift);
    p[h] = exp2f(s[h] - shift);
    p[h + 2] = exp2f(s[h + 2] - shift);
    run.total[h] = run.total[h] * keep + p[h] + p[h + 2];
    run.best[h] = best;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) run.mixed[i][h] *= keep, run.mixed[i][h + 2] *= keep;
  }
  constexpr bool kHalf = kBytes == 1;
  tile.mix(run.mixed, transposed(packed<kHalf>(p[0], p[1])), transposed(packed<kHalf>(p[2], p[3])));
}

// What warps leave for each other, beside dynamic memory: mixed, [warps, group, D] floats.
template <int D, int kWarps>
struct Shared {
  float best[kWarps][kHeads];
  float total[kWarps][kHeads];
  int is_last;
};

// Joins what the splits left, in the program that arrives last.
template <int D, int kWarps>
__device__ void merge_if_last(const Decode& d, Shared<D, kWarps>& shared, int index, int kv_head, int token, int group,
                              int parts) {
  __syncthreads();  // the block's stores come before its count
  if (threadIdx.x == 0) {
    __threadfence();
    int* arrived = d.arrived + index * d.num_kv_heads + kv_head;
    shared.is_last = atomicAdd(arrived, 1) == parts - 1;
    if (shared.is_last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  if (!shared.is_last) return;
  for (int i = threadIdx.x; i < group * D; i += kWarps * 32) {
    const int head = kv_head * group + i / D;
    const int64_t row = int64_t(index * d.num_heads + head) * d.num_splits;
    float best = kMinusInfinity;
    for (int s = 0; s < parts; ++s) best = fmaxf(best, __ldcg(d.partial_sums + row + s));
    float total = 0.0f, mixed = 0.0f;
    for (int s = 0; s < parts; ++s) {
      const float sum = __ldcg(d.partial_sums + row + s);
      if (sum == kMinusInfinity) continue;
      const float weight = exp2f(sum - best);
      total += weight;
      mixed += weight * __ldcg(d.partial + (row + s) * D + i % D);
    }
    d.out[(int64_t(token) * d.num_heads + head) * D + i % D] = __float2bfloat16(total > 0.0f ? mixed / total : 0.0f);
  }
}

// A head of D columns, those that rotate with each other in one lane; a warp holds it.
template <int D>
struct Head {
  static constexpr int kPairs = D / 64;
  float low[kPairs], high[kPairs];  // columns kPairs * lane + i, and those D / 2 further

  __device__ __forceinline__ void load(const __nv_bfloat16* from, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] = __bfloat162float(from[kPairs * lane + i]);
      high[i] = __bfloat162float(from[D / 2 + kPairs * lane + i]);
    }
  }

  // T: __nv_bfloat16, or __nv_fp8_e4m3, which saturates.
  template <class T>
  __device__ __forceinline__ void store(T* to, int lane) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      to[kPairs * lane + i] = T(low[i]);
      to[D / 2 + kPairs * lane + i] = T(high[i]);
    }
  }

  __device__ __forceinline__ void norm(const float* weight, float eps, int lane) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) squares += low[i] * low[i] + high[i] * high[i];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) squares += __shfl_xor_sync(0xffffffff, squares, mask);
    const float factor = rsqrtf(squares / D + eps);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] *= factor * weight[kPairs * lane + i];
      high[i] *= factor * weight[D / 2 + kPairs * lane + i];
    }
  }

  __device__ __forceinline__ void rotate(const float (&cosines)[kPairs], const float (&sines)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float x = low[i], y = high[i];
      low[i] = x * cosines[i] - y * sines[i];
      high[i] = y * cosines[i] + x * sines[i];
    }
  }
};

// Norms and rotates the query heads of a KV head into `queries`, [group, D]. The part of a context that holds its last
// position also writes k and v there; then all of it may be read.
template <int D, int kBytes, int kWarps>
__device__ __forceinline__ void turn_heads(const Decode& d, __nv_bfloat16* queries, int token, int kv_head, int group,
                                           bool writes, const float (&cosines)[D / 64], const float (&sines)[D / 64]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const __nv_bfloat16* row = d.q + int64_t(token) * (d.num_heads + 2 * d.num_kv_heads) * D;
  for (int i = warp; i < group + (writes ? 2 : 0); i += kWarps) {  // query heads, k, v
    const bool is_k = i == group, is_v = i > group;
    const int from = is_v ? d.num_heads + d.num_kv_heads + kv_head : is_k ? d.num_heads + kv_head : kv_head * group + i;
    Head<D> head;
    head.load(row + from * D, lane);
    if (!is_v) {
      if (d.q_norm != nullptr) head.norm(is_k ? d.k_norm : d.q_norm, d.eps, lane);
      head.rotate(cosines, sines);
    }
    if (is_k || is_v) {
      using Kept = std::conditional_t<kBytes == 1, __nv_fp8_e4m3, __nv_bfloat16>;
      const int slot = d.slots[token];
      const int64_t at = ((int64_t(slot / kBlock) * d.num_kv_heads + kv_head) * kBlock + slot % kBlock) * D;
      head.store(static_cast<Kept*>(is_k ? d.keys : d.values) + at, lane);
    } else {
      head.store(queries + i * D, lane);
    }
  }
  __syncthreads();
}

// kTurns: the step has one request, so that nobody else writes what it reads. Its cache, but for the last block, is asked
// for before griddepcontrol.wait; where requests are was there before the step began.
template <int D, int kBytes, int kWarps, bool kTurns>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps / (D <= 128 ? 1 : 2)) decode_attention(const Decode d) {
  extern __shared__ float left[];
  __shared__ Shared<D, kWarps> shared;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int kv_head = blockIdx.x, index = blockIdx.y, split = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int group = d.num_heads / d.num_kv_heads;
  const int request = d.rows[index], seq_len = d.seq_lens[request], token = d.query_start_loc[request];
  const int* table = d.tables + int64_t(d.first_table + request) * *d.table_stride;
  const int oldest = d.window > 0 ? max(seq_len - d.window, 0) : 0;
  const int first = oldest / kBlock, count = (seq_len + kBlock - 1) / kBlock - first;
  // a graph's grid is fixed; how much of it has work is each request's own length's to say
  const int wanted = max(min((count * kBlock + d.min_chunk - 1) / d.min_chunk, d.num_splits), 1);
  const int share = max((count + wanted - 1) / wanted, 1);
  const int parts = max((count + share - 1) / share, 1);
  if (split >= parts) return;
  const int end = min(first + (split + 1) * share, first + count);

  const uint8_t* keys = static_cast<const uint8_t*>(d.keys);
  const uint8_t* values = static_cast<const uint8_t*>(d.values);
  int block = first + split * share + warp;
  int id = block < end ? table[block] : 0;
  const auto at = [&] { return (int64_t(id) * d.num_kv_heads + kv_head) * (kBlock * D * kBytes); };
  Tile<D, kBytes> tile;
  bool is_loaded = kTurns && block < min(end, (seq_len - 1) / kBlock);
  float cosines[kTurns ? D / 64 : 1], sines[kTurns ? D / 64 : 1];
  if constexpr (kTurns) {
    if (is_loaded) tile.load(keys + at(), values + at(), g, t);
    const int64_t angle = int64_t(d.positions[token]) * (D / 2) + D / 64 * lane;
#pragma unroll
    for (int i = 0; i < D / 64; ++i) cosines[i] = d.cosines[angle + i], sines[i] = d.sines[angle + i];
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

  const __nv_bfloat16* query = d.q + (int64_t(token) * d.num_heads + kv_head * group) * D;
  if constexpr (kTurns) {
    __shared__ __align__(16) __nv_bfloat16 turned[kHeads * D];
    turn_heads<D, kBytes, kWarps>(d, turned, token, kv_head, group, seq_len > 0 && split == parts - 1, cosines, sines);
    query = turned;
  }
  uint32_t q[D / 16][2] = {};
  if (g < group) Tile<D, kBytes>::load_query(q, query + g * D, t);
  Running<D> run;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) run.mixed[i][0] = run.mixed[i][1] = run.mixed[i][2] = run.mixed[i][3] = 0.0f;
  for (; block < end; block += kWarps) {
    if (!is_loaded) tile.load(keys + at(), values + at(), g, t);
    is_loaded = false;
    if (block + kWarps < end) id = table[block + kWarps];
    attend<D, kBytes>(run, tile, q, d, block * kBlock, oldest, seq_len, g, t);
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = run.total[h];
    total += __shfl_xor_sync(0xffffffff, total, 4);
    total += __shfl_xor_sync(0xffffffff, total, 8);
    total += __shfl_xor_sync(0xffffffff, total, 16);
    if (g == 0) shared.best[warp][2 * t + h] = run.best[h], shared.total[warp][2 * t + h] = total;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      if (2 * t + h < group) {
        float* row = left + (warp * group + 2 * t + h) * D;
        row[Tile<D, kBytes>::dimension(i, h, g)] = run.mixed[i][h];
        row[Tile<D, kBytes>::dimension(i, h + 2, g)] = run.mixed[i][h + 2];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * D; i += kWarps * 32) {
    const int h = i / D, head = kv_head * group + h;
    float best = kMinusInfinity, total = 0.0f, mixed = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) best = fmaxf(best, shared.best[w][h]);
    const float shift = best == kMinusInfinity ? 0.0f : best;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(shared.best[w][h] - shift);
      total += shared.total[w][h] * weight;
      mixed += left[(w * group + h) * D + i % D] * weight;
    }
    mixed *= d.v_scale / (total > 0.0f ? total : 1.0f);
    if (parts == 1) {
      d.out[(int64_t(token) * d.num_heads + head) * D + i % D] = __float2bfloat16(mixed);
    } else {
      const int64_t row = int64_t(index * d.num_heads + head) * d.num_splits + split;
      d.partial[row * D + i % D] = mixed;
      if (i % D == 0) d.partial_sums[row] = total > 0.0f ? best + log2f(total) : kMinusInfinity;
    }
  }
  if (parts > 1) merge_if_last<D, kWarps>(d, shared, index, kv_head, token, group, parts);
}

template <int D, int kBytes, int kWarps>
int launch(const Decode& d, int num_decodes, bool chained, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(d.num_kv_heads, num_decodes, d.num_splits);
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = sizeof(float) * kWarps * (d.num_heads / d.num_kv_heads) * D;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = chained ? 1 : 0;
  if (d.cosines == nullptr) return cudaLaunchKernelEx(&config, decode_attention<D, kBytes, kWarps, false>, d);
  if constexpr (D <= 128) {
    return cudaLaunchKernelEx(&config, decode_attention<D, kBytes, kWarps, true>, d);
  }
  return cudaErrorInvalidValue;
}

// So many warps as asked for, where what they leave for each other has room: 32 KiB.
template <int D, int kBytes>
int launch(const Decode& d, int num_decodes, int warps, bool chained, cudaStream_t stream) {
  if constexpr (D <= 128) {
    if (warps == 16 && d.num_heads * D <= 512 * d.num_kv_heads) {
      return launch<D, kBytes, 16>(d, num_decodes, chained, stream);
    }
    if (warps >= 8) return launch<D, kBytes, 8>(d, num_decodes, chained, stream);
  }
  return launch<D, kBytes, 4>(d, num_decodes, chained, stream);
}

}  // namespace

// Returns a CUDA error code; 1 (invalid value) for a shape that has no kernel.
extern "C" int octavo_decode_attention(const Decode* decode, int num_decodes, int head_dim, int kv_bytes, int warps,
                                       int chained, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (decode->num_heads > kHeads * decode->num_kv_heads) return cudaErrorInvalidValue;
  if (kv_bytes == 2) {
    if (head_dim == 64) return launch<64, 2>(*decode, num_decodes, warps, chained, s);
    if (head_dim == 128) return launch<128, 2>(*decode, num_decodes, warps, chained, s);
    if (head_dim == 256) return launch<256, 2>(*decode, num_decodes, warps, chained, s);
  } else if (kv_bytes == 1) {
    if (head_dim == 128) return launch<128, 1>(*decode, num_decodes, warps, chained, s);
    if (head_dim == 256) return launch<256, 1>(*decode, num_decodes, warps, chained, s);
  }
  return cudaErrorInvalidValue;
}
