// Lines of the pair layout (stores.h) in registers: decoding, activations, multiply-accumulate.
//
// A strip is what one instruction multiplies: all 32 bf16 values of a line where the level has bf16 dot products, else
// kLanes of them, as floats that hold bf16 values. There, lane e sums elements e of all lines by fma, and the even and
// odd k of a channel (neighbouring lanes) are added at the end; VDPBF16PS and AMX add pairs in their own order.
#pragma once

#include "../stores.h"
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kUnroll = kLanes == 16 ? 4 : 1;
constexpr int kFetchTo = 2;  // of the caches, the second: what is ahead may not fit into the first

constexpr size_t kVectors = 2 * kChannels / kLanes;  // of floats in a line

// Of numbers; some NaN become a zero.
inline Floats round_to_bfloat16(Floats v) {
    const Words bits = (Words)v;
    return (Floats)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// The same for weights, in two multiply-adds: beside a number 2^16 times as large, 8 bits of a float are left. What is
// 2^110 or more becomes NaN; no scale of a stored type reaches that.
inline Floats round_beside(Floats v) {
    const Floats power = (Floats)((Words)v & 0xff800000u), factor = splat(98304.0f);  // 1.5 * 2^16
    return fma(power, -factor, fma(power, factor, v));
}

#if defined(__AVX512BF16__)

constexpr size_t kStrips = 1;
typedef __m512bh Strip;
typedef uint16_t Activation;

inline Strip load_strip(const uint8_t* p) { return (Strip)_mm512_loadu_si512(p); }
inline void store_strip(uint8_t* p, Strip v) { _mm512_storeu_si512(p, (__m512i)v); }

// The activations of two consecutive k, in every lane.
inline Strip load_pair(const Activation* x) {
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Strip)_mm512_set1_epi32(pair);
}

inline Floats multiply_add(Strip w, Strip x, Floats total) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, w, x);
}

inline void to_strips(const Floats* values, Strip* strips) {
    strips[0] = _mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
}

// Sums of kChannels channels.
inline void channel_sums(const Floats* totals, float* out) { store(out, totals[0]); }

inline void store_rounded(Activation* out, Floats v) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    std::memcpy(out, &bits, sizeof bits);
}

#else

constexpr size_t kStrips = kVectors;
typedef Floats Strip;
typedef float Activation;

inline Strip load_strip(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
inline void store_strip(uint8_t* p, Strip v) { store(reinterpret_cast<float*>(p), v); }

inline Strip load_pair(const Activation* x) {
    typedef uint64_t Pairs __attribute__((vector_size(kLanes * 4)));
    uint64_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Strip)(Pairs{} + pair);
}

inline Floats multiply_add(Strip w, Strip x, Floats total) { return fma(w, x, total); }

inline void to_strips(const Floats* values, Strip* strips) {
    for (size_t v = 0; v < kVectors; ++v) strips[v] = round_beside(values[v]);
}

inline void channel_sums(const Floats* totals, float* out) {
    float elements[2 * kChannels];
    std::memcpy(elements, totals, sizeof elements);
    for (size_t c = 0; c < kChannels; ++c) out[c] = elements[2 * c] + elements[2 * c + 1];
}

inline void store_rounded(Activation* out, Floats v) { store(out, v == v ? round_to_bfloat16(v) : v); }

#endif

constexpr size_t kStripBytes = sizeof(Strip);
constexpr size_t kLineBytes = kStrips * kStripBytes;  // of a decoded line

// One value for each of 16 channels.
struct PerChannel {
    Floats v[kChannels / kLanes];
};

inline PerChannel load_halves(const uint8_t* p) {
    PerChannel out;
    for (size_t i = 0; i < kChannels / kLanes; ++i) {
        Halves bits;
        std::memcpy(&bits, p + i * sizeof bits, sizeof bits);
#if defined(__AVX512F__)
        out.v[i] = (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
        out.v[i] = (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
        const Words half = (Words)widen(bits) >> 16, rest = (half & 0x7fffu) << 13, exponent = rest & 0x0f800000u;
        const Words normal = rest + 0x38000000u + (exponent == 0x0f800000u ? Words{} + 0x38000000u : Words{});
        const Floats subnormal = (Floats)(rest + 0x38800000u) - (Floats)(Words{} + 0x38800000u);
        out.v[i] = (Floats)((exponent == 0u ? (Words)subnormal : normal) | (half & 0x8000u) << 16);
#endif
    }
    return out;
}

inline Floats load_codes(const uint8_t* p) {  // int8
#if defined(__AVX512F__)
    __m128i bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Floats);
#endif
}

inline PerChannel load_coded(const uint8_t* codes, const uint8_t* factors) {
    PerChannel out;
    for (size_t i = 0; i < kChannels / kLanes; ++i)
        out.v[i] = load_codes(codes + i * kLanes) * load(reinterpret_cast<const float*>(factors) + i * kLanes);
    return out;
}

// Each channel's value twice, as the elements of a line follow each other.
inline void spread(const PerChannel& values, Floats* out) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    out[0] = (Floats)_mm512_permutexvar_ps(low, (__m512)values.v[0]);
    out[1] = (Floats)_mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), (__m512)values.v[0]);
