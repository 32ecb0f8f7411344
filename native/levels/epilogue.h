// What a Linear does with its sums: scale, bias, activation, soft cap.
#pragma once

#include <cmath>

#include "../abi.h"
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

inline Floats gelu(Floats x) {
    float values[kLanes];
    store(values, x * 0.70710678118654752f);
    for (float& value : values) value = erff(value);
    return 0.5f * x * (1.0f + load(values));
}

inline Floats gelu_tanh(Floats x) {
    return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// x[i] = silu(x[i]), step after step for all.
template <size_t N>
OCTAVO_FORCED void silu_each(Floats* x) {
    Floats powers[N];  // e^-x
#if defined(__AVX512F__)
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) powers[i] = at_most(x[i] * -1.44269504088896341f, 126.0f);
    powers_of_two<N>(powers);
#else
    for (size_t i = 0; i < N; ++i) powers[i] = -x[i];
    exp_each<N>(powers);
#endif
#pragma GCC unroll 8
    for (size_t i = 0; i < N; ++i) x[i] *= reciprocal(1.0f + powers[i]);
}

inline Floats silu(Floats x) {
    silu_each<1>(&x);
    return x;
}

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
inline Floats affine(const Epilogue& a, const float* sums, const float* bias, size_t count) {
    Floats v = load(sums);
    if (a.scale != 1.0f) v *= a.scale;
    if (bias != nullptr) v += load_part(bias, count);
    return v;
}

// `count` <= kChannels outputs of one row from `channel` on; `ups` null unless the activation is gated.
inline void finish(const Epilogue& a, const float* sums, const float* ups, size_t row, size_t channel, size_t count) {
    float* out = a.out + row * a.channels + channel;
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

// What a Linear's sums go through, decided once for all of them.
enum class Finish { kPlain, kSiluMul, kAny };

inline Finish finish_of(const Epilogue& a) {
    if (a.scale != 1.0f || a.bias != nullptr || a.softcap != 0.0f) return Finish::kAny;
    return a.activation == OCTAVO_SILU_MUL ? Finish::kSiluMul : a.activation == 0 ? Finish::kPlain : Finish::kAny;
}

// The outputs of one group of a part, for one row.
inline void finish_group(const PackedArgs& a, const Part& part, size_t group, size_t row, const float* sums,
                         const float* ups) {
    const size_t channel = group * kChannels, left = part.channels - channel;
    finish(a.epilogue, sums, ups, row, part.first_channel + channel, left < kChannels ? left : kChannels);
}

// The outputs of `count` groups of a part, for any rows. `up`: its counterpart, or null.
struct Outputs {
    const PackedArgs& a;
    const Part &part, *up;
    size_t group, count;
    Finish how;  // kAny also where the last group is not whole

    Outputs(const PackedArgs& args, const Part& p, const Part* ups, size_t first, size_t groups)
        : a(args), part(p), up(ups), group(first), count(groups),
          how((first + groups) * kChannels <= p.channels ? finish_of(args.epilogue) : Finish::kAny) {}

    float* at(size_t row, size_t g) const {
        return a.epilogue.out + row * a.epilogue.channels + part.first_channel + (group + g) * kChannels;
    }
    // To be called while their sums are made, or each waits for its line.
    OCTAVO_FORCED void fetch(size_t row, size_t rows) const {
        for (size_t r = 0; r < rows; ++r)
            for (size_t g = 0; g < count; ++g) __builtin_prefetch(at(row + r, g), 1);
    }
    OCTAVO_FORCED void finish(size_t row, size_t g, const float* sums, const float* ups) const {
        if (how == Finish::kAny) return finish_group(a, part, group + g, row, sums, up != nullptr ? ups : nullptr);
        float* out = at(row, g);
        for (size_t c = 0; c < kChannels; c += kLanes) {
            const Floats v = load(sums + c);
            store(out + c, how == Finish::kSiluMul ? silu(v) * load(ups + c) : v);
        }
    }
};

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
