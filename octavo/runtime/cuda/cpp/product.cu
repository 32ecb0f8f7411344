// Products of many rows for Hopper, x [rows, depth] times weight [columns, depth]^T, and in the same pass what follows
// them, on the sums in registers: bias; a gated activation; or norm and rotation of the heads of q and k, and k and v into
// the paged cache. So none of it reads the product from memory again.
//
// A program takes tiles of 128 x 256 one after the other, the same ones in every run. One warp asks for 64 columns of x
// and of the weights, four such steps ahead (cp.async.bulk.tensor, completing on mbarriers). Two programs side by side
// have the same 256 weights, so each asks for half of them, for both: what limits otherwise is how much the second
// cache can deliver. Two warpgroups multiply 64 rows each (wgmma), the second two steps behind the first, so that one
// multiplies while the other stores.

#include "product.cuh"

#include <cuda_fp8.h>

namespace {

constexpr int kPage = 16;     // positions of a KV block
constexpr int kRows = 128;    // of a tile, half of them a warpgroup's
constexpr int kColumns = 256; // of a tile
constexpr int kStages = 4;
constexpr int kLag = 2;       // steps that the second warpgroup is behind the first
constexpr int kBand = 8;      // pairs of tiles below each other whose columns are walked together: they stay in the second cache
constexpr int kPlain = 0, kGated = 1;  // what follows; else a head's size

struct Shared {
  __nv_bfloat16 x[kStages][kRows][kSwizzled];
  __nv_bfloat16 weight[kStages][2][kColumns / 2][kSwizzled];
  __nv_bfloat16 staged[8][16][kSwizzled];  // a warp's rows on their way out
  float norms[2][128];                     // weights of the norms of q and k
  uint64_t full[kStages];                  // data has come
  uint64_t empty[kStages];                 // all sixteen warps of both programs have read it
};

// Where a pair of programs works: the first row of both, and the tile's number among those of columns.
struct Place {
  int row, column;

  __device__ __forceinline__ Place(int work, int num_pairs, int num_columns) {
    const int band = work / (kBand * num_columns), first = band * kBand, left = work - first * num_columns;
    const int size = min(kBand, num_pairs - first);
    row = (first + left % size) * 2 * kRows;
    column = left / size;
  }
};

// sums [64, 256] (+)= x [64, 16] weight [256, 16]^T, both in shared memory.
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t x, uint64_t weight, int adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" N128 "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : D32(d, 0), D32(d, 32), D32(d, 64), D32(d, 96)
      : "l"(x), "l"(weight), "r"(adds));
}

__device__ __forceinline__ void put(__nv_bfloat16* to, uint4 value) { *reinterpret_cast<uint4*>(to) = value; }

// Eight bfloat16 numbers as e4m3, the nearest; what is too large becomes the largest.
__device__ __forceinline__ uint2 narrowed(uint4 value) {
  const auto pair = [](uint32_t x) -> uint32_t {
    return __nv_cvt_bfloat16raw2_to_fp8x2(reinterpret_cast<const __nv_bfloat162_raw&>(x), __NV_SATFINITE, __NV_E4M3);
  };
  return make_uint2(pair(value.x) | pair(value.y) << 16, pair(value.z) | pair(value.w) << 16);
}

template <int kKind>
__device__ void produce(const Product& p, const CUtensorMap& x, const CUtensorMap& weight, Shared& shared, int num_pairs,
                        int num_columns) {
  const int rank = rank_in_cluster(), steps = (p.depth + kSwizzled - 1) / kSwizzled;
  int turn = 0;
  for (int work = blockIdx.x / 2; work < num_pairs * num_columns; work += gridDim.x / 2) {
    const Place place(work, num_pairs, num_columns);
    const int row = place.row + rank * kRows;
    const int column = kKind == kGated ? place.column * (kColumns / 2) + rank * p.width  // half of gate, half of up
                                       : place.column * kColumns + rank * (kColumns / 2);
    for (int k = 0; k < steps; ++k, ++turn) {
      const int stage = turn % kStages;
      barrier_wait(shared.empty[stage], turn / kStages % 2 ^ 1);
      barrier_expect(shared.full[stage], sizeof(shared.x[0]) + sizeof(shared.weight[0]));
      bring(shared.x[stage], x, k * kSwizzled, row, shared.full[stage]);
      bring_to(3, shared.weight[stage][rank], weight, k * kSwizzled, column, shared.full[stage]);
    }
  }
}

