// Stored tensor rows: float types and GGUF blocks, as quanta or as float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

// One GGUF block taken apart. value = scale * table[code] + minimum, where table null means the code as int8; scale
// and minimum are `half_*`, or `scale * scale_codes[i]` and `minimum * minimum_codes[i]` for the i-th step.
struct Quanta {
    uint8_t codes[256];
    uint16_t half_scale, half_minimum;
    float scale, minimum;
    int8_t scale_codes[16], minimum_codes[16];
};

struct StoredType {
    const char* name;     // GGUF's
    size_t block_values;  // values in a block
    size_t block_bytes;
    size_t layout;        // how it is kept packed: index into kLayouts (stores.h)
    const float* table;   // of 16 values
    void (*widen)(const uint8_t* values, size_t count, float* out);  // float types
    void (*split)(const uint8_t* block, Quanta&);                    // the others
};

// The type of that name, or null.
const StoredType* find_stored_type(const char* name);

// What a part can be kept as: a stored type, or "INT8" (int8.h); or null.
const StoredType* find_store(const char* name);

// `count` values (whole blocks) to float32, with the roundings of the gguf package's own dequantiser: bit for bit.
void dequantize(const StoredType& type, const uint8_t* blocks, size_t count, float* out);

// IEEE half to float, exact.
float from_half(uint16_t half);

// Rounds to the nearest bfloat16, ties to even; a NaN stays one.
void to_bfloat16(const float* values, size_t count, uint16_t* out);

}  // namespace octavo
