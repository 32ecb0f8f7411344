// Writing the KV cache: the rotation, rounding to the cache's type, and copies of single slots.
#include <cmath>

#include "../abi.h"
#include "level.h"
#include "pairs.h"
#include "sums.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kMaxPadded = kMaxHeadDim + kLanes;
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

inline Bytes narrow(Words v) {  // the low bytes
#if defined(__AVX512F__)
    return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector((Ints)v, Bytes);
#endif
}

// to[i], as four bytes, gets from[i] as its part `part`.
template <class T>
inline void write_column(const T* from, size_t count, size_t part, uint8_t* to) {
#if defined(__AVX512F__)
    constexpr size_t bits = 8 * sizeof(T);
    const __mmask64 mask = (sizeof(T) == 2 ? __mmask64{0x3333333333333333} : __mmask64{0x1111111111111111})
                           << (part * sizeof(T));
    for (size_t i = 0; i < count; i += kLanes) {
        __m512i words;
        if constexpr (sizeof(T) == 2)
            words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
        else
            words = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        words = _mm512_sll_epi32(words, _mm_cvtsi32_si128(static_cast<int>(part * bits)));
        _mm512_mask_storeu_epi8(to + i * 4, mask, words);
    }
#else
    for (size_t i = 0; i < count; ++i) std::memcpy(to + i * 4 + part * sizeof(T), from + i, sizeof(T));
#endif
}

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

// Numbers of one head as they are kept: bf16 or int8, whose scale is the largest magnitude / 127; rounded to nearest,
// ties to even. Whole vectors are written.
void round_head(const float* values, size_t count, uint16_t* out) {
    for (size_t i = 0; i < count; i += kLanes) {
        const Halves rounded = to_bfloat16(load_part(values + i, count - i < kLanes ? count - i : kLanes));
        std::memcpy(out + i, &rounded, sizeof rounded);
    }
}

float round_head(const float* values, size_t count, int8_t* out) {
    Floats top{};
    for (size_t i = 0; i < count; i += kLanes) {
        const Floats v = load_part(values + i, count - i < kLanes ? count - i : kLanes);
        top = max(v < 0.0f ? -v : v, top);
    }
    const float largest = max_lane(top), factor = largest > 0.0f ? 127.0f / largest : 0.0f;
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    for (size_t i = 0; i < count; i += kLanes) {
        const Floats v = load_part(values + i, count - i < kLanes ? count - i : kLanes);
        const Bytes rounded = narrow((Words)(v * factor + shift));
        std::memcpy(out + i, &rounded, sizeof rounded);
    }
    return largest / 127.0f;
}

// Four bytes of a reduction lie together: one slot's part of K is every kGroup-th of such words.
void write_words(const void* from, size_t count, uint8_t* to) {
    for (size_t i = 0; i < count; ++i) std::memcpy(to + i * kGroup * 4, static_cast<const char*>(from) + i * 4, 4);
}

// One head of one token into its piece. A slot shares its words of V with its neighbours, which other threads may be
// writing: nothing but its own bytes is touched.
void write_slot(const KVCache& c, uint8_t* piece, size_t lane, const float* k, const float* v) {
    const size_t dim = c.head_dim, width = c.value_width;
    uint8_t *keys = piece + 4 * lane, *values = piece + c.v_offset;
    if (c.type == OCTAVO_KV_FLOAT32) {
        write_words(k, dim, keys);
        std::memcpy(values + 4 * lane * width, v, dim * sizeof(float));
    } else if (c.type == OCTAVO_KV_BFLOAT16) {
        uint16_t rounded[kMaxPadded];
        round_head(k, dim, rounded);
        write_words(rounded, c.key_dim / 2, keys);
        round_head(v, dim, rounded);
        write_column(rounded, dim, lane % 2, values + lane / 2 * width * 4);
    } else {
        int8_t rounded[kMaxPadded];
        float* scales = reinterpret_cast<float*>(piece + c.scale_offset) + lane;
        scales[0] = round_head(k, dim, rounded);
        write_words(rounded, c.key_dim / 4, keys);
        scales[kGroup] = round_head(v, dim, rounded);
        write_column(rounded, dim, lane % 4, values + lane / 4 * width * 4);
    }
}

// Asks for the lines that a token writes: each of its words of K lies in another, and a store waits for its own.
OCTAVO_FORCED void fetch_slot(const KVCache& c, size_t slot) {
    for (size_t head = 0; head < c.num_kv_heads; ++head) {
        const uint8_t* piece = c.piece(slot / kGroup, head);
        for (size_t at = slot % kGroup * 4; at < c.v_offset; at += kGroup * 4) __builtin_prefetch(piece + at, 1);
        const size_t bytes = c.value_width * 4, rows = (c.scale_offset - c.v_offset) / bytes;  // of slots that lie together
        const uint8_t* values = piece + c.v_offset + slot % kGroup * rows / kGroup * bytes;
        for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(values + at, 1);
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
        if (token == first_token) fetch_slot(c, slot);
        if (token + 1 < last_token) {
            const size_t next = static_cast<size_t>(a.slots[token + 1]);
            if (next / kGroup != slot / kGroup) fetch_slot(c, next);
        }
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
