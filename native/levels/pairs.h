// The KV cache as operands of multiply-adds, one struct for each type: FloatKV, BFloat16KV, Int8KV.
//
// A reduction walks K along head_dim and V along positions, kDepth of them in a step; kSteps steps are loaded at once. With kDepth 2 the two lie
// together (Pairs) and their products are added to the sum one after the other, by VDPBF16PS where the level has it,
// else by two multiply-adds; the other factor, a query or a weight, is rounded to bfloat16. int8 numbers are exact in
// bfloat16, so that an Int8KV piece and the same piece widened to a BFloat16KV one give the same bits.
#pragma once

#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

inline Halves to_bfloat16(Floats v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words nan = (bits >> 16) | 0x40;
    const Words kept = v != v ? nan : rounded;
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)kept);
#else
    return __builtin_convertvector(kept, Halves);
#endif
#endif
}

#if defined(__AVX512BF16__)
using Pairs = __m512bh;  // lane l: two bfloat16 numbers, the first in the low half

inline Pairs pairs_of(Words bits) { return (Pairs)bits; }
inline Words bits_of(Pairs v) { return (Words)v; }
inline Floats multiply_add(Pairs a, Pairs b, Floats sum) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }

// The two bytes of the bfloat16 numbers 0 to 127.
struct Int8Tables {
    uint8_t low[128], high[128];

    constexpr Int8Tables() : low{}, high{} {
        for (int i = 1; i < 128; ++i) {
            int exponent = 0;
            while (i >> (exponent + 1) != 0) ++exponent;
            const int bits = (127 + exponent) << 7 | ((i << (7 - exponent)) & 0x7f);
            low[i] = static_cast<uint8_t>(bits & 0xff);
            high[i] = static_cast<uint8_t>(bits >> 8);
        }
    }
};
alignas(64) constexpr Int8Tables kInt8Tables;

// Lane l: four signed bytes, of which out[0] gets the first two and out[1] the others. The bytes of the magnitude are
// looked up, because conversions by way of float take twice as many instructions.
inline void pairs_of_int8(Words quads, Pairs (&out)[2]) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m512i bytes = _mm512_shuffle_epi8((__m512i)quads, order), magnitude = _mm512_abs_epi8(bytes);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kInt8Tables.low), magnitude,
                                                 _mm512_load_si512(kInt8Tables.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kInt8Tables.high), magnitude,
                                            _mm512_load_si512(kInt8Tables.high + 64));
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(-128), 0xf8);  // high | (bytes & sign)
    out[0] = (Pairs)_mm512_unpacklo_epi8(low, high);
    out[1] = (Pairs)_mm512_unpackhi_epi8(low, high);
}
#else
struct Pairs {
    Floats first, second;
};

inline Pairs pairs_of(Words bits) { return {(Floats)(bits << 16), (Floats)(bits & 0xffff0000u)}; }
inline Words bits_of(Pairs v) { return ((Words)v.first >> 16) | (Words)v.second; }
inline Floats multiply_add(Pairs a, Pairs b, Floats sum) { return fma(a.second, b.second, fma(a.first, b.first, sum)); }

inline void pairs_of_int8(Words quads, Pairs (&out)[2]) {
    const auto number = [quads](int up) { return __builtin_convertvector((Ints)(quads << up) >> 24, Floats); };
    out[0] = {number(24), number(16)};
    out[1] = {number(8), number(0)};
}
#endif

inline Words load_words(const void* p) {
    Words v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Where the operands of a step lie in K or V: `width` (kGroup, value_width) times four bytes for kSteps steps.
template <class KV>
inline size_t operand_offset(size_t width, size_t step, size_t column) {
    return (step / KV::kSteps * width + column) * 4;
}

struct FloatKV {
    static constexpr size_t kDepth = 1, kSteps = 1;
    using Element = float;  // of a query or of a weight
    using Operand = Floats;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) { out[0] = (Floats)load_words(at); }
    static Operand factor(const Element* row, size_t step) { return splat(row[step]); }
    static Floats add(Operand factor, Operand kv, Floats sum) { return fma(factor, kv, sum); }
};

struct PairKV {
    static constexpr size_t kDepth = 2;
    using Element = uint16_t;
    using Operand = Pairs;

    static Operand factor(const Element* row, size_t step) {
        uint32_t bits;
        std::memcpy(&bits, row + 2 * step, sizeof bits);
        return pairs_of(Words{} + bits);
    }
    static Floats add(Operand factor, Operand kv, Floats sum) { return multiply_add(factor, kv, sum); }
};

struct BFloat16KV : PairKV {
    static constexpr size_t kSteps = 1;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) { out[0] = pairs_of(load_words(at)); }
};

struct Int8KV : PairKV {
    static constexpr size_t kSteps = 2;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) { pairs_of_int8(load_words(at), out); }
};

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
