// Ops that treat each row by itself: embedding, norms, sums.
#include <cmath>

#include "../int8.h"
#include "level.h"
#include "simd.h"
#include "sums.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

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
    if (part->layout == kInt8Layout) {
        alignas(64) float values[kMaxInt8Depth];
        look_up_int8(*part, row - part->first_channel, width, values);
        return add_values(values, scale, out, width);
    }
    for (size_t i = 0; i < width; i += kBlockDepth) {
        float values[kBlockDepth];
        unpack_block(*part, row - part->first_channel, i / kBlockDepth, values);
        add_values(values, scale, out + i, width - i < kBlockDepth ? width - i : kBlockDepth);
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

}  // namespace octavo::OCTAVO_LEVEL
