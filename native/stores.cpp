#include "stores.h"

#include <algorithm>
#include <cstring>

#include "dequantize.h"
#include "int8.h"

namespace octavo {
namespace {

// Bytes 0, 2, 4, 6 of a word.
inline uint32_t even_bytes(uint64_t v) {
    v &= 0x00ff00ff00ff00ffu;
    v = (v | v >> 8) & 0x0000ffff0000ffffu;
    return static_cast<uint32_t>(v | v >> 16);
}

// The 32 values of one channel in one block, `values` bytes each, to their places in the lines.
template <size_t BYTES>
inline void place(const void* values, size_t channel, uint8_t* payload) {
    const uint8_t* from = static_cast<const uint8_t*>(values);
    for (size_t line = 0; line < kBlockLines; ++line)
        std::memcpy(payload + (line * kChannels + channel) * 2 * BYTES, from + line * 2 * BYTES, 2 * BYTES);
}

inline void place_nibbles(const uint8_t* codes, size_t channel, uint8_t* payload) {
    const int shift = channel < 8 ? 0 : 4;
    for (size_t unit = 0; unit < kBlockDepth / 8; ++unit) {
        uint64_t eight;
        std::memcpy(&eight, codes + unit * 8, sizeof eight);
        uint32_t words[2];
        uint8_t* at = payload + unit * 64 + channel % 8 * sizeof words;
        std::memcpy(words, at, sizeof words);
        words[0] |= even_bytes(eight) << shift;
        words[1] |= even_bytes(eight >> 8) << shift;
        std::memcpy(at, words, sizeof words);
    }
}

void place_block(const Layout& layout, const Quanta& quanta, size_t within, size_t channel, size_t block,
                 uint8_t* group) {
    const uint8_t* codes = quanta.codes + within * kBlockDepth;
    uint8_t* payload = group + layout.payload_at(block);
    if (layout.bits == 4)
        place_nibbles(codes, channel, payload);
    else
        place<1>(codes, channel, payload);
    uint8_t* scales = group + layout.scales_at(block);
    if (layout.halves) {
        std::memcpy(scales + channel * 2, &quanta.half_scale, 2);
        if (layout.minimum) std::memcpy(scales + (kChannels + channel) * 2, &quanta.half_minimum, 2);
        return;
    }
    const size_t steps = layout.steps();
    for (size_t i = 0; i < steps; ++i) {
        std::memcpy(scales + i * kChannels + channel, &quanta.scale_codes[within * steps + i], 1);
        if (layout.minimum)
            std::memcpy(scales + (steps + i) * kChannels + channel, &quanta.minimum_codes[within * steps + i], 1);
    }
    uint8_t* header = group + layout.header_at(block);
    std::memcpy(header + channel * 4, &quanta.scale, 4);
    if (layout.minimum) std::memcpy(header + (kChannels + channel) * 4, &quanta.minimum, 4);
}

void pack_rounded(const StoredType& type, const uint8_t* row, size_t cols, size_t channel, uint8_t* group, float* wide) {
    dequantize(type, row, cols, wide);
    for (size_t k = 0; k < cols; k += kBlockDepth) {
        uint16_t values[kBlockDepth] = {};
        to_bfloat16(wide + k, std::min(kBlockDepth, cols - k), values);
        place<2>(values, channel, group + kLayouts[0].payload_at(k / kBlockDepth));
    }
}

float read_float(const uint8_t* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

float read_half(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return from_half(bits);
}

float round_to_bfloat16(float value) {
    uint16_t bits;
    to_bfloat16(&value, 1, &bits);
    const uint32_t wide = uint32_t(bits) << 16;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

}  // namespace

const Layout& layout_of(const StoredType& type) { return kLayouts[type.layout]; }

size_t part_bytes(const char* store, int64_t rows, int64_t cols) {
    constexpr int64_t most = int64_t{1} << 48;  // beyond any address space
    const StoredType* type = find_store(store);
    if (type == nullptr || rows <= 0 || cols <= 0 || rows > most / cols) return 0;
    const size_t depth = static_cast<size_t>(cols), channels = static_cast<size_t>(rows);
    if (depth % type->block_values != 0) return 0;
    const size_t groups = round_up(channels, kChannels) / kChannels;
    if (type->layout == kInt8Layout) return depth <= kMaxInt8Depth ? groups * int8_group_bytes(int8_blocks(depth)) : 0;
    return groups *
           layout_of(*type).group_bytes(round_up(depth, kBlockDepth) / kBlockDepth);
}

void pack_group(const StoredType& store, const StoredType& type, const uint8_t* source, size_t row_bytes, size_t rows,
                size_t cols, uint8_t* group, float* wide) {
    const Layout& layout = layout_of(store);
    Quanta quanta;
    for (size_t row = 0; row < rows; ++row) {
        const uint8_t* stored = source + row * row_bytes;
        if (layout.bits == 16) {
            pack_rounded(type, stored, cols, row, group, wide);
            continue;
        }
        for (size_t k = 0; k < cols; k += type.block_values, stored += type.block_bytes) {
            type.split(stored, quanta);
            for (size_t i = 0; i < type.block_values / kBlockDepth; ++i)
                place_block(layout, quanta, i, row, k / kBlockDepth + i, group);
        }
    }
}

void unpack_block(const Part& part, size_t row, size_t block, float* out) {
    const Layout& layout = kLayouts[part.layout];
    const uint8_t* group = part.data + row / kChannels * part.group_bytes;
    const uint8_t* payload = group + layout.payload_at(block);
    const uint8_t* scales = group + layout.scales_at(block);
    const uint8_t* header = group + layout.header_at(block);
    const size_t channel = row % kChannels, steps = layout.steps();
    for (size_t k = 0; k < kBlockDepth; ++k) {
        const size_t line = k / 2, element = 2 * channel + k % 2, i = k / layout.step;
        if (layout.bits == 16) {
            uint32_t bits = 0;
            std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, payload + (line * 32 + element) * 2, 2);
            std::memcpy(out + k, &bits, sizeof bits);
            continue;
        }
        float quantum, scale, minimum = 0.0f;
        if (layout.bits == 4) {
            const uint8_t byte = payload[line / 4 * 64 + element % 16 * 4 + line % 4];
            quantum = part.table[element < 16 ? byte & 15 : byte >> 4];
        } else {
            quantum = static_cast<float>(static_cast<int8_t>(payload[line * 32 + element]));
        }
        if (layout.halves) {
            scale = read_half(scales + channel * 2);
            if (layout.minimum) minimum = read_half(scales + (kChannels + channel) * 2);
        } else {
            const auto code = [&](size_t at) { return static_cast<float>(static_cast<int8_t>(scales[at])); };
            scale = read_float(header + channel * 4) * code(i * kChannels + channel);
            if (layout.minimum)
                minimum = read_float(header + (kChannels + channel) * 4) * code((steps + i) * kChannels + channel);
        }
        out[k] = round_to_bfloat16(scale * quantum + minimum);
    }
}

}  // namespace octavo
