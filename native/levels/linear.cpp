// Linear with float32 weights: dot products of activation rows with weight rows, register-blocked, and the epilogue.
//
// One order of summation everywhere: lane l adds x[i] * w[i] for i = l, l + kLanes, ... by fma, then the lanes are
// summed by halving. A tile of rows and channels only interleaves such chains.
#include "epilogue.h"
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

// Weight rows read together: few activation rows need more of them to hide the latency of their chains.
template <size_t ROWS>
constexpr size_t kTogether = ROWS > 2 ? 4 : (kLanes == 16 ? 16 : 8) / ROWS;
constexpr size_t kMaxRows = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;  // activation rows of a tile: what the registers hold

// totals[r][column + c] = the lanes of dot(x row r, w[c]) for kTogether weight rows. STREAM: the weights come from
// memory, so those of the next tile, which follow, are asked for while these are used.
template <size_t ROWS, bool STREAM>
inline void dot_tile(const float* x, const float* const* w, size_t depth, size_t column, Floats (*totals)[kChannels]) {
    constexpr size_t width = kTogether<ROWS>;
    constexpr size_t bytes = width * kLanes * sizeof(float);  // of weights in a turn
    const char* next = reinterpret_cast<const char*>(w[0] + width * depth);
    Floats total[ROWS][width] = {};
    size_t i = 0;
    for (; i + kLanes <= depth; i += kLanes) {
        if constexpr (STREAM) {
            for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line, 0, 3);
            next += bytes;
        }
        Floats weights[width];
        for (size_t c = 0; c < width; ++c) weights[c] = load(w[c] + i);
        for (size_t r = 0; r < ROWS; ++r) {
            const Floats values = load(x + r * depth + i);
            for (size_t c = 0; c < width; ++c) total[r][c] = fma(values, weights[c], total[r][c]);
        }
    }
    if (i < depth) {
        Floats weights[width];
        for (size_t c = 0; c < width; ++c) weights[c] = load_part(w[c] + i, depth - i);
        for (size_t r = 0; r < ROWS; ++r) {
            const Floats values = load_part(x + r * depth + i, depth - i);
            for (size_t c = 0; c < width; ++c) total[r][c] = fma(values, weights[c], total[r][c]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t c = 0; c < width; ++c) totals[r][column + c] = total[r][c];
}

// out[r][c] for `count` <= kChannels weight rows that follow each other.
template <size_t ROWS, bool STREAM>
inline void dot_channels(const float* x, const float* w, size_t depth, size_t count, float (*out)[kChannels]) {
    constexpr size_t width = kTogether<ROWS>;
    Floats totals[ROWS][kChannels] = {};
    for (size_t c = 0; c < count; c += width) {
        const float* rows[width];
        for (size_t i = 0; i < width; ++i) rows[i] = w + (c + i < count ? c + i : count - 1) * depth;
        dot_tile<ROWS, STREAM>(x, rows, depth, c, totals);
    }
    for (size_t r = 0; r < ROWS; ++r) sum_each(totals[r], out[r]);
}

template <size_t ROWS, bool STREAM>
inline void tile(const LinearArgs& a, const float* gate, const float* up, size_t row, size_t channel, size_t count) {
    const float* x = a.x + row * a.depth;
    float sums[ROWS][kChannels] = {}, ups[ROWS][kChannels] = {};
    dot_channels<ROWS, STREAM>(x, gate, a.depth, count, sums);
    if (up != nullptr) dot_channels<ROWS, STREAM>(x, up, a.depth, count, ups);
    for (size_t r = 0; r < ROWS; ++r)
        finish(a.epilogue, sums[r], up ? ups[r] : nullptr, row + r, channel, count);
}

void all_rows(const LinearArgs& a, size_t channel, size_t count) {
    const float* gate = a.weight + channel * a.depth;
    const float* up = gated(a.epilogue.activation) ? gate + a.epilogue.channels * a.depth : nullptr;
    size_t row = 0;
    for (; row + kMaxRows <= a.num_rows; row += kMaxRows) {
        if (row == 0)
            tile<kMaxRows, true>(a, gate, up, row, channel, count);
        else  // the first rows brought the weights into the cache
            tile<kMaxRows, false>(a, gate, up, row, channel, count);
    }
    switch (a.num_rows - row) {
        case 1: return tile<1, true>(a, gate, up, row, channel, count);
        case 2: return tile<2, true>(a, gate, up, row, channel, count);
        case 3: return tile<3, true>(a, gate, up, row, channel, count);
    }
}

}  // namespace

void linear(const LinearArgs& a, size_t first_channel, size_t last_channel) {
    for (size_t channel = first_channel; channel < last_channel; channel += kChannels) {
        const size_t count = last_channel - channel < kChannels ? last_channel - channel : kChannels;
        all_rows(a, channel, count);
    }
}

}  // namespace octavo::OCTAVO_LEVEL
