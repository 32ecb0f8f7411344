// Row by row: residual + LayerNorm, bias + GELU, and LayerNorm + GELU in one pass.
//
// One thread block a row, 16-byte loads; the row stays in shared memory as float32 between the passes over it. Consecutive
// threads touch consecutive words, so no two lanes of a warp meet in a bank. Sums go through warps by shuffles.
// LayerNorm: Ba et al. 2016, biased variance. GELU: Hendrycks & Gimpel 2016, exact or by tanh.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // bfloat16 numbers of one load

struct Vector {
  float x[kVector];
};

__device__ __forceinline__ Vector load(const __nv_bfloat16* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&bits);
  Vector v;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 f = __bfloat1622float2(pairs[i]);
    v.x[2 * i] = f.x, v.x[2 * i + 1] = f.y;
  }
  return v;
}

__device__ __forceinline__ void store(__nv_bfloat16* to, const Vector& v) {
  uint4 bits;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) pairs[i] = __floats2bfloat162_rn(v.x[2 * i], v.x[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = bits;
}

__device__ __forceinline__ float gelu(float x, bool by_tanh) {
  if (by_tanh) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
  return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
}

// The sum over the block, in every thread.
__device__ float block_sum(float x) {
  __shared__ float sums[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) x += sums[i];
  __syncthreads();  // sums may be written again
  return x;
}

template <bool kGelu>
__global__ void __launch_bounds__(kThreads) layer_norm(const __nv_bfloat16* x, const __nv_bfloat16* residual,
                                                       const float* weight, const float* bias, __nv_bfloat16* out,
                                                       __nv_bfloat16* residual_out, float eps, int width) {
  extern __shared__ float row[];
  const int64_t start = int64_t(blockIdx.x) * width;
  const int num_vectors = width / kVector;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
    Vector v = load(x + start + i * kVector);
    if (residual != nullptr) {
      const Vector r = load(residual + start + i * kVector);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v.x[j] += r.x[j];
    }
    if (residual_out != nullptr) store(residual_out + start + i * kVector, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) row[j * num_vectors + i] = v.x[j], sum += v.x[j];
  }
  const float mean = block_sum(sum) / width;
  float squares = 0.0f;
  for (int i = threadIdx.x; i < width; i += kThreads) squares += (row[i] - mean) * (row[i] - mean);
  const float factor = rsqrtf(block_sum(squares) / width + eps);
  for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
    Vector v;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int col = i * kVector + j;
      const float y = (row[j * num_vectors + i] - mean) * factor * weight[col] + (bias == nullptr ? 0.0f : bias[col]);
      v.x[j] = kGelu ? gelu(y, false) : y;
    }
    store(out + start + i * kVector, v);
  }
}

__global__ void __launch_bounds__(kThreads) bias_gelu(const __nv_bfloat16* x, const float* bias, __nv_bfloat16* out,
                                                      int64_t num_vectors, int width, bool by_tanh) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_vectors) return;
  Vector v = load(x + i * kVector);
  const int col = i * kVector % width;
#pragma unroll
  for (int j = 0; j < kVector; ++j) v.x[j] = gelu(v.x[j] + bias[col + j], by_tanh);
  store(out + i * kVector, v);
}

}  // namespace

// All return a CUDA error code. Widths are multiples of 8, rows at most 12,288 wide (48 KiB of shared memory).

extern "C" int octavo_layer_norm(const void* x, const void* residual, const float* weight, const float* bias, void* out,
                                 void* residual_out, float eps, int num_rows, int width, int with_gelu, void* stream) {
  if (width % kVector != 0 || width * sizeof(float) > 48 * 1024) return cudaErrorInvalidValue;
  using T = __nv_bfloat16;
  const auto kernel = with_gelu ? layer_norm<true> : layer_norm<false>;
  kernel<<<num_rows, kThreads, width * sizeof(float), static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(x), static_cast<const T*>(residual), weight, bias, static_cast<T*>(out),
      static_cast<T*>(residual_out), eps, width);
  return cudaGetLastError();
}

extern "C" int octavo_bias_gelu(const void* x, const float* bias, void* out, int num_rows, int width, int by_tanh,
                                void* stream) {
  if (width % kVector != 0) return cudaErrorInvalidValue;
  const int64_t num_vectors = int64_t(num_rows) * width / kVector;
  const int blocks = static_cast<int>((num_vectors + kThreads - 1) / kThreads);
  bias_gelu<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(x), bias, static_cast<__nv_bfloat16*>(out), num_vectors, width, by_tanh != 0);
  return cudaGetLastError();
}
