// How a matrix is kept for the narrow Linear: the pair layout and its stores.
//
// Output channels come in groups of 16 (the last padded with zeros), depth in blocks of 32 (likewise). A block of a
// group is 16 lines; a line holds 16 channels x 2 consecutive k, element 2 * channel + (k & 1). That is the operand of
// a bf16 dot-product instruction, and 16 lines are one B tile of AMX. The blocks of a group follow each other.
//
//   16 bits: bf16 values; a line is 64 bytes.
//    8 bits: int8 quanta; a line is 32 bytes.
//    4 bits: indices into a table of 16 values; 4 lines are 16 dwords. Nibble n of dword i is element
//            n % 2 * 16 + i of line n / 2, so that a shift and a look-up by lane give 16 values.
//
// Quanta have a scale, and some a minimum, per channel and `step` values of k. They stand in a header before every
// `period` blocks, so that payloads keep their alignment: as halves, or as int8 codes times a float per channel and
// 256 of k. The weight is bf16(scale * quantum + minimum), rounded to nearest even; the product is exact in float32
// for every GGUF type, so the sum is rounded once whether or not the level fuses it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace octavo {

constexpr size_t kBlockDepth = 32;                // k of a block
constexpr size_t kBlockLines = kBlockDepth / 2;   // lines of a block
constexpr size_t kSuperBlocks = 8;                // blocks that share float scales where scales are codes
constexpr int kNotCounted = 1 << 8;

// These run inside the levels, which must not leave copies of shared functions behind (levels/simd.h).
#define OCTAVO_INLINE [[gnu::always_inline]]

struct Layout {
    int bits;      // of a weight: 16, 8 or 4
    bool halves;   // scales and minima are halves, else codes
    bool minimum;  // there is one
    size_t step;   // k of a scale
    int lowest = kNotCounted;  // of 4 bits: quantum i is lowest + i; where that is not so, only the table knows

    OCTAVO_INLINE constexpr size_t payload_bytes() const { return kBlockDepth * kChannels * static_cast<size_t>(bits) / 8; }
    OCTAVO_INLINE constexpr size_t period() const { return bits == 16 ? 1 : !halves ? kSuperBlocks : minimum ? 1 : 2; }
    OCTAVO_INLINE constexpr size_t steps() const { return kBlockDepth / step; }
    // Scales and minima of one block.
    OCTAVO_INLINE constexpr size_t scale_bytes() const {
        return kChannels * (halves ? 2 : 1) * steps() * (minimum ? 2 : 1);
    }
    // The float scales and minima in front of the codes.
    OCTAVO_INLINE constexpr size_t super_bytes() const { return halves ? 0 : kChannels * 4 * (minimum ? 2 : 1); }
    OCTAVO_INLINE constexpr size_t header_bytes() const { return bits == 16 ? 0 : super_bytes() + period() * scale_bytes(); }
    OCTAVO_INLINE constexpr size_t header_at(size_t block) const {
        return block / period() * (header_bytes() + period() * payload_bytes());
    }
    OCTAVO_INLINE constexpr size_t scales_at(size_t block) const {
        return header_at(block) + super_bytes() + block % period() * scale_bytes();
    }
    OCTAVO_INLINE constexpr size_t payload_at(size_t block) const {
        return header_at(block) + header_bytes() + block % period() * payload_bytes();
    }
    OCTAVO_INLINE constexpr size_t group_bytes(size_t blocks) const { return header_at(round_up(blocks, period())); }
};

// Every layout that a stored type is kept in; a Part names one by its place here.
inline constexpr Layout kLayouts[] = {
    {16, false, false, 32},    // float types
    {4, true, false, 32, -8},  // Q4_0
    {4, true, true, 32, 0},    // Q4_1
    {4, false, false, 32},     // IQ4_XS, IQ2_XXS
    {4, false, true, 32, 0},   // Q4_K
    {4, false, false, 16, -4}, // Q3_K
    {4, false, true, 16, 0},   // Q2_K
    {8, true, false, 32},      // Q5_0, Q8_0
    {8, true, true, 32},       // Q5_1
    {8, false, true, 32},      // Q5_K
    {8, false, false, 16},     // Q6_K
    {4, true, false, 32},      // IQ4_NL
};
constexpr size_t kNumLayouts = sizeof kLayouts / sizeof *kLayouts;
constexpr size_t kInt8Layout = kNumLayouts;  // none of the pair layout: int8.h

constexpr size_t find_layout(int bits, bool halves, bool minimum, size_t step, int lowest = kNotCounted) {
    for (size_t i = 0; i < kNumLayouts; ++i)
        if (kLayouts[i].bits == bits && kLayouts[i].halves == halves && kLayouts[i].minimum == minimum &&
            kLayouts[i].step == step && kLayouts[i].lowest == lowest)
            return i;
    return kNumLayouts;
}

struct StoredType;

// Bytes of `rows` packed rows of the store that a GGUF type name means; 0 where there is none or `cols` does not fit.
size_t part_bytes(const char* store, int64_t rows, int64_t cols);

// The layout that rows of a stored type are kept in.
const Layout& layout_of(const StoredType& type);

// Converts the 16 stored rows of one group (fewer at the end) from `source` on into the layout of `store`, at `group`.
// `type` is `store`, or any type where `store` keeps bf16. `wide` is scratch for `cols` floats.
void pack_group(const StoredType& store, const StoredType& type, const uint8_t* source, size_t row_bytes, size_t rows,
                size_t cols, uint8_t* group, float* wide);

// 32 weights of a packed row from depth 32 * block on, as float32.
void unpack_block(const Part& part, size_t row, size_t block, float* out);

}  // namespace octavo
