// Products of up to 128 rows for Hopper, where time is the reading of the weights: out = x [rows, depth] times
// weight [columns, depth]^T, with bias and gated activation.
//
// The weights are the 64 rows of wgmma and the rows of x its columns, so few rows waste little. A program has 64 or 128
// weights of a part of the depth: one warp asks for 64 columns of both operands at a time, some steps ahead
// (cp.async.bulk.tensor, completing on mbarriers). Nobody writes weights, so they are on their way before the kernel in
// front has ended, and two programs fit a multiprocessor, so that those of the next product have begun before these end.
// The programs of a tile are a cluster: each leaves its sums in its shared memory, and each joins a share of them.

#include "product.cuh"

namespace {

constexpr int kMostSplits = 4;
constexpr int kRoom = 104 << 10;                      // bytes of shared memory for steps that are on their way
constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // a policy of the second cache, as createpolicy makes it

// kTokens: rows of x, padded. kGroups warpgroups multiply 64 weights each.
template <int kTokens, int kGroups>
struct Plan {
  static constexpr int kOutputs = 64 * kGroups;  // weights of a tile; of a gated one half are of the gate
  static constexpr int kThreads = kGroups * 128 + 32;
  static constexpr int kBytes = (kOutputs + kTokens) * kSwizzled * 2;  // of a step
  static constexpr int kStages = kRoom / kBytes < 8 ? kRoom / kBytes : 8;
  static constexpr int kStride = kOutputs + 4;  // between sums of a token and of the next: no bank twice

  struct Steps {
    __nv_bfloat16 weight[kStages][kOutputs][kSwizzled];
    __nv_bfloat16 x[kStages][kTokens][kSwizzled];
  };
  union Shared {
    Steps steps;
    float sums[kTokens][kStride];  // afterwards
  };
};

// As bring(), of what is read once.
__device__ __forceinline__ void bring_once(void* to, const CUtensorMap& from, int column, int row, uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(address(&barrier)), "l"(kEvictFirst)
      : "memory");
}

// sums [64, N] += weight [64, 16] x [N, 16]^T, both in shared memory; N is twice the number of registers.
#define MULTIPLY(SHAPE, NAMES, WEIGHT, X) \
  "wgmma.mma_async.sync.aligned." SHAPE ".f32.bf16.bf16 {" NAMES "}, " WEIGHT ", " X ", 1, 1, 1, 0, 0;"

__device__ __forceinline__ void multiply(float (&d)[8], uint64_t weight, uint64_t x) {
  asm volatile(MULTIPLY("m64n16k16", N8, "%8", "%9") : D8(d, 0) : "l"(weight), "l"(x));
}

__device__ __forceinline__ void multiply(float (&d)[16], uint64_t weight, uint64_t x) {
  asm volatile(MULTIPLY("m64n32k16", N16, "%16", "%17") : D8(d, 0), D8(d, 8) : "l"(weight), "l"(x));
}

__device__ __forceinline__ void multiply(float (&d)[32], uint64_t weight, uint64_t x) {
  asm volatile(MULTIPLY("m64n64k16", N32, "%32", "%33") : D32(d, 0) : "l"(weight), "l"(x));
}

__device__ __forceinline__ void multiply(float (&d)[48], uint64_t weight, uint64_t x) {
  asm volatile(MULTIPLY("m64n96k16", N48, "%48", "%49") : D32(d, 0), D8(d, 32), D8(d, 40) : "l"(weight), "l"(x));
}

__device__ __forceinline__ void multiply(float (&d)[64], uint64_t weight, uint64_t x) {
  asm volatile(MULTIPLY("m64n128k16", N64, "%64", "%65") : D32(d, 0), D32(d, 32) : "l"(weight), "l"(x));
}

// Four sums of a program of this cluster.
__device__ __forceinline__ float4 sums_of(int rank, const float* at) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address(at)), "r"(rank)
      : "memory");
  return v;
}

