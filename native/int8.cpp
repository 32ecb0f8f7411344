// Packing int8 weights: rows as a level rounds activations, put in the order of lines.
#include "int8.h"

#include <cstring>

namespace octavo {
void pack_int8_group(const PackedKernels& kernels, const uint8_t* rounded, size_t rows, size_t blocks,
                     uint8_t* group) {
    const size_t depth = blocks * kInt8Block, element = kernels.activation_bytes;
    std::memset(group, kInt8Zero, int8_scales_at(blocks));
    for (size_t channel = 0; channel < rows; ++channel) {
        const uint8_t* row = rounded + channel * kernels.row_bytes(depth);
        uint8_t* out = group + channel * kInt8LineDepth;
        for (size_t k = 0; k < depth; k += kInt8LineDepth, out += kInt8LineBytes) {
            uint32_t codes = 0;  // four at once; of wide ones the low bytes
            if (element == 1)
                std::memcpy(&codes, row + k, sizeof codes);
            else
                for (size_t i = 0; i < kInt8LineDepth; ++i)
                    codes |= static_cast<uint32_t>(row[(k + i) * element]) << (8 * i);
            codes ^= 0x80808080u;  // adds kInt8Zero to each
            std::memcpy(out, &codes, sizeof codes);
        }
        Int8Tail tail;
        std::memcpy(&tail, row + depth * element, sizeof tail);
        const float scale = tail.scale / static_cast<float>(int8_norm(blocks));
        std::memcpy(group + int8_scales_at(blocks) + channel * sizeof scale, &scale, sizeof scale);
    }
}

}  // namespace octavo
