// The block formats of GGUF, as its specification lays them out (ggml, "GGUF" and k-quants, 2023).
//
// Every value is computed with the float32 roundings of the gguf package's own dequantiser, so that both agree bit for
// bit: the scale product is rounded first, then the product with the quantum, then the sum.
#include "dequantize.h"

#include <cstring>

namespace octavo {
namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// IEEE half to float, exact, without a branch that would stop vectorising: normal numbers are re-biased by the shift,
// subnormal ones by a float subtraction.
inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = uint32_t(half & 0x7fffu) << 13;
    const uint32_t exponent = rest & 0x0f800000u;
    const uint32_t special = exponent == 0x0f800000u ? 0x38000000u : 0;  // infinity and NaN
    const uint32_t normal = rest + 0x38000000u + special;
    float subnormal = from_bits(rest + 0x38800000u) - from_bits(0x38800000u);
    uint32_t bits;
    std::memcpy(&bits, &subnormal, sizeof bits);
    return from_bits((exponent == 0 ? bits : normal) | sign);
}

inline float half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, sizeof half);
    return from_half(half);
}

void decode_f32(const uint8_t* p, size_t n, float* out) { std::memcpy(out, p, n * sizeof(float)); }

void decode_f16(const uint8_t* p, size_t n, float* out) {
    for (size_t i = 0; i < n; ++i) out[i] = half_at(p + 2 * i);
}

void decode_bf16(const uint8_t* p, size_t n, float* out) {
    for (size_t i = 0; i < n; ++i) {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * i, sizeof bits);
        out[i] = from_bits(uint32_t(bits) << 16);
    }
}

// 32 values: half d, 16 bytes of nibbles (low nibbles are the first 16 values).
void decode_q4_0(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 18, out += 32) {
        const float d = half_at(p);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * static_cast<float>((p[2 + i] & 15) - 8);
            out[i + 16] = d * static_cast<float>((p[2 + i] >> 4) - 8);
        }
    }
}

// As Q4_0 with a minimum: half d, half m.
void decode_q4_1(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 20, out += 32) {
        const float d = half_at(p), m = half_at(p + 2);
        for (int i = 0; i < 16; ++i) {
            out[i] = d * static_cast<float>(p[4 + i] & 15) + m;
            out[i + 16] = d * static_cast<float>(p[4 + i] >> 4) + m;
        }
    }
}

// Q4_0 and Q4_1 with a fifth bit for each value in 4 more bytes.
void decode_q5_0(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 22, out += 32) {
        const float d = half_at(p);
        uint32_t high;
        std::memcpy(&high, p + 2, sizeof high);
        for (int i = 0; i < 16; ++i) {
            const int low = (p[6 + i] & 15) | int(high >> i & 1) << 4;
            const int top = (p[6 + i] >> 4) | int(high >> (i + 16) & 1) << 4;
            out[i] = d * static_cast<float>(low - 16);
            out[i + 16] = d * static_cast<float>(top - 16);
        }
    }
}

void decode_q5_1(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 24, out += 32) {
        const float d = half_at(p), m = half_at(p + 2);
        uint32_t high;
        std::memcpy(&high, p + 4, sizeof high);
        for (int i = 0; i < 16; ++i) {
            const int low = (p[8 + i] & 15) | int(high >> i & 1) << 4;
            const int top = (p[8 + i] >> 4) | int(high >> (i + 16) & 1) << 4;
            out[i] = d * static_cast<float>(low) + m;
            out[i + 16] = d * static_cast<float>(top) + m;
        }
    }
}

void decode_q8_0(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 34, out += 32) {
        const float d = half_at(p);
        for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<int8_t>(p[2 + i]));
    }
}

// 256 values in 16 groups: 16 bytes (scale low, minimum high nibble), 64 bytes of 2-bit values, half d, half dmin.
void decode_q2_k(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 84, out += 256) {
        const uint8_t* quanta = p + 16;
        const float d = half_at(p + 80), dmin = half_at(p + 82);
        for (int group = 0; group < 16; ++group) {
            const float scale = d * static_cast<float>(p[group] & 15), minimum = dmin * static_cast<float>(p[group] >> 4);
            const uint8_t* q = quanta + group / 8 * 32 + group % 2 * 16;
            const int shift = group / 2 % 4 * 2;
            for (int i = 0; i < 16; ++i)
                out[group * 16 + i] = scale * static_cast<float>(q[i] >> shift & 3) - minimum;
        }
    }
}

