// The KV cache as operands of multiply-adds, one struct for each type: FloatKV, BFloat16KV, Int8KV.
//
// A reduction walks K along head_dim and V along positions, kDepth of them in a step; kSteps steps are loaded at once. Of
// bfloat16 numbers VDPBF16PS takes two in a step (Pairs), where the level has it, and multiply-adds of floats one; the
// other factor, a query or a weight, is rounded to bfloat16 too. int8 numbers are exact in bfloat16, so that an Int8KV
// piece and the same piece widened to a BFloat16KV one give the same bits.
#pragma once

#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

#if !defined(__AVX512BF16__)
// Rounded to bfloat16, in the upper half of each lane; a NaN stays one.
inline Words bfloat16_bits(Floats v) {
    const Words bits = (Words)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return (v != v ? bits | 0x400000u : rounded) & 0xffff0000u;
}
#endif

inline Halves to_bfloat16(Floats v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)(bfloat16_bits(v) >> 16));
#else
    return __builtin_convertvector(bfloat16_bits(v) >> 16, Halves);
#endif
}

#if defined(__AVX512BF16__)
using Pairs = __m512bh;  // lane l: two bfloat16 numbers, the first in the low half


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
    static constexpr bool kRounded = false;  // the other factor
    using Element = float;  // of a query or of a weight
    using Operand = Floats;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) { out[0] = (Floats)load_words(at); }
    static Operand factor(const Element* row, size_t step) { return splat(row[step]); }
    static Floats add(Operand factor, Operand kv, Floats sum) { return fma(factor, kv, sum); }
};

#if defined(__AVX512BF16__)
struct RoundedKV {
    static constexpr size_t kDepth = 2;
    static constexpr bool kRounded = true;
    using Element = uint16_t;
    using Operand = Pairs;

    static Operand factor(const Element* row, size_t step) {
        uint32_t bits;
        std::memcpy(&bits, row + 2 * step, sizeof bits);
        return (Operand)(Words{} + bits);
    }
    static Floats add(Operand factor, Operand kv, Floats sum) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, factor, kv);
    }
};

struct BFloat16KV : RoundedKV {
    static constexpr size_t kSteps = 1;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) { out[0] = (Pairs)load_words(at); }
};

struct Int8KV : RoundedKV {
    static constexpr size_t kSteps = 2;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) { pairs_of_int8(load_words(at), out); }
};

inline void store_rounded(uint16_t* at, Floats v) {
    const Halves rounded = to_bfloat16(v);
    std::memcpy(at, &rounded, sizeof rounded);
}

// Four signed bytes of each lane as bfloat16: out[0] gets the first two, out[1] the others.
inline void widen_int8(Words quads, Words (&out)[2]) {
    Pairs pairs[2];
    pairs_of_int8(quads, pairs);
    out[0] = (Words)pairs[0], out[1] = (Words)pairs[1];
}
#else
struct RoundedKV : FloatKV {
    static constexpr bool kRounded = true;
};

struct BFloat16KV : RoundedKV {
    static constexpr size_t kSteps = 2;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) {
        const Words pairs = load_words(at);
        out[0] = (Floats)(pairs << 16), out[1] = (Floats)(pairs & 0xffff0000u);
    }
};

struct Int8KV : RoundedKV {
    static constexpr size_t kSteps = 4;

    static void load(const uint8_t* at, Operand (&out)[kSteps]) {
        const Words quads = load_words(at);
        for (int i = 0; i < 4; ++i) out[i] = __builtin_convertvector((Ints)(quads << (24 - 8 * i)) >> 24, Floats);
    }
};

inline void store_rounded(float* at, Floats v) { store(at, (Floats)bfloat16_bits(v)); }

// Four signed bytes of each lane as bfloat16: out[0] gets the first two, out[1] the others.
inline void widen_int8(Words quads, Words (&out)[2]) {
    const auto bits = [quads](int up) { return (Words)__builtin_convertvector((Ints)(quads << up) >> 24, Floats); };
    out[0] = bits(24) >> 16 | bits(16);
    out[1] = bits(8) >> 16 | bits(0);
}
#endif

using Rounded = RoundedKV::Element;

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