#else
    float single[kChannels], twice[2 * kChannels];
    std::memcpy(single, &values, sizeof single);
    for (size_t c = 0; c < kChannels; ++c) twice[2 * c] = twice[2 * c + 1] = single[c];
    std::memcpy(out, twice, sizeof twice);
#endif
}

struct Scales {
    Floats scale[kVectors], minimum[kVectors];
};

template <Layout L>
inline Scales load_scales(const uint8_t* header, const uint8_t* scales, size_t step) {
    Scales out;
    if constexpr (L.halves) {
        spread(load_halves(scales), out.scale);
        if constexpr (L.minimum) spread(load_halves(scales + 2 * kChannels), out.minimum);
    } else {
        spread(load_coded(scales + step * kChannels, header), out.scale);
        if constexpr (L.minimum)
            spread(load_coded(scales + (L.steps() + step) * kChannels, header + 4 * kChannels), out.minimum);
    }
    return out;
}

// table[index & 15] in each lane; higher bits are ignored.
struct Table {
#if defined(__AVX512F__)
    __m512 values;
    explicit Table(const float* table) : values(_mm512_loadu_ps(table)) {}
    Floats look_up(Words index) const { return (Floats)_mm512_permutexvar_ps((__m512i)index, values); }
#elif defined(__AVX2__)
    __m256 low, high;
    explicit Table(const float* table) : low(_mm256_loadu_ps(table)), high(_mm256_loadu_ps(table + 8)) {}
    Floats look_up(Words index) const {
        const __m256i i = (__m256i)index;  // both look-ups use bits 0 to 2, the sign bit of the blend is bit 3
        return (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i),
                                        (__m256)_mm256_slli_epi32(i, 28));
    }
#else
    const float* values;
    explicit Table(const float* table) : values(table) {}
    Floats look_up(Words index) const {
        Floats out{};
        for (size_t i = 0; i < kLanes; ++i) out[i] = values[index[i] & 15];
        return out;
    }
#endif
};

// 4-bit quanta are looked up in one instruction where there are 16 lanes, else counted where that can be.
template <Layout L>
constexpr bool kCounted = kLanes < 16 && L.lowest != kNotCounted;

// `lowest` plus nibble n < 4 of each lane, without shift or look-up: beside 2^(23 - 4 n) it is the low bits of a float.
inline Floats nibbles_of(Words words, unsigned n, int lowest) {
    const Words beside = Words{} + ((150u - 4 * n) << 23);
    return (Floats)((words & (15u << 4 * n)) | beside) - ((Floats)beside - static_cast<float>(lowest));
}

// Values v * kLanes ... of line i of a unit (4 lines of 4 bits), not scaled yet.
template <Layout L>
OCTAVO_FORCED Floats unit_value(const Words* nibbles, const Table& look, size_t i, size_t v) {
    constexpr size_t words = kVectors / 2;
    const unsigned n = static_cast<unsigned>(2 * i + v / words);
    const Words word = nibbles[v % words];
    if constexpr (kCounted<L>) return nibbles_of(n < 4 ? word : word >> 16u, n % 4, L.lowest);
    return look.look_up(word >> 4 * n);
}

template <Layout L>
inline void scale_line(const Scales& scales, Floats* values) {
    for (size_t v = 0; v < kVectors; ++v) {
        if constexpr (L.minimum)
            values[v] = fma(values[v], scales.scale[v], scales.minimum[v]);
        else
            values[v] *= scales.scale[v];
    }
}

