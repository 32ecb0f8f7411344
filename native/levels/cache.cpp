// Writing the KV cache: the rotation, rounding to the cache's type, and copies of single slots.
#include <cmath>

#include "../abi.h"
#include "level.h"
#include "pairs.h"
#include "sums.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kMaxPadded = kMaxHeadDim + kLanes;

// out = the head, normed and rotated.
inline void turn_head(const RopeKVWriteArgs& a, const float* head, const float* norm, size_t position,
                      float* __restrict out) {
    const size_t dim = a.cache.head_dim, half = a.half;
    if (norm != nullptr) {
        const float inverse = inverse_rms(head, dim, a.eps);
        for (size_t i = 0; i < dim; ++i) out[i] = head[i] * inverse * norm[i];
    } else {
        std::memcpy(out, head, dim * sizeof(float));
    }
    if (a.cos == nullptr) return;
    const float* cos = a.cos + position * half;
    const float* sin = a.sin + position * half;
    float* __restrict low = out;
    float* __restrict high = out + half;
    for (size_t i = 0; i < half; ++i) {
        const float first = low[i], second = high[i];
        low[i] = first * cos[i] - second * sin[i];
        high[i] = second * cos[i] + first * sin[i];
    }
}

// Signed bytes of values / scale, scale = the largest magnitude / 127; rounded to nearest, ties to even.
inline float to_int8(const float* values, size_t count, int8_t* out) {
    float largest = 0.0f;
    for (size_t i = 0; i < count; ++i) {
        const float magnitude = fabsf(values[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = largest / 127.0f;
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (size_t i = 0; i < count; ++i)
        out[i] = scale > 0.0f ? static_cast<int8_t>(static_cast<int32_t>(values[i] / scale + shift - shift)) : 0;
    return scale;
}

inline void round_row(const float* values, size_t count, uint16_t* out) {
    for (size_t i = 0; i < count; i += kLanes) {
        const Halves rounded = to_bfloat16(load_part(values + i, count - i < kLanes ? count - i : kLanes));
        std::memcpy(out + i, &rounded, sizeof rounded);
    }
}

// One head of one token into its piece.
void write_slot(const KVCache& c, uint8_t* piece, size_t lane, const float* k, const float* v) {
    const size_t dim = c.head_dim, width = c.value_width;
    uint8_t* values = piece + c.v_offset;
    if (c.type == OCTAVO_KV_FLOAT32) {
        for (size_t i = 0; i < dim; ++i) reinterpret_cast<float*>(piece)[i * kGroup + lane] = k[i];
        std::memcpy(reinterpret_cast<float*>(values) + lane * width, v, dim * sizeof(float));
    } else if (c.type == OCTAVO_KV_BFLOAT16) {
        uint16_t rounded[kMaxPadded];
        round_row(k, dim, rounded);
        uint16_t* keys = reinterpret_cast<uint16_t*>(piece) + 2 * lane;
        for (size_t i = 0; i < dim; ++i) keys[i / 2 * 2 * kGroup + i % 2] = rounded[i];
        round_row(v, dim, rounded);
        uint16_t* row = reinterpret_cast<uint16_t*>(values) + lane / 2 * 2 * width + lane % 2;
        for (size_t i = 0; i < dim; ++i) row[2 * i] = rounded[i];
    } else {
        int8_t rounded[kMaxPadded];
        float* scales = reinterpret_cast<float*>(piece + c.scale_offset) + lane;
        scales[0] = to_int8(k, dim, rounded);
        int8_t* keys = reinterpret_cast<int8_t*>(piece) + 4 * lane;
        for (size_t i = 0; i < dim; ++i) keys[i / 4 * 4 * kGroup + i % 4] = rounded[i];
        scales[kGroup] = to_int8(v, dim, rounded);
        int8_t* row = reinterpret_cast<int8_t*>(values) + lane / 4 * 4 * width + lane % 4;
        for (size_t i = 0; i < dim; ++i) row[4 * i] = rounded[i];
    }
}

template <class T>
inline void copy_strided(const uint8_t* from, uint8_t* to, size_t count, size_t stride) {
    for (size_t i = 0; i < count; ++i)
        reinterpret_cast<T*>(to)[i * stride] = reinterpret_cast<const T*>(from)[i * stride];
}

}  // namespace

void copy_slot(const KVCache& c, const uint8_t* from, size_t from_lane, uint8_t* to, size_t to_lane) {
    const size_t dim = c.head_dim, width = c.value_width;
    const uint8_t* v = from + c.v_offset;
    uint8_t* v_to = to + c.v_offset;
    if (c.type == OCTAVO_KV_FLOAT32) {
        copy_strided<float>(from + 4 * from_lane, to + 4 * to_lane, dim, kGroup);
        std::memcpy(v_to + 4 * to_lane * width, v + 4 * from_lane * width, 4 * width);
    } else if (c.type == OCTAVO_KV_BFLOAT16) {
        copy_strided<uint32_t>(from + 4 * from_lane, to + 4 * to_lane, (dim + 1) / 2, kGroup);
        const auto row = [width](size_t lane) { return 2 * (lane / 2 * 2 * width + lane % 2); };
        copy_strided<uint16_t>(v + row(from_lane), v_to + row(to_lane), width, 2);
    } else {
        copy_strided<uint32_t>(from + 4 * from_lane, to + 4 * to_lane, (dim + 3) / 4, kGroup);
        const auto row = [width](size_t lane) { return lane / 4 * 4 * width + lane % 4; };
        copy_strided<uint8_t>(v + row(from_lane), v_to + row(to_lane), width, 4);
        copy_strided<float>(from + c.scale_offset + 4 * from_lane, to + c.scale_offset + 4 * to_lane, 2, kGroup);
    }
}

void rope_kv_write(const RopeKVWriteArgs& a, size_t first_token, size_t last_token) {
    const KVCache& c = a.cache;
    const size_t dim = c.head_dim, q_width = a.num_heads * dim, kv_width = c.num_kv_heads * dim;
    float turned[kMaxHeadDim];
    for (size_t token = first_token; token < last_token; ++token) {
        const float* q = a.qkv + token * (q_width + 2 * kv_width);
        float* out = a.q + token * q_width;
        const size_t position = static_cast<size_t>(a.positions[token]), slot = static_cast<size_t>(a.slots[token]);
        for (size_t head = 0; head < a.num_heads; ++head)
            turn_head(a, q + head * dim, a.q_norm, position, out + head * dim);
        const float* k = q + q_width;
        for (size_t head = 0; head < c.num_kv_heads; ++head) {
            turn_head(a, k + head * dim, a.k_norm, position, turned);
            write_slot(c, c.piece(slot / kGroup, head), slot % kGroup, turned, k + kv_width + head * dim);
        }
    }
}

}  // namespace octavo::OCTAVO_LEVEL
