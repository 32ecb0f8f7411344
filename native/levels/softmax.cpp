// Passes over a whole vocabulary for the sampler.
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kDoubles = kLanes / 2;
typedef float Narrow __attribute__((vector_size(kDoubles * 4)));
typedef double Doubles __attribute__((vector_size(kDoubles * 8)));
typedef uint64_t Bits __attribute__((vector_size(kDoubles * 8)));

inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
    return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

inline Doubles all(double value) { return Doubles{} + value; }

// e^x for x <= 0 within 2 ulp, 0 below -708: range reduction by ln 2 in two parts, then Taylor's polynomial, whose
// remainder at ln(2) / 2 lies below the rounding.
inline Doubles exp(Doubles x) {
    constexpr double inverse_factorials[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                             1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                             1.0 / 24,        1.0 / 6,        0.5,           1.0,
                                             1.0};
    constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
    const Doubles shifted = fma(x, all(1.4426950408889634), all(shift));
    const Doubles n = shifted - shift;
    const Doubles r = fma(n, all(-1.42860682030941723212e-6), fma(n, all(-0.693145751953125), x));
    Doubles p = all(1.0 / 6227020800);
    for (const double factor : inverse_factorials) p = fma(p, r, all(factor));
    const Doubles power = (Doubles)(((Bits)shifted << 52) + (uint64_t{1023} << 52));
    return x < -708.0 ? Doubles{} : p * power;
}

}  // namespace

void chunk_maxima(const float* values, size_t count, float* maxima) {
    const Floats never = splat(-__builtin_inff());
    size_t i = 0;
    for (; i + kLogitsChunk <= count; i += kLogitsChunk) {
        Floats top = never;
        for (size_t lane = 0; lane < kLogitsChunk; lane += kLanes) top = max(load(values + i + lane), top);
        *maxima++ = max_lane(top);
    }
    if (i == count) return;
    float last = -__builtin_inff();
    for (; i < count; ++i) last = values[i] > last ? values[i] : last;
    *maxima = last;
}

void sum_exp(const float* values, size_t count, const float* maxima, float top, float temperature, double* sums) {
    for (size_t first = 0; first < count; first += kLogitsChunk, ++maxima, ++sums) {
        *sums = 0.0;
        if ((*maxima - top) / temperature < kNegligible) continue;
        float last[kLogitsChunk];
        const float* chunk = values + first;
        if (count - first < kLogitsChunk) {
            for (size_t i = 0; i < kLogitsChunk; ++i) last[i] = first + i < count ? chunk[i] : -__builtin_inff();
            chunk = last;
        }
        Doubles total{};
        for (size_t i = 0; i < kLogitsChunk; i += kDoubles) {
            Narrow part;
            std::memcpy(&part, chunk + i, sizeof part);
            total += exp(__builtin_convertvector((part - top) / temperature, Doubles));
        }
        for (size_t lane = 0; lane < kDoubles; ++lane) *sums += total[lane];
    }
}

}  // namespace octavo::OCTAVO_LEVEL
