// The vector type of a level, and the few operations that need an instruction's name.
//
// Files under levels/ are compiled with wider instructions than the machine may have. Nothing here may instantiate a
// shared inline function (no standard containers or algorithms): the linker could hand it to the baseline code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define OCTAVO_FORCED __attribute__((always_inline)) inline
#define OCTAVO_INLINE_LAMBDA __attribute__((always_inline))

namespace octavo::OCTAVO_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr size_t kLanes = 16;
#elif defined(__AVX2__)
constexpr size_t kLanes = 8;
#else
constexpr size_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

// Not 0 + value, which must turn -0 into 0 and so adds, instead of broadcasting from memory.
inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats widen(Halves bits) {
#if defined(__AVX512F__)  // some compilers split the conversion below
    return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#elif defined(__AVX2__)
    return (Floats)((Words)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline Floats load(const uint16_t* p) {  // bfloat16
    Halves v;
    std::memcpy(&v, p, sizeof v);
    return widen(v);
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
#endif

// The first `count` <= kLanes numbers; the rest is zero.
inline Floats load_part(const float* p, size_t count) {
#if defined(__AVX512F__)  // a copy of unknown size is a call
    return (Floats)_mm512_maskz_loadu_ps(first_lanes(count), p);
#else
    if (count == kLanes) return load(p);
    Floats v{};
    std::memcpy(&v, p, count * sizeof *p);
    return v;
#endif
}

inline Floats load_part(const uint16_t* p, size_t count) {
    Halves v{};
    std::memcpy(&v, p, count * sizeof *p);
    return widen(v);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void store_part(float* p, Floats v, size_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
#else
    if (count == kLanes) return store(p, v);
    std::memcpy(p, &v, count * sizeof *p);
#endif
}

// a * b + c, rounded once where the level can; never left to the compiler, so that every kernel agrees.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The sum of the lanes, halving: lane i plus lane i + kLanes / 2, and so on.
inline float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[kLanes];
    std::memcpy(lanes, &v, sizeof v);
    for (size_t width = kLanes / 2; width > 0; width /= 2)
        for (size_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
#endif
}

// out[c] = sum(v[c]) for 16 vectors, with the same tree.
inline void sum_each(const Floats* v, float* out) {
#if defined(__AVX512F__)
    // Each level of the tree folds two vectors into one; the order of inputs undoes the order the folds leave.
    constexpr int order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    __m512 t[16];
    for (int i = 0; i < 16; ++i) t[i] = (__m512)v[order[i]];
    for (int i = 0; i < 8; ++i)
        t[i] = _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x44) + _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xee);
    for (int i = 0; i < 4; ++i)
        t[i] = _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd);
    for (int i = 0; i < 2; ++i)
        t[i] = _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44) + _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee);
    store(out, (Floats)(_mm512_shuffle_ps(t[0], t[1], 0x88) + _mm512_shuffle_ps(t[0], t[1], 0xdd)));
#else
    for (int c = 0; c < 16; ++c) out[c] = sum(v[c]);
#endif
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float max_lane(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float lanes[kLanes];
    std::memcpy(lanes, &v, sizeof v);
    for (size_t width = kLanes / 2; width > 0; width /= 2)
        for (size_t i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
#endif
}

// out[i] = the largest lane of v[i]; nothing is NaN.
template <size_t N>
inline void max_each(const Floats* v, float* out) {
#if defined(__AVX512F__)
    if constexpr (N == 4) {  // folded together, a fourth of the steps
        const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
        const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
        __m512 all = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        all = _mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
        all = _mm512_max_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
        _mm_storeu_ps(out, _mm512_castps512_ps128(all));
        return;
    }
#endif
    for (size_t i = 0; i < N; ++i) out[i] = max_lane(v[i]);
}

// Where x < bound, or x > bound, the bound; NaN stays.
inline Floats at_least(Floats x, float bound) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#else
    return x < bound ? splat(bound) : x;
#endif
}
inline Floats at_most(Floats x, float bound) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#else
    return x > bound ? splat(bound) : x;
#endif
}