// 256 values in 16 groups: 32 bytes of high bits, 64 bytes of 2 low bits, 12 bytes of 6-bit scales, half d.
void decode_q3_k(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 110, out += 256) {
        const uint8_t *high = p, *quanta = p + 32, *scales = p + 96;
        const float d = half_at(p + 108);
        for (int group = 0; group < 16; ++group) {
            const int low4 = scales[group % 8] >> (group / 8 * 4) & 15;
            const int high2 = scales[8 + group % 4] >> (group / 4 * 2) & 3;
            const float scale = d * static_cast<float>((low4 | high2 << 4) - 32);
            const uint8_t* q = quanta + group / 8 * 32 + group % 2 * 16;
            const uint8_t* h = high + group % 2 * 16;
            const int shift = group / 2 % 4 * 2, bit = group / 2;
            for (int i = 0; i < 16; ++i) {
                const int value = (q[i] >> shift & 3) - ((h[i] >> bit & 1) ? 0 : 4);
                out[group * 16 + i] = scale * static_cast<float>(value);
            }
        }
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

// 256 values in 8 groups: half d, half dmin, 12 bytes of scales, 128 bytes of nibbles.
void decode_q4_k(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 144, out += 256) {
        const float d = half_at(p), dmin = half_at(p + 2);
        for (int group = 0; group < 8; ++group) {
            int scale, minimum;
            scale_and_min(p + 4, group, scale, minimum);
            const float ds = d * static_cast<float>(scale), dm = dmin * static_cast<float>(minimum);
            const uint8_t* q = p + 16 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i) out[group * 32 + i] = ds * static_cast<float>(q[i] >> shift & 15) - dm;
        }
    }
}

// Q4_K with a fifth bit for each value in 32 more bytes.
void decode_q5_k(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 176, out += 256) {
        const float d = half_at(p), dmin = half_at(p + 2);
        const uint8_t* high = p + 16;
        for (int group = 0; group < 8; ++group) {
            int scale, minimum;
            scale_and_min(p + 4, group, scale, minimum);
            const float ds = d * static_cast<float>(scale), dm = dmin * static_cast<float>(minimum);
            const uint8_t* q = p + 48 + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int i = 0; i < 32; ++i) {
                const int value = (q[i] >> shift & 15) | (high[i] >> group & 1) << 4;
                out[group * 32 + i] = ds * static_cast<float>(value) - dm;
            }
        }
    }
}

// 256 values in 16 groups: 128 bytes of low nibbles, 64 bytes of 2 high bits, 16 signed scales, half d.
void decode_q6_k(const uint8_t* p, size_t n, float* out) {
    for (; n-- > 0; p += 210, out += 256) {
        const uint8_t *low = p, *high = p + 128, *scales = p + 192;
        const float d = half_at(p + 208);
        for (int group = 0; group < 16; ++group) {
            const float scale = d * static_cast<float>(static_cast<int8_t>(scales[group]));
            const int half = group / 8, quarter = group / 2 % 4, column = group % 2 * 16;
            const uint8_t* l = low + half * 64 + quarter % 2 * 32 + column;
            const uint8_t* h = high + half * 32 + column;
            const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
            for (int i = 0; i < 16; ++i) {
                const int value = (l[i] >> low_shift & 15) | (h[i] >> high_shift & 3) << 4;
                out[group * 16 + i] = scale * static_cast<float>(value - 32);
            }
        }
    }
}

constexpr StoredType kTypes[] = {
    {"F32", 1, 4, decode_f32},        {"F16", 1, 2, decode_f16},        {"BF16", 1, 2, decode_bf16},
    {"Q4_0", 32, 18, decode_q4_0},    {"Q4_1", 32, 20, decode_q4_1},    {"Q5_0", 32, 22, decode_q5_0},
    {"Q5_1", 32, 24, decode_q5_1},    {"Q8_0", 32, 34, decode_q8_0},    {"Q2_K", 256, 84, decode_q2_k},
    {"Q3_K", 256, 110, decode_q3_k},  {"Q4_K", 256, 144, decode_q4_k},  {"Q5_K", 256, 176, decode_q5_k},
    {"Q6_K", 256, 210, decode_q6_k},
};

}  // namespace

const StoredType* find_stored_type(const char* name) {
    for (const StoredType& type : kTypes)
        if (std::strcmp(type.name, name) == 0) return &type;
    return nullptr;
}

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