// The same four of all parts, and their bias.
__device__ __forceinline__ float4 joined(const float* at, int splits, const float* bias) {
  float4 v = bias == nullptr ? float4{} : *reinterpret_cast<const float4*>(bias);
  if (splits == 1) {
    const float4 part = *reinterpret_cast<const float4*>(at);
    return make_float4(v.x + part.x, v.y + part.y, v.z + part.z, v.w + part.w);
  }
  float4 parts[kMostSplits];
#pragma unroll
  for (int i = 0; i < kMostSplits; ++i) parts[i] = i < splits ? sums_of(i, at) : float4{};
#pragma unroll
  for (int i = 0; i < kMostSplits; ++i) v.x += parts[i].x, v.y += parts[i].y, v.z += parts[i].z, v.w += parts[i].w;
  return v;
}

// Programs [tiles, parts of the depth], those of a tile one cluster.
template <int kTokens, int kGroups>
__global__ void __launch_bounds__(Plan<kTokens, kGroups>::kThreads, 2)
    streamed(const Product p, const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Plan = Plan<kTokens, kGroups>;
  constexpr int kHalf = Plan::kOutputs / 2, kStages = Plan::kStages;
  extern __shared__ char memory[];
  auto& shared = *reinterpret_cast<typename Plan::Shared*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
  __shared__ uint64_t full[kStages], empty[kStages];  // data has come; all warps that read it have done so
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int splits = gridDim.y, split = blockIdx.y;
  const int steps = (p.depth + kSwizzled - 1) / kSwizzled, share = (steps + splits - 1) / splits;
  const int first = split * share, count = max(min(steps - first, share), 0);
  const bool is_gated = p.activation != 0;
  const int width = is_gated ? kHalf : Plan::kOutputs, column = blockIdx.x * width;
  const int second = is_gated ? p.width + column : column + kHalf;  // where the other half of the weights begins
  const auto bring_weights = [&](int k) {
    const int stage = k % kStages, at = (first + k) * kSwizzled;
    barrier_expect(full[stage], Plan::kBytes);
    bring_once(shared.steps.weight[stage], weight, at, column, full[stage]);
    bring_once(shared.steps.weight[stage][kHalf], weight, at, second, full[stage]);
  };
  const int ahead = min(count, kStages);
  if (threadIdx.x == kGroups * 128) {
    for (int i = 0; i < kStages; ++i) barrier_init(full[i], 1), barrier_init(empty[i], kGroups * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    for (int k = 0; k < ahead; ++k) bring_weights(k);
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");

  if (warp == kGroups * 4) {
    if (lane == 0) {
      const auto bring_x = [&](int k) {
        bring(shared.steps.x[k % kStages], x, (first + k) * kSwizzled, 0, full[k % kStages]);
      };
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (int k = 0; k < ahead; ++k) bring_x(k);
      for (int k = ahead; k < count; ++k) {
        barrier_wait(empty[k % kStages], k / kStages % 2 ^ 1);
        bring_weights(k);
        bring_x(k);
      }
    }
  } else {
    float sums[kTokens / 2] = {};  // of weights g = lane / 4 and g + 8, rows of x 8 i + 2 (lane % 4) and the one after
    const int mine = warp / 4 * 64;
    for (int k = 0; k < count; ++k) {
      const int stage = k % kStages;
      barrier_wait(full[stage], k / kStages % 2);
      pin(sums);
      products_begin();
#pragma unroll
      for (int i = 0; i < kSwizzled / 16; ++i) {
        multiply(sums, matrix(&shared.steps.weight[stage][mine][i * 16], 16),
                 matrix(&shared.steps.x[stage][0][i * 16], 16));
      }
      products_end();
      if (k > 0) {
        products_wait<1>();
        if (lane == 0) barrier_arrive(empty[(k - 1) % kStages]);
      }
    }
    products_wait<0>();
    pin(sums);
    asm volatile("bar.sync 1, %0;" ::"n"(kGroups * 128) : "memory");  // nobody multiplies what is overwritten now
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, output = mine + warp % 4 * 16 + lane / 4 + i / 2 % 2 * 8;
      shared.sums[token][output] = sums[i];
    }
  }
  __syncwarp();
  cluster_sync();
  asm volatile("griddepcontrol.wait;" ::: "memory");  // what is in front may read what is written now
  const int quads = width / 4;
  for (int i = split * Plan::kThreads + threadIdx.x; i < p.rows * quads; i += splits * Plan::kThreads) {
    const int token = i / quads, offset = i % quads * 4, at = column + offset;
    if (at >= p.width) continue;
    float4 y = joined(&shared.sums[token][offset], splits, p.bias == nullptr ? nullptr : p.bias + at);
    if (is_gated) {
      const float* bias = p.bias == nullptr ? nullptr : p.bias + p.width + at;
      const float4 up = joined(&shared.sums[token][kHalf + offset], splits, bias);
      y.x = activated(y.x, p.activation) * up.x, y.y = activated(y.y, p.activation) * up.y;
      y.z = activated(y.z, p.activation) * up.z, y.w = activated(y.w, p.activation) * up.w;
    }
    __nv_bfloat162* to = reinterpret_cast<__nv_bfloat162*>(p.out + int64_t(token) * p.width + at);
    to[0] = __floats2bfloat162_rn(y.x, y.y), to[1] = __floats2bfloat162_rn(y.z, y.w);
  }
  if (splits > 1) cluster_sync();  // nobody ends while another one reads what it left
#endif
}

template <int kTokens, int kGroups>
int launch(const Product& p, int splits, int chained, cudaStream_t stream) {
  using Plan = Plan<kTokens, kGroups>;
  const int outputs = p.activation ? Plan::kOutputs / 2 : Plan::kOutputs, columns = p.activation ? 2 * p.width : p.width;
  const cuuint64_t x_size[2] = {cuuint64_t(p.depth), cuuint64_t(p.rows)};
  const cuuint64_t weight_size[2] = {cuuint64_t(p.depth), cuuint64_t(columns)};
  const cuuint32_t x_box[2] = {kSwizzled, kTokens}, weight_box[2] = {kSwizzled, Plan::kOutputs / 2};
  CUtensorMap x, weight;
  if (const int code = describe(x, p.x, 2, x_size, x_box)) return code;
  if (const int code = describe(weight, p.weight, 2, weight_size, weight_box)) return code;
  const int bytes = sizeof(typename Plan::Shared) + 1024;
  static const int code =
      cudaFuncSetAttribute(streamed<kTokens, kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {1, unsigned(splits), 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((p.width + outputs - 1) / outputs, splits);
  config.blockDim = dim3(Plan::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = chained ? 2 : 1;
  return cudaLaunchKernelEx(&config, streamed<kTokens, kGroups>, p, x, weight);
}

template <int kTokens>
int launch(const Product& p, int outputs, int splits, int chained, cudaStream_t stream) {
  if (splits > kMostSplits || splits < 1) return cudaErrorInvalidValue;
  if (outputs == 64) return launch<kTokens, 1>(p, splits, chained, stream);
  if (outputs == 128) return launch<kTokens, 2>(p, splits, chained, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

// `outputs`: weights of a program, 64 or 128; `splits`: parts of the depth, up to 4. Returns a CUDA error code; 1
// (invalid value) for more than 128 rows.
extern "C" int octavo_streamed_product(const Product* p, int outputs, int splits, int chained, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p->rows <= 16) return launch<16>(*p, outputs, splits, chained, s);
  if (p->rows <= 32) return launch<32>(*p, outputs, splits, chained, s);
  if (p->rows <= 64) return launch<64>(*p, outputs, splits, chained, s);
  if (p->rows <= 96) return launch<96>(*p, outputs, splits, chained, s);
  if (p->rows <= 128) return launch<128>(*p, outputs, splits, chained, s);
  return cudaErrorInvalidValue;
}