template <int kKind>
struct Consumer {
  const Product& p;
  Shared& shared;
  const int me, warp, lane;  // warpgroup 0 or 1, warp within it
  float sums[128];           // of a row g = lane / 4 and of g + 8, columns 8 i + 2 (lane % 4) and the one after
  int turn = 0;

  __device__ __forceinline__ Consumer(const Product& p, Shared& shared, int me)
      : p(p), shared(shared), me(me), warp(__shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0)), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void release(int turn) {
    if (lane < 2) barrier_arrive_at(shared.empty[turn % kStages], lane);
  }

  // `meanwhile` is done while the last products run.
  template <class Meanwhile>
  __device__ __forceinline__ void multiply_tile(int steps, bool is_first, const Meanwhile& meanwhile) {
    if (is_first && me == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
    for (int k = 0; k < steps; ++k, ++turn) {
      const int stage = turn % kStages;
      barrier_wait(shared.full[stage], turn / kStages % 2);
      products_begin();
#pragma unroll
      for (int i = 0; i < kSwizzled / 16; ++i) {
        multiply(sums, matrix(&shared.x[stage][me * (kRows / 2)][i * 16], 16),
                 matrix(&shared.weight[stage][0][0][i * 16], 16), k > 0 || i > 0);
      }
      products_end();
      if (k > 0) {
        products_wait<1>();
        release(turn - 1);
      }
      if (is_first && me == 0 && k == min(kLag, steps) - 1) asm volatile("bar.arrive 1, 256;" ::: "memory");
    }
    meanwhile();
    products_wait<0>();
    pin(sums);
    release(turn - 1);
  }

  // Hands 64 columns, from registers `kFirst` on, to `put`, eight of a row at a time.
  template <int kFirst, class Put>
  __device__ __forceinline__ void store(const Put& put) {
    auto& staged = shared.staged[me * 4 + warp];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = lane / 4 + i % 2 * 8, chunk = i / 2;
      const __nv_bfloat162 both = __floats2bfloat162_rn(sums[kFirst + 2 * i], sums[kFirst + 2 * i + 1]);
      char* at = reinterpret_cast<char*>(staged[row]) + ((chunk ^ (row % 8)) * 16) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(at) = reinterpret_cast<const uint32_t&>(both);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane / 8, chunk = lane % 8;
      const char* at = reinterpret_cast<const char*>(staged[row]) + ((chunk ^ (row % 8)) * 16);
      put(i, chunk * 8, *reinterpret_cast<const uint4*>(at));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_bias(int column, int first, int count) {
    if (p.bias == nullptr) return;
    const float* bias = p.bias + column + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i < count) {
        const bool is_there = column + i * 8 < (kKind == kGated ? 2 : 1) * p.width;
        const float2 b = is_there ? *reinterpret_cast<const float2*>(bias + i * 8) : make_float2(0.0f, 0.0f);
        sums[first + 4 * i] += b.x, sums[first + 4 * i + 1] += b.y;
        sums[first + 4 * i + 2] += b.x, sums[first + 4 * i + 3] += b.y;
      }
    }
  }

  __device__ __forceinline__ void finish(int row, int column) {
    const auto target = [&](int first) {
      return [=](int i, int offset, uint4 value) {
        const int64_t at = row + i * 4 + lane / 8;
        if (at < p.rows && first + offset < p.width) put(p.out + at * p.width + first + offset, value);
      };
    };
    if constexpr (kKind == kGated) {
      const int first = column * (kColumns / 2);
      add_bias(first, 0, 16);
      add_bias(p.width + first, 64, 16);
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[i] = activated(sums[i], p.activation) * sums[64 + i];
      store<0>(target(first));
      store<32>(target(first + 64));
    } else {
      const int first = column * kColumns;
      add_bias(first, 0, 32);
      store<0>(target(first));
      store<32>(target(first + 64));
      store<64>(target(first + 128));
      store<96>(target(first + 192));
    }
  }

  // Cosines and sines of this thread's columns at a position: of D / 16 pairs of columns, and of those D / 2 behind.
  template <int D>
  struct Angles {
    float2 cosines[D / 16], sines[D / 16];

    __device__ __forceinline__ void load(const Product& p, int position, int lane) {
      const int64_t at = int64_t(position) * (D / 2) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        cosines[i] = __ldg(reinterpret_cast<const float2*>(p.cosines + at + i * 8));
        sines[i] = __ldg(reinterpret_cast<const float2*>(p.sines + at + i * 8));
      }
    }
  };

  // Norms the heads of this tile.
  template <int D>
  __device__ __forceinline__ void norm_heads(int first_head) {
    constexpr int kPer = D / 2;  // registers of a head
    if (p.q_norm == nullptr) return;
#pragma unroll
    for (int h = 0; h < 128 / kPer; ++h) {
      if (first_head + h >= p.num_heads + p.num_kv_heads) break;  // values
      const float* weights = shared.norms[first_head + h >= p.num_heads] + lane % 4 * 2;
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = 0.0f;
#pragma unroll
        for (int i = h * kPer + 2 * r; i < (h + 1) * kPer; i += 4) total += sums[i] * sums[i] + sums[i + 1] * sums[i + 1];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
        factor[r] = rsqrtf(total * (1.0f / D) + p.eps);
      }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float2 w = *reinterpret_cast<const float2*>(weights + i * 8);
        float* s = sums + h * kPer + 4 * i;
        s[0] *= factor[0] * w.x, s[1] *= factor[0] * w.y, s[2] *= factor[1] * w.x, s[3] *= factor[1] * w.y;
      }
    }
  }

  // Rotates the heads of this tile in row g (`r` 0) or g + 8.
  template <int D>
  __device__ __forceinline__ void rotate_heads(int first_head, int r, const Angles<D>& angles) {
    constexpr int kPer = D / 2;
#pragma unroll
    for (int h = 0; h < 128 / kPer; ++h) {
      if (first_head + h >= p.num_heads + p.num_kv_heads) break;  // values
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        float* x = sums + h * kPer + 4 * i + 2 * r;
        float* y = x + D / 4;
        const float2 c = angles.cosines[i], s = angles.sines[i];
        const float x0 = x[0], x1 = x[1];
        x[0] = x0 * c.x - y[0] * s.x, x[1] = x1 * c.y - y[1] * s.y;
        y[0] = y[0] * c.x + x0 * s.x, y[1] = y[1] * c.y + x1 * s.y;
      }
    }
  }

  template <int D>
  __device__ __forceinline__ void finish_heads(int row, int column, const Angles<D>& upper, int lower_position,
                                               const int (&slot)[4]) {
    const int first = column * kColumns;
    Angles<D> lower;
    lower.load(p, lower_position, lane);
    add_bias(first, 0, 32);
    norm_heads<D>(first / D);
    rotate_heads<D>(first / D, 0, upper);
    rotate_heads<D>(first / D, 1, lower);
    const auto target = [&](int chunk) {
      const int at = first + chunk * kSwizzled, head = at / D, column_of_head = at % D;
      return [=](int i, int offset, uint4 value) {
        const int64_t token = row + i * 4 + lane / 8;
        if (token >= p.rows || at >= p.width) return;
        if (head < p.num_heads) return put(p.out + (token * p.num_heads + head) * D + column_of_head + offset, value);
        const bool is_key = head < p.num_heads + p.num_kv_heads;
        const int64_t kv_head = head - p.num_heads - (is_key ? 0 : p.num_kv_heads);
        const int64_t place = (slot[i] / kPage * p.num_kv_heads + kv_head) * kPage + slot[i] % kPage;
        const int64_t to = place * D + column_of_head + offset;
        void* const pool = is_key ? p.keys : p.values;
        if (p.kv_bytes == 2) return put(static_cast<__nv_bfloat16*>(pool) + to, value);
        *reinterpret_cast<uint2*>(static_cast<uint8_t*>(pool) + to) = narrowed(value);
      };
    };
    store<0>(target(0));
    store<32>(target(1));
    store<64>(target(2));
    store<96>(target(3));
  }

  __device__ __forceinline__ void run(int num_pairs, int num_columns) {
    const int rank = rank_in_cluster(), steps = (p.depth + kSwizzled - 1) / kSwizzled;
    bool is_first = true;
    for (int work = blockIdx.x / 2; work < num_pairs * num_columns; work += gridDim.x / 2) {
      const Place place(work, num_pairs, num_columns);
      const int row = place.row + rank * kRows + me * (kRows / 2) + warp * 16;
      if constexpr (kKind > kGated) {
        int position[2], slot[4];
#pragma unroll
        for (int r = 0; r < 2; ++r) position[r] = p.positions[min(row + lane / 4 + 8 * r, p.rows - 1)];
#pragma unroll
        for (int i = 0; i < 4; ++i) slot[i] = p.slots[min(row + i * 4 + lane / 8, p.rows - 1)];
        Angles<kKind> upper;
        multiply_tile(steps, is_first, [&] { upper.load(p, position[0], lane); });
        finish_heads<kKind>(row, place.column, upper, position[1], slot);
      } else {
        multiply_tile(steps, is_first, [] {});
        finish(row, place.column);
      }
      is_first = false;
    }
  }
};

