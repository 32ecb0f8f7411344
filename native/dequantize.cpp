// The block formats of GGUF, as its specification lays them out (ggml, "GGUF" and k-quants, 2023).
//
// Every value is computed with the float32 roundings of the gguf package's own dequantiser, so that both agree bit for
// bit: the products of scale and quantum are exact, the sum with a minimum is rounded once.
#include "dequantize.h"

#include <cstring>

#include "stores.h"

namespace octavo {
namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Without a branch that would stop vectorising: normal numbers are re-biased by the shift, subnormal ones by a float
// subtraction.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = uint32_t(half & 0x7fffu) << 13;
    const uint32_t exponent = rest & 0x0f800000u;
    const uint32_t special = exponent == 0x0f800000u ? 0x38000000u : 0;  // infinity and NaN
    const uint32_t normal = rest + 0x38000000u + special;
    float subnormal = from_bits(rest + 0x38800000u) - from_bits(0x38800000u);
    uint32_t bits;
    std::memcpy(&bits, &subnormal, sizeof bits);
    return from_bits((exponent == 0 ? bits : normal) | sign);
}

inline uint16_t half_bits(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    return half;
}

inline float half_at(const uint8_t* p) { return half_to_float(half_bits(p)); }

void widen_f32(const uint8_t* p, size_t n, float* out) { std::memcpy(out, p, n * sizeof(float)); }

void widen_f16(const uint8_t* p, size_t n, float* out) {
    for (size_t i = 0; i < n; ++i) out[i] = half_at(p + 2 * i);
}

void widen_bf16(const uint8_t* p, size_t n, float* out) {
    for (size_t i = 0; i < n; ++i) {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * i, sizeof bits);
        out[i] = from_bits(uint32_t(bits) << 16);
    }
}

// Nibbles of 16 bytes: the low ones are the first 16 values.
inline void nibbles(const uint8_t* p, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) codes[i] = p[i] & 15;
    for (int i = 0; i < 16; ++i) codes[i + 16] = p[i] >> 4;
}

// Half d, 16 bytes of nibbles.
void split_q4_0(const uint8_t* p, Quanta& q) {
    q.half_scale = half_bits(p);
    nibbles(p + 2, q.codes);
}

// As Q4_0 with a minimum: half d, half m.
void split_q4_1(const uint8_t* p, Quanta& q) {
    q.half_scale = half_bits(p);
    q.half_minimum = half_bits(p + 2);
    nibbles(p + 4, q.codes);
}

// A fifth bit for each of 32 nibbles, in 4 bytes before them.
inline void five_bits(const uint8_t* p, int offset, uint8_t* codes) {
    uint32_t high;
    std::memcpy(&high, p, sizeof high);
    nibbles(p + 4, codes);
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>((codes[i] | (high >> i & 1) << 4) - offset);
}

void split_q5_0(const uint8_t* p, Quanta& q) {
    q.half_scale = half_bits(p);
    five_bits(p + 2, 16, q.codes);
}

void split_q5_1(const uint8_t* p, Quanta& q) {
    q.half_scale = half_bits(p);
    q.half_minimum = half_bits(p + 2);
    five_bits(p + 4, 0, q.codes);
}

void split_q8_0(const uint8_t* p, Quanta& q) {
    q.half_scale = half_bits(p);
    std::memcpy(q.codes, p + 2, 32);
}

// 256 values in 16 groups: 16 bytes (scale low, minimum high nibble), 64 bytes of 2-bit values, half d, half dmin.
void split_q2_k(const uint8_t* p, Quanta& out) {
    out.scale = half_at(p + 80);
    out.minimum = -half_at(p + 82);
    for (int group = 0; group < 16; ++group) {
        out.scale_codes[group] = p[group] & 15;
        out.minimum_codes[group] = p[group] >> 4;
        const uint8_t* q = p + 16 + group / 8 * 32 + group % 2 * 16;
        const int shift = group / 2 % 4 * 2;
        for (int i = 0; i < 16; ++i) out.codes[group * 16 + i] = q[i] >> shift & 3;
    }
}

// 256 values in 16 groups: 32 bytes of high bits, 64 bytes of 2 low bits, 12 bytes of 6-bit scales, half d.
void split_q3_k(const uint8_t* p, Quanta& out) {
    const uint8_t *high = p, *quanta = p + 32, *scales = p + 96;
    out.scale = half_at(p + 108);
    for (int group = 0; group < 16; ++group) {
        const int low4 = scales[group % 8] >> (group / 8 * 4) & 15;
        const int high2 = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        out.scale_codes[group] = static_cast<int8_t>((low4 | high2 << 4) - 32);
        const uint8_t* q = quanta + group / 8 * 32 + group % 2 * 16;
        const uint8_t* h = high + group % 2 * 16;
        const int shift = group / 2 % 4 * 2, bit = group / 2;
        for (int i = 0; i < 16; ++i) out.codes[group * 16 + i] = (q[i] >> shift & 3) | (h[i] >> bit & 1) << 2;
    }
}

