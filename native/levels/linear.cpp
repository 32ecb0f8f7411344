// Linear: dot products of activation rows with weight rows, register-blocked, and the epilogue.
//
// One order of summation everywhere: lane l adds x[i] * w[i] for i = l, l + kLanes, ... by fma, then the lanes are
// summed by halving. A tile of rows and channels only interleaves such chains.
#include <cmath>

#include "../abi.h"
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

// Weight rows read together: few activation rows need more of them to hide the latency of their chains.
template <size_t ROWS>
constexpr size_t kTogether = ROWS > 2 ? 4 : (kLanes == 16 ? 16 : 8) / ROWS;
constexpr size_t kMaxRows = kLanes == 16 ? 4 : 2;  // activation rows of a tile: what the registers hold

// totals[r][column + c] = the lanes of dot(x row r, w[c]) for kTogether weight rows. STREAM: the weights come from
// memory, so those of the next tile, which follow, are asked for while these are used.
template <size_t ROWS, bool STREAM, class W>
inline void dot_tile(const float* x, const W* const* w, size_t depth, size_t column, Floats (*totals)[kChannels]) {
    constexpr size_t width = kTogether<ROWS>;
    constexpr size_t bytes = width * kLanes * sizeof(W);  // of weights in a turn
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
template <size_t ROWS, bool STREAM, class W>
inline void dot_channels(const float* x, const W* w, size_t depth, size_t count, float (*out)[kChannels]) {
    constexpr size_t width = kTogether<ROWS>;
    Floats totals[ROWS][kChannels] = {};
    for (size_t c = 0; c < count; c += width) {
        const W* rows[width];
        for (size_t i = 0; i < width; ++i) rows[i] = w + (c + i < count ? c + i : count - 1) * depth;
        dot_tile<ROWS, STREAM>(x, rows, depth, c, totals);
    }
    for (size_t r = 0; r < ROWS; ++r) sum_each(totals[r], out[r]);
}

inline Floats gelu(Floats x) {
    float values[kLanes];
    store(values, x * 0.70710678118654752f);
    for (float& value : values) value = erff(value);
    return 0.5f * x * (1.0f + load(values));
}

inline Floats gelu_tanh(Floats x) {
    return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

inline Floats activate(int activation, Floats x, Floats up) {
    switch (activation) {
        case OCTAVO_RELU: return x > 0.0f ? x : Floats{};
        case OCTAVO_GELU: return gelu(x);
        case OCTAVO_GELU_TANH: return gelu_tanh(x);
        case OCTAVO_SILU_MUL: return silu(x) * up;
        case OCTAVO_GELU_TANH_MUL: return gelu_tanh(x) * up;
        default: return x;
    }
}

inline bool gated(int activation) { return activation == OCTAVO_SILU_MUL || activation == OCTAVO_GELU_TANH_MUL; }

// scale and bias of kLanes channels from a row of sums.
inline Floats affine(const LinearArgs& a, const float* sums, const float* bias, size_t count) {
    Floats v = load(sums);
    if (a.scale != 1.0f) v *= a.scale;
    if (bias != nullptr) v += load_part(bias, count);
    return v;
}

inline void finish(const LinearArgs& a, float* sums, float* ups, size_t channel, size_t count, float* out) {
    for (size_t c = 0; c < count; c += kLanes) {
        const size_t n = count - c < kLanes ? count - c : kLanes;
        Floats v = affine(a, sums + c, a.bias ? a.bias + channel + c : nullptr, n);
        Floats up{};
        if (ups != nullptr) up = affine(a, ups + c, a.bias ? a.bias + a.channels + channel + c : nullptr, n);
        v = activate(a.activation, v, up);
        if (a.softcap != 0.0f) v = a.softcap * tanh(v / a.softcap);
        store_part(out + c, v, n);
    }
}

template <size_t ROWS, bool STREAM, class W>
inline void tile(const LinearArgs& a, const W* gate, const W* up, size_t row, size_t channel, size_t count) {
    const float* x = a.x + row * a.depth;
    float sums[ROWS][kChannels] = {}, ups[ROWS][kChannels] = {};
    dot_channels<ROWS, STREAM>(x, gate, a.depth, count, sums);
    if (up != nullptr) dot_channels<ROWS, STREAM>(x, up, a.depth, count, ups);
    for (size_t r = 0; r < ROWS; ++r)
        finish(a, sums[r], up ? ups[r] : nullptr, channel, count, a.out + (row + r) * a.channels + channel);
}

template <class W>
void all_rows(const LinearArgs& a, size_t channel, size_t count) {
    const W* gate = static_cast<const W*>(a.weight) + channel * a.depth;
    const W* up = gated(a.activation) ? gate + a.channels * a.depth : nullptr;
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
        if (a.bfloat16)
            all_rows<uint16_t>(a, channel, count);
        else
            all_rows<float>(a, channel, count);
    }
}

}  // namespace octavo::OCTAVO_LEVEL