template <int kKind>
__global__ void __launch_bounds__(384, 1)
    product(const Product p, const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
            int num_pairs, int num_columns) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(shared.full[i], 1), barrier_init(shared.empty[i], 16);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  if (kKind > kGated && p.q_norm != nullptr) {
    for (int i = threadIdx.x; i < kKind; i += 384) shared.norms[0][i] = p.q_norm[i], shared.norms[1][i] = p.k_norm[i];
  }
  cluster_sync();
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");  // what comes below was written by the kernels in front
  const int role = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // which the compiler then knows to be one for a warp
  if (role == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<kKind>(p, x, weight, shared, num_pairs, num_columns);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer<kKind> consumer(p, shared, role - 1);
    consumer.run(num_pairs, num_columns);
  }
  cluster_sync();  // neither ends while the other may still write to it
#endif
}

template <int kKind>
int launch(const Product& p, int chained, cudaStream_t stream) {
  const int outputs = kKind == kGated ? kColumns / 2 : kColumns, columns = kKind == kGated ? 2 * p.width : p.width;
  const cuuint64_t x_size[2] = {cuuint64_t(p.depth), cuuint64_t(p.rows)};
  const cuuint64_t weight_size[2] = {cuuint64_t(p.depth), cuuint64_t(columns)};
  const cuuint32_t box[2] = {kSwizzled, kRows};
  CUtensorMap x, weight;
  if (const int code = describe(x, p.x, 2, x_size, box)) return code;
  if (const int code = describe(weight, p.weight, 2, weight_size, box)) return code;
  const int bytes = sizeof(Shared) + 1024;
  static const int num_programs = [&] {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    cudaFuncSetAttribute(product<kKind>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return count / 2 * 2;
  }();
  const int num_pairs = (p.rows + 2 * kRows - 1) / (2 * kRows), num_columns = (p.width + outputs - 1) / outputs;
  const int works = num_pairs * num_columns * 2;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {2, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(works < num_programs ? works : num_programs);
  config.blockDim = dim3(384);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = chained ? 2 : 1;
  return cudaLaunchKernelEx(&config, product<kKind>, p, x, weight, num_pairs, num_columns);
}

}  // namespace

// `kind`: 0 plain, 1 gated, else the size of heads (64 or 128). Returns a CUDA error code; 1 (invalid value) for a shape
// that has no kernel.
extern "C" int octavo_product(const Product* p, int kind, int chained, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (kind == kPlain) return launch<kPlain>(*p, chained, s);
  if (kind == kGated) return launch<kGated>(*p, chained, s);
  if (kind == 64) return launch<64>(*p, chained, s);
  if (kind == 128) return launch<128>(*p, chained, s);
  return cudaErrorInvalidValue;
}
