// What the products of many rows and those of some share: what they are given, and the activations of gates.

#pragma once

#include "hopper.cuh"

struct Product {
  const __nv_bfloat16* x;       // [rows, depth]
  const __nv_bfloat16* weight;  // [columns, depth]; of a gated product gate over up
  const float* bias;            // [columns], or none
  __nv_bfloat16* out;           // [rows, width]; of heads those of q alone
  const int* positions;         // [rows]; from here on what heads need
  const int* slots;             // [rows]: where in the cache
  const float* cosines;         // [positions, D / 2]
  const float* sines;
  const float* q_norm;  // [D], or none
  const float* k_norm;
  void* keys;  // [blocks, KV heads, 16, D], bfloat16 or e4m3
  void* values;
  int rows, depth;
  int width;  // of `out` before heads are taken apart: columns, or half of them
  int activation;  // of the gate: 4 SiLU, 5 GELU by tanh
  int num_heads, num_kv_heads;
  int kv_bytes;
  float eps;
};

namespace {

__device__ __forceinline__ float activated(float x, int activation) {
  if (activation == 4) return __fdividef(x, 1.0f + __expf(-x));
  const float y = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1.0f + __expf(-2.0f * y));  // (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
}

}  // namespace
