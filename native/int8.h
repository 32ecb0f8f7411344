// The int8 Linear (W8A8): what is computed, and how a matrix is kept for it. octavo/runtime/reference/int8.py is the
// definition.
//
// A row of k values, padded with zeros to whole blocks of 64, is rotated first, weights and activations alike:
//
//   every block times the Hadamard matrix of 64 (Sylvester's order, entries 1 and -1);
//   then across blocks, for each prime factor p of their number, smallest first: the p numbers that lie `stride` apart,
//   stride = 64, 64 p, ..., become their sum and difference (p = 2), or x - (2 / p) * (their sum), summed in order.
//
// That is an orthogonal matrix but for a factor: (R x)(R w) = int8_norm * x w. It spreads an outlier over the whole row,
// so that one scale is enough for a row of activations and one for a channel (docs/numerics.md).
//
//   largest = max |R x|     code = rint(R x * (127 / largest)), ties to even     scale = largest / 127
//   y = float(sum of code_x * code_w) * (scale_x * (scale_w / int8_norm))
//
// The sum is exact in int32, so every level and every order of it gives the same bits.
//
// Output channels come in groups of 16, the last padded with zeros. A line is 16 channels x 4 consecutive k, byte
// 4 * channel + k % 4: the operand of a byte dot product; the 16 lines of a block are one B tile of AMX. Bytes are
// code + 128, because VPDPBUSD wants one unsigned operand; a row of activations carries -128 * (sum of its codes),
// which takes the 128 out again. Behind its lines a group keeps the 16 values scale_w / int8_norm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stores.h"

namespace octavo {

constexpr size_t kInt8Block = 64;     // k of a rotation and of a block of lines
constexpr size_t kInt8LineDepth = 4;  // k of a line
constexpr size_t kInt8LineBytes = kChannels * kInt8LineDepth;
constexpr size_t kInt8Lines = kInt8Block / kInt8LineDepth;  // of a block
constexpr size_t kInt8BlockBytes = kInt8Lines * kInt8LineBytes;
constexpr int kInt8Zero = 128;                           // the byte of code 0
constexpr size_t kMaxInt8Depth = 65536;                  // 255 * 127 * depth must be below 2^31
constexpr float kInt8Smallest = 1e-30f;                  // rows with no larger value are zeros: 127 / it is finite
constexpr float kInt8Largest = 127.0f;

OCTAVO_INLINE constexpr size_t int8_blocks(size_t cols) { return round_up(cols, kInt8Block) / kInt8Block; }
OCTAVO_INLINE constexpr size_t int8_scales_at(size_t blocks) { return blocks * kInt8BlockBytes; }
OCTAVO_INLINE constexpr size_t int8_group_bytes(size_t blocks) {
    return int8_scales_at(blocks) + kChannels * sizeof(float);
}

// What a rounded row ends with.
struct Int8Tail {
    float scale;
    int32_t correction;  // -kInt8Zero * the sum of its codes
};

// What the rotation of a row multiplies products by: its Hadamard stages, 2 each.
OCTAVO_INLINE constexpr size_t int8_norm(size_t blocks) { return kInt8Block * (blocks & (~blocks + 1)); }

// Puts up to 16 rows that round_rows() of `kernels` left at `rounded` into a zeroed group.
void pack_int8_group(const PackedKernels& kernels, const uint8_t* rounded, size_t rows, size_t blocks, uint8_t* group);

}  // namespace octavo
