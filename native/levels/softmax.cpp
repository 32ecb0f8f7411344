// Passes over a whole vocabulary for the sampler.
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kDoubles = kLanes / 2;
typedef float Narrow __attribute__((vector_size(kDoubles * 4)));
typedef double Doubles __attribute__((vector_size(kDoubles * 8)));
typedef uint64_t Bits __attribute__((vector_size(kDoubles * 8)));

// e^x for x <= 0 within 2 ulp, 0 below -708: range reduction by ln 2 in two parts, then Taylor's polynomial, whose
// remainder at ln(2) / 2 lies below the rounding.
inline Doubles exp(Doubles x) {
    constexpr double inverse_factorials[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                             1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                             1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
    constexpr double shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
    const Doubles shifted = x * 1.4426950408889634 + shift;
    const Doubles n = shifted - shift;
    const Doubles r = x - n * 0.693145751953125 - n * 1.42860682030941723212e-6;
    Doubles p = Doubles{};
    for (const double factor : inverse_factorials) p = p * r + factor;
    const Doubles y = p * r * r + r + 1.0;
    const Doubles power = (Doubles)(((Bits)shifted << 52) + (uint64_t{1023} << 52));
    return x < -708.0 ? Doubles{} : y * power;
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

double sum_exp(const float* values, size_t count, float top, float temperature) {
    Doubles total{};
    size_t i = 0;
    for (; i + kDoubles <= count; i += kDoubles) {
        Narrow part;
        std::memcpy(&part, values + i, sizeof part);
        total += exp(__builtin_convertvector((part - top) / temperature, Doubles));
    }
    if (i < count) {
        Narrow part = Narrow{} - __builtin_inff();
        std::memcpy(&part, values + i, (count - i) * sizeof(float));
        total += exp(__builtin_convertvector((part - top) / temperature, Doubles));
    }
    double sum = 0.0;
    for (size_t lane = 0; lane < kDoubles; ++lane) sum += total[lane];
    return sum;
}

}  // namespace octavo::OCTAVO_LEVEL