// Calls use(line, values) for the 16 lines of a block, in order. The values of quantised lines are not rounded yet.
template <Layout L, class Use>
OCTAVO_FORCED void each_values(const uint8_t* group, size_t block, const float* table, const Use& use) {
    const uint8_t* payload = group + L.payload_at(block);
    if constexpr (L.bits == 16) {
#pragma GCC unroll kUnroll
        for (size_t line = 0; line < kBlockLines; ++line) {
            Floats values[kVectors];
            for (size_t v = 0; v < kVectors; ++v)
                values[v] = load(reinterpret_cast<const uint16_t*>(payload) + line * 32 + v * kLanes);
            use(line, values);
        }
        return;
    }
    constexpr size_t lines = kBlockLines / L.steps();
    for (size_t step = 0; L.bits != 16 && step < L.steps(); ++step) {
        const Scales scales = load_scales<L>(group + L.header_at(block), group + L.scales_at(block), step);
        if constexpr (L.bits == 8) {
#pragma GCC unroll kUnroll * 4
            for (size_t line = step * lines; line < (step + 1) * lines; ++line) {
                Floats values[kVectors];
                for (size_t v = 0; v < kVectors; ++v) values[v] = load_codes(payload + line * 32 + v * kLanes);
                scale_line<L>(scales, values);
                use(line, values);
            }
        } else if constexpr (L.bits == 4) {
            const Table look(table);
#pragma GCC unroll kUnroll
            for (size_t unit = step * lines / 4; unit < (step + 1) * lines / 4; ++unit) {
                constexpr size_t words = kVectors / 2;
                Words nibbles[words];
                for (size_t w = 0; w < words; ++w)
                    std::memcpy(&nibbles[w], payload + unit * 64 + w * sizeof *nibbles, sizeof *nibbles);
#pragma GCC unroll 4
                for (size_t line = 0; line < 4; ++line) {
                    Floats values[kVectors];
                    for (size_t v = 0; v < kVectors; ++v) values[v] = unit_value<L>(nibbles, look, line, v);
                    scale_line<L>(scales, values);
                    use(unit * 4 + line, values);
                }
            }
        }
    }
}

// Calls use(line, strips) for the 16 lines of a block, in order.
template <Layout L, class Use>
OCTAVO_FORCED void each_line(const uint8_t* group, size_t block, const float* table, const Use& use) {
#if defined(__AVX512BF16__)
    if constexpr (L.bits == 16) {
        for (size_t line = 0; line < kBlockLines; ++line) {
            const Strip strip = load_strip(group + L.payload_at(block) + line * kLineBytes);
            use(line, &strip);
        }
        return;
    }
#endif
    each_values<L>(group, block, table, [&](size_t line, const Floats* values) OCTAVO_INLINE_LAMBDA {
        Strip strips[kStrips];
        if constexpr (L.bits == 16 && kStrips == kVectors)
            std::memcpy(strips, values, sizeof strips);
        else
            to_strips(values, strips);
        use(line, strips);
    });
}

// Asks for scales that a block needs, so many bytes ahead. Inlined by force: gcc drops calls of functions that only
// prefetch.
template <Layout L>
OCTAVO_FORCED void fetch_scales(const uint8_t* group, size_t block, size_t ahead) {
    if (block % L.period() != 0) return;
    const uint8_t* at = group + L.header_at(block) + ahead;
    for (size_t i = 0; i < L.header_bytes(); i += 64) __builtin_prefetch(at + i, 0, kFetchTo);
}

// The same for the values of a line, where they begin a line of the cache.
template <Layout L>
OCTAVO_FORCED void fetch_line(const uint8_t* group, size_t block, size_t line, size_t ahead) {
    const size_t at = line * L.payload_bytes() / kBlockLines;
    if (at % 64 == 0) __builtin_prefetch(group + L.payload_at(block) + at + ahead, 0, kFetchTo);
}

template <Layout L>
OCTAVO_FORCED void fetch(const uint8_t* group, size_t block, size_t ahead) {
    for (size_t line = 0; line < kBlockLines; ++line) fetch_line<L>(group, block, line, ahead);
    fetch_scales<L>(group, block, ahead);
}

// Decodes blocks of a group into kLineBytes a line, and asks for the same blocks of the group `ahead` bytes later.
template <Layout L>
void decode(const Part& part, size_t group, size_t first_block, size_t last_block, size_t ahead, uint8_t* out) {
    const uint8_t* data = part.data + group * part.group_bytes;
    for (size_t block = first_block; block < last_block; ++block) {
        fetch<L>(data, block, ahead);
        each_line<L>(data, block, part.table, [&](size_t line, const Strip* strips) OCTAVO_INLINE_LAMBDA {
            for (size_t s = 0; s < kStrips; ++s) store_strip(out + line * kLineBytes + s * kStripBytes, strips[s]);
        });
        out += kBlockLines * kLineBytes;
    }
}

using Decode = void (*)(const Part&, size_t group, size_t first_block, size_t last_block, size_t ahead, uint8_t* out);

constexpr Decode kDecode[] = {decode<kLayouts[0]>, decode<kLayouts[1]>, decode<kLayouts[2]>, decode<kLayouts[3]>,
                              decode<kLayouts[4]>, decode<kLayouts[5]>, decode<kLayouts[6]>, decode<kLayouts[7]>,
                              decode<kLayouts[8]>, decode<kLayouts[9]>, decode<kLayouts[10]>, decode<kLayouts[11]>};
static_assert(sizeof kDecode / sizeof *kDecode == kNumLayouts);

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
