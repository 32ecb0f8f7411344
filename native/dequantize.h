// From stored tensor rows (float types and GGUF blocks) to float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

struct StoredType {
    const char* name;     // GGUF's
    size_t block_values;  // values in a block
    size_t block_bytes;
    void (*decode)(const uint8_t* blocks, size_t num_blocks, float* out);
};

// The type of that name, or null.
const StoredType* find_stored_type(const char* name);

// Rounds to the nearest bfloat16, ties to even; a NaN stays one.
void to_bfloat16(const float* values, size_t count, uint16_t* out);

}  // namespace octavo
