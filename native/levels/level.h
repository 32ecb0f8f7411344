// What the files of one level offer each other; collected into a table by table.cpp.
#pragma once

#include "../kernels.h"

namespace octavo::OCTAVO_LEVEL {

extern const PackedKernels packed;
void linear(const LinearArgs&, size_t first_channel, size_t last_channel);
void norm(const NormArgs&, size_t first_row, size_t last_row);
void embedding(const EmbeddingArgs&, size_t first_row, size_t last_row);
void add(const float* x, const float* y, float* out, size_t count);
void rope_kv_write(const RopeKVWriteArgs&, size_t first_token, size_t last_token);
void attention(const AttentionArgs&, const QueryTile&, float* scratch);
size_t attention_scratch(size_t rows, size_t head_dim, size_t value_width);
float max_value(const float* values, size_t count);
double sum_exp(const float* values, size_t count, float top, float temperature);
void read_all(const float* values, size_t count, float* sink);
double multiply_adds(size_t turns, float* sink);

}  // namespace octavo::OCTAVO_LEVEL
