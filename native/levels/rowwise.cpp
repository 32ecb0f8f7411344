// Ops that treat each row by itself: embedding, norms, sums, the rotation and the KV write.
#include <cmath>

#include "../stores.h"
#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

// Sum over a row of f(x[i]), in the fixed order of lanes.
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

inline void add_values(const float* values, float scale, float* out, size_t count) {
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(out + i) + load(values + i) * scale);
    if (i < count) {
        const size_t rest = count - i;
        store_part(out + i, load_part(out + i, rest) + load_part(values + i, rest) * scale, rest);
    }
}

inline bool given(const EmbeddingTable& table) { return table.rows != nullptr || table.parts != nullptr; }

void add_row(const EmbeddingTable& table, size_t row, float scale, float* out, size_t width) {
    if (table.rows != nullptr) return add_values(table.rows + row * width, scale, out, width);
    const Part* part = table.parts;
    while (row >= part->first_channel + part->channels) ++part;
    for (size_t i = 0; i < width; i += kBlockDepth) {
        float values[kBlockDepth];
        unpack_block(*part, row - part->first_channel, i / kBlockDepth, values);
        add_values(values, scale, out + i, width - i < kBlockDepth ? width - i : kBlockDepth);
    }
}

// out = the head, normed and rotated.
inline void turn_head(const RopeKVWriteArgs& a, const float* head, const float* norm, size_t position, float* out) {
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
    for (size_t i = 0; i < half; ++i) {
        const float first = out[i], second = out[i + half];
        out[i] = first * cos[i] - second * sin[i];
        out[i + half] = second * cos[i] + first * sin[i];
    }
}

void write_kv(const RopeKVWriteArgs& a, const float* k, const float* v, size_t position, size_t slot) {
    const size_t dim = a.cache.head_dim, lane = slot % kGroup;
    for (size_t head = 0; head < a.cache.num_kv_heads; ++head) {
        float* values = a.cache.v_group(slot / kGroup, head) + lane * a.cache.value_width;
        turn_head(a, k + head * dim, a.k_norm, position, values);  // V's row is the scratch for K
        float* keys = a.cache.k_group(slot / kGroup, head) + lane;
        for (size_t i = 0; i < dim; ++i) keys[i * kGroup] = values[i];
        std::memcpy(values, v + head * dim, dim * sizeof(float));
    }
}

}  // namespace

void norm(const NormArgs& a, size_t first_row, size_t last_row) {
    for (size_t row = first_row; row < last_row; ++row) {
        const float* x = a.x + row * a.width;
        float* out = a.out + row * a.width;
        if (a.residual != nullptr) {
            float* kept = a.residual_out != nullptr ? a.residual_out + row * a.width : out;
            add(x, a.residual + row * a.width, kept, a.width);
            x = kept;
        } else if (a.residual_out != nullptr) {
            std::memcpy(a.residual_out + row * a.width, x, a.width * sizeof(float));
        }
        if (!a.layer_norm) {
            const float inverse = inverse_rms(x, a.width, a.eps);
            for (size_t i = 0; i < a.width; ++i) out[i] = x[i] * inverse * a.weight[i];
            continue;
        }
        const float width = static_cast<float>(a.width);
        const float mean = sum_row(x, a.width, [](Floats v) { return v; }) / width;
        const float squares = sum_row(x, a.width, [mean](Floats v) { return (v - mean) * (v - mean); });
        const float inverse = 1.0f / sqrtf(squares / width + a.eps);
        for (size_t i = 0; i < a.width; ++i)
            out[i] = (x[i] - mean) * inverse * a.weight[i] + (a.bias != nullptr ? a.bias[i] : 0.0f);
    }
}

void embedding(const EmbeddingArgs& a, size_t first_row, size_t last_row) {
    for (size_t row = first_row; row < last_row; ++row) {
        float* out = a.out + row * a.width;
        std::memset(out, 0, a.width * sizeof(float));
        if (given(a.weight)) add_row(a.weight, static_cast<size_t>(a.token_ids[row]), a.scale, out, a.width);
        if (given(a.position_weight))
            add_row(a.position_weight, static_cast<size_t>(a.positions[row] + a.position_offset), 1.0f, out, a.width);
    }
}

void add(const float* x, const float* y, float* out, size_t count) {
    for (size_t i = 0; i < count; ++i) out[i] = x[i] + y[i];
}

void rope_kv_write(const RopeKVWriteArgs& a, size_t first_token, size_t last_token) {
    const size_t dim = a.cache.head_dim, q_width = a.num_heads * dim, kv_width = a.cache.num_kv_heads * dim;
    for (size_t token = first_token; token < last_token; ++token) {
        const float* q = a.qkv + token * (q_width + 2 * kv_width);
        float* out = a.q + token * q_width;
        const size_t position = static_cast<size_t>(a.positions[token]);
        for (size_t head = 0; head < a.num_heads; ++head)
            turn_head(a, q + head * dim, a.q_norm, position, out + head * dim);
        const float* k = q + q_width;
        write_kv(a, k, k + kv_width, position, static_cast<size_t>(a.slots[token]));
    }
}

}  // namespace octavo::OCTAVO_LEVEL
