// What the files of one level offer each other; collected into a table by table.cpp.
#pragma once

#include "../kernels.h"

namespace octavo::OCTAVO_LEVEL {

extern const PackedKernels packed;
extern const PackedKernels int8;
// The weights of a row; `out` is aligned and has room for whole blocks.
void look_up_int8(const Part&, size_t row, size_t width, float* out);
void linear(const LinearArgs&, size_t first_channel, size_t last_channel);
void norm(const NormArgs&, size_t first_row, size_t last_row);
void embedding(const EmbeddingArgs&, size_t first_row, size_t last_row);
void add(const float* x, const float* y, float* out, size_t count);
void rope_kv_write(const RopeKVWriteArgs&, size_t first_token, size_t last_token);
void copy_slot(const KVCache&, const uint8_t* from, size_t from_lane, uint8_t* to, size_t to_lane);
void attention(const AttentionArgs&, const QueryTile&, size_t last_head, size_t first_range, size_t last_range,
               uint8_t* scratch, float* states);
void attention_merge(const AttentionArgs&, const QueryTile&, size_t num_ranges, float* states);
size_t attention_scratch(size_t rows, const KVCache&);
size_t attention_state(size_t rows, const KVCache&);
// Of amx only: the same on tiles, for some caches.
bool has_tiled_attention(const KVCache&);
size_t tiled_attention_scratch(size_t rows, const KVCache&);
void tiled_attention(const AttentionArgs&, const QueryTile&, size_t last_head, size_t first_range, size_t last_range,
                     uint8_t* scratch, float* states);
size_t int8_tiled_attention_scratch(size_t rows, const KVCache&);
void int8_tiled_attention(const AttentionArgs&, const QueryTile&, size_t last_head, size_t first_range, size_t last_range,
                          uint8_t* scratch, float* states);
extern const KVKernels kv;
void chunk_maxima(const float* values, size_t count, float* maxima);
void sum_exp(const float* values, size_t count, const float* maxima, float top, float temperature, double* sums);
void read_all(const float* values, size_t count, float* sink);
double multiply_adds(size_t turns, float* sink);
// Of amx only: operations of tiles of bytes; the int8 kernels of avx512bf16 with a Linear on tiles.
double byte_tile_multiply_adds(size_t turns, float* sink);
PackedKernels int8_on_tiles(PackedKernels dots);

}  // namespace octavo::OCTAVO_LEVEL