// The 8 six-bit scales and minima that Q4_K and Q5_K keep in 12 bytes.
inline void scale_and_min(const uint8_t* s, int group, int& scale, int& minimum) {
    if (group < 4) {
        scale = s[group] & 63;
        minimum = s[group + 4] & 63;
    } else {
        scale = (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
        minimum = (s[group + 4] >> 4) | (s[group] >> 6) << 4;
    }
}

// What Q4_K and Q5_K share: half d, half dmin, 12 bytes of scales and minima of 8 groups.
inline void split_scales(const uint8_t* p, Quanta& out) {
    out.scale = half_at(p);
    out.minimum = -half_at(p + 2);
    for (int group = 0; group < 8; ++group) {
        int scale, minimum;
        scale_and_min(p + 4, group, scale, minimum);
        out.scale_codes[group] = static_cast<int8_t>(scale);
        out.minimum_codes[group] = static_cast<int8_t>(minimum);
    }
}

// 256 values in 8 groups: scales, 128 bytes of nibbles.
void split_q4_k(const uint8_t* p, Quanta& out) {
    split_scales(p, out);
    for (int group = 0; group < 8; ++group) {
        const uint8_t* q = p + 16 + group / 2 * 32;
        const int shift = group % 2 * 4;
        for (int i = 0; i < 32; ++i) out.codes[group * 32 + i] = q[i] >> shift & 15;
    }
}

// Q4_K with a fifth bit for each value in 32 more bytes.
void split_q5_k(const uint8_t* p, Quanta& out) {
    split_scales(p, out);
    const uint8_t* high = p + 16;
    for (int group = 0; group < 8; ++group) {
        const uint8_t* q = p + 48 + group / 2 * 32;
        const int shift = group % 2 * 4;
        for (int i = 0; i < 32; ++i)
            out.codes[group * 32 + i] = static_cast<uint8_t>((q[i] >> shift & 15) | (high[i] >> group & 1) << 4);
    }
}

// 256 values in 16 groups: 128 bytes of low nibbles, 64 bytes of 2 high bits, 16 signed scales, half d.
void split_q6_k(const uint8_t* p, Quanta& out) {
    const uint8_t *low = p, *high = p + 128;
    std::memcpy(out.scale_codes, p + 192, 16);
    out.scale = half_at(p + 208);
    for (int group = 0; group < 16; ++group) {
        const int half = group / 8, quarter = group / 2 % 4, column = group % 2 * 16;
        const uint8_t* l = low + half * 64 + quarter % 2 * 32 + column;
        const uint8_t* h = high + half * 32 + column;
        const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
        for (int i = 0; i < 16; ++i) {
            const int value = (l[i] >> low_shift & 15) | (h[i] >> high_shift & 3) << 4;
            out.codes[group * 16 + i] = static_cast<uint8_t>(value - 32);
        }
    }
}

// 256 values in 8 groups: half d, 2 bytes of 2 high and 4 bytes of 4 low scale bits, 128 bytes of nibbles.
void split_iq4_xs(const uint8_t* p, Quanta& out) {
    out.scale = half_at(p);
    const int high = half_bits(p + 2);
    for (int group = 0; group < 8; ++group) {
        const int low = p[4 + group / 2] >> group % 2 * 4 & 15;
        out.scale_codes[group] = static_cast<int8_t>((low | (high >> 2 * group & 3) << 4) - 32);
        nibbles(p + 8 + group * 16, out.codes + group * 32);
    }
}

// IQ2_XXS after its grid and signs are looked up (octavo/runtime/native/codes.py): half d, 8 bytes of scales,
// 128 bytes of nibbles, the first value in the low one.
void split_iq2_codes(const uint8_t* p, Quanta& out) {
    out.scale = half_at(p) * 0.125f;
    std::memcpy(out.scale_codes, p + 2, 8);
    for (int i = 0; i < 128; ++i) {
        out.codes[2 * i] = p[10 + i] & 15;
        out.codes[2 * i + 1] = p[10 + i] >> 4;
    }
}

constexpr float kUnsigned[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr float kMinusEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float kMinusFour[16] = {-4, -3, -2, -1, 0, 1, 2, 3};
constexpr float kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

constexpr float kGrid[16] = {8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43};

constexpr size_t kBFloat16 = find_layout(16, false, false, 32);
constexpr size_t k4Half = find_layout(4, true, false, 32, -8), k4HalfMin = find_layout(4, true, true, 32, 0);
constexpr size_t k4HalfTable = find_layout(4, true, false, 32), k4CodeTable = find_layout(4, false, false, 32);
constexpr size_t k4CodeMin = find_layout(4, false, true, 32, 0), k4CodeMin16 = find_layout(4, false, true, 16, 0);
constexpr size_t k4Code16 = find_layout(4, false, false, 16, -4);
constexpr size_t k8Half = find_layout(8, true, false, 32), k8HalfMin = find_layout(8, true, true, 32);
constexpr size_t k8CodeMin = find_layout(8, false, true, 32), k8Code16 = find_layout(8, false, false, 16);

constexpr StoredType kTypes[] = {
    {"F32", 1, 4, kBFloat16, nullptr, widen_f32, nullptr},
    {"F16", 1, 2, kBFloat16, nullptr, widen_f16, nullptr},
    {"BF16", 1, 2, kBFloat16, nullptr, widen_bf16, nullptr},
    {"Q4_0", 32, 18, k4Half, kMinusEight, nullptr, split_q4_0},
    {"Q4_1", 32, 20, k4HalfMin, kUnsigned, nullptr, split_q4_1},
    {"IQ4_NL", 32, 18, k4HalfTable, kNonLinear, nullptr, split_q4_0},
    {"Q5_0", 32, 22, k8Half, nullptr, nullptr, split_q5_0},
    {"Q5_1", 32, 24, k8HalfMin, nullptr, nullptr, split_q5_1},
    {"Q8_0", 32, 34, k8Half, nullptr, nullptr, split_q8_0},
    {"Q2_K", 256, 84, k4CodeMin16, kUnsigned, nullptr, split_q2_k},
    {"Q3_K", 256, 110, k4Code16, kMinusFour, nullptr, split_q3_k},
    {"Q4_K", 256, 144, k4CodeMin, kUnsigned, nullptr, split_q4_k},
    {"IQ4_XS", 256, 136, k4CodeTable, kNonLinear, nullptr, split_iq4_xs},
    {"IQ2_XXS_CODES", 256, 138, k4CodeTable, kGrid, nullptr, split_iq2_codes},
    {"Q5_K", 256, 176, k8CodeMin, nullptr, nullptr, split_q5_k},
    {"Q6_K", 256, 210, k8Code16, nullptr, nullptr, split_q6_k},
};

constexpr StoredType kInt8 = {"INT8", 1, 0, kInt8Layout, nullptr, nullptr, nullptr};

// The quanta of one step as float32.
inline void expand(const float* table, const uint8_t* codes, size_t count, float scale, float* out) {
    if (table != nullptr)
        for (size_t i = 0; i < count; ++i) out[i] = scale * table[codes[i]];
    else
        for (size_t i = 0; i < count; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(codes[i]));
}

}  // namespace

const StoredType* find_stored_type(const char* name) {
    for (const StoredType& type : kTypes)
        if (std::strcmp(type.name, name) == 0) return &type;
    return nullptr;
}

const StoredType* find_store(const char* name) {
    return std::strcmp(name, kInt8.name) == 0 ? &kInt8 : find_stored_type(name);
}

void dequantize(const StoredType& type, const uint8_t* blocks, size_t count, float* out) {
    if (type.widen != nullptr) return type.widen(blocks, count, out);
    const Layout& layout = layout_of(type);
    Quanta quanta;
    for (size_t done = 0; done < count; done += type.block_values, blocks += type.block_bytes) {
        type.split(blocks, quanta);
        const size_t step = layout.step;
        for (size_t i = 0; i * step < type.block_values; ++i) {
            const float scale = layout.halves ? half_to_float(quanta.half_scale)
                                              : quanta.scale * static_cast<float>(quanta.scale_codes[i]);
            float* values = out + done + i * step;
            expand(type.table, quanta.codes + i * step, step, scale, values);
            if (!layout.minimum) continue;
            const float minimum = layout.halves ? half_to_float(quanta.half_minimum)
                                                : quanta.minimum * static_cast<float>(quanta.minimum_codes[i]);
            for (size_t k = 0; k < step; ++k) values[k] += minimum;
        }
    }
}

float from_half(uint16_t half) { return half_to_float(half); }

void to_bfloat16(const float* values, size_t count, uint16_t* out) {
    for (size_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        out[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
    }
}

}  // namespace octavo