// x[i] = e^x[i] within 2 ulp; 0 below -104 (-87.3 without AVX-512), capped above 88.3. Range reduction by ln 2 in two parts
// and a polynomial of degree 5 (the classic one of the Cephes library, Moshier 1989). Step after step for all N: one
// after the other, what waits for its own latency fills the scheduler.
template <size_t N>
OCTAVO_FORCED void exp_each(Floats* x) {
    constexpr float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Floats n[N], p[N];
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) {
        const Floats clamped = at_most(x[i], 88.3f);
#if defined(__AVX512F__)
        x[i] = at_least(clamped, -104.0f);  // where the result rounds to 0
        n[i] = (Floats)_mm512_roundscale_ps((__m512)(x[i] * 1.44269504088896341f), 0);
#else
        const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
        x[i] = clamped;
        n[i] = (x[i] * 1.44269504088896341f + shift) - shift;
#endif
    }
    Floats r[N];
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) r[i] = fma(n[i], splat(-0.693359375f), x[i]);
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) r[i] = fma(n[i], splat(2.12194440e-4f), r[i]);
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) p[i] = splat(1.9875691500e-4f);
#pragma GCC unroll 8
    for (const float coefficient : c)
#pragma GCC unroll 8
        for (size_t i = 0; i < N; ++i) p[i] = fma(p[i], r[i], splat(coefficient));
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) {
        const Floats y = fma(p[i], r[i] * r[i], r[i]) + 1.0f;
#if defined(__AVX512F__)
        x[i] = (Floats)_mm512_scalef_ps((__m512)y, (__m512)n[i]);
#else
        const Floats in_range = x[i] < -87.3f ? Floats{} : n[i];  // of the conversion
        const Floats power = (Floats)((__builtin_convertvector(in_range, Ints) + 127) << 23);
        x[i] = x[i] < -87.3f ? Floats{} : y * power;
#endif
    }
}

inline Floats exp(Floats x) {
    exp_each<1>(&x);
    return x;
}

// 2^x for x <= 126, within 3 ulp: 1 for 0, 0 for -infinity. A minimax polynomial of what is left beside a whole number: from 0
// to 1 of AVX-512, else from -1/2 to 1/2.
#if defined(__AVX512F__)
template <size_t N>
OCTAVO_FORCED void powers_of_two(Floats* x) {
    constexpr float c[] = {9.0170297772e-03f, 5.5799912661e-02f, 2.4016444385e-01f, 6.9315129519e-01f, 1.0f};
    Floats r[N], p[N];
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) r[i] = (Floats)_mm512_reduce_ps((__m512)x[i], 0x09);  // x - floor(x)
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) p[i] = splat(1.8671302823e-03f);
#pragma GCC unroll 8
    for (const float coefficient : c)
#pragma GCC unroll 8
        for (size_t i = 0; i < N; ++i) p[i] = fma(p[i], r[i], splat(coefficient));
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) x[i] = (Floats)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
}
#endif

inline Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
    powers_of_two<1>(&x);
    return x;
#else
    constexpr float c[] = {1.3264727313e-03f, 9.6715129912e-03f, 5.5507335812e-02f, 2.4022242427e-01f, 6.9314700365e-01f};
    const Floats kept = x < -127.0f ? splat(-127.0f) : x, shift = splat(12582912.0f);  // 1.5 * 2^23: rounds, in the low bits
    const Floats moved = kept + shift, r = kept - (moved - shift);
    Floats p = splat(c[0]);
    for (size_t i = 1; i < 5; ++i) p = fma(p, r, splat(c[i]));
    p = fma(p, r, splat(1.0f));
    return p * (Floats)(((Ints)moved << 23) + (127 << 23));
#endif
}

// 1 / x within 1 ulp or so, for 1 <= x <= 2^127.
inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
    const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
    return guess * fma(-x, guess, splat(2.0f));
#else
    return 1.0f / x;
#endif
}

// tanh within 2 ulp: odd polynomial near 0 (Cephes), else by exp.
inline Floats tanh(Floats x) {
    const Floats magnitude = x < 0.0f ? -x : x;
    const Floats z = x * x;
    Floats p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    const Floats small = fma(p * z, x, x);
    const Floats large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
    return magnitude < 0.625f ? small : (x < 0.0f ? -large : large);
}

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
