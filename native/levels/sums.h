// Sums over a row in the fixed order of lanes.
#pragma once

#include <cmath>

#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

// Sum over a row of f(x[i]).
template <class F>
inline float sum_row(const float* x, size_t width, const F& f) {
    Floats total{};
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes) total += f(load(x + i));
    if (i < width) {  // lanes past the end must add nothing, whatever f(0) is
        float part[kLanes] = {};
        store_part(part, f(load_part(x + i, width - i)), width - i);
        total += load(part);
    }
    return sum(total);
}

inline float inverse_rms(const float* x, size_t width, float eps) {
    const float squares = sum_row(x, width, [](Floats v) { return v * v; });
    return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
