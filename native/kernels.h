// The table of op functions that one instruction level provides, and their arguments.
//
// Levels share one source (levels/*.cpp), compiled once per level into the namespace OCTAVO_LEVEL. A level with its
// own instructions fills the same table. All pointers are row-major float matrices whose rows follow each other.
//
// Same bits: what a kernel computes for one row depends on that row alone, never on how many rows, tasks or threads
// there are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

constexpr size_t kChannels = 16;   // output channels of a group: what one call of a Linear computes at least
constexpr size_t kGroup = 16;      // slots that lie together in the KV cache
constexpr size_t kKVTile = 64;     // positions between two rescalings of the softmax; tiles start at its multiples
constexpr size_t kQueryRows = 32;  // rows (tokens x query heads) of an attention task at most, unless one token has more

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// What happens to the sums of a Linear.
struct Epilogue {
    const float* bias;  // as many as weight rows, or null
    float* out;         // [num_rows, channels]
    size_t channels;
    int activation;
    float scale, softcap;
};

struct LinearArgs {
    const float* x;       // [num_rows, depth]
    const float* weight;  // [channels, depth], or [2 * channels, depth] gate over up
    size_t num_rows, depth;
    Epilogue epilogue;
};

// Consecutive output channels in one layout of stores.h.
struct Part {
    const uint8_t* data;  // groups of kChannels
    size_t layout;        // index into kLayouts
    const float* table;   // the 16 values of 4-bit quanta
    size_t group_bytes, first_channel, channels;

    size_t num_groups() const { return round_up(channels, kChannels) / kChannels; }
};

struct PackedArgs {
    const void* x;      // as round_rows() leaves it: [num_rows, depth]
    const Part* parts;  // they cover the channels in order
    const Part* ups;    // as many, for gated activations, else null; their first_channel continues
    size_t num_rows, depth, num_blocks;  // depth = 32 * num_blocks
    Epilogue epilogue;
};

// The Linear of bf16 and quantised weights: weights and activations are rounded to bf16, products summed in float32.
struct PackedKernels {
    size_t activation_bytes;  // of an element of rounded rows
    void (*round_rows)(const float* x, size_t rows, size_t width, size_t depth, void* out);  // depth pads with zeros
    // Groups [first_group, last_group) of one part, and of its counterpart in `ups`.
    void (*linear)(const PackedArgs&, size_t part, size_t first_group, size_t last_group, void* scratch);
    size_t (*scratch)(size_t depth);  // bytes
};

struct NormArgs {
    const float* x;  // [rows, width]
    const float* residual;
    const float* weight;  // [width]
    const float* bias;
    float* out;
    float* residual_out;
    size_t width;
    bool layer_norm;
    float eps;
};

// Rows to look up: row-major floats, or packed parts. Neither: there is no such term.
struct EmbeddingTable {
    const float* rows;
    const Part* parts;
};

struct EmbeddingArgs {
    const int32_t* token_ids;
    const int32_t* positions;
    EmbeddingTable weight, position_weight;
    float* out;
    size_t width;
    float scale;
    int64_t position_offset;
};

// The cache of one layer, in groups of kGroup slots: K is [group][kv head][head_dim][kGroup], so that 16 scores are
// one vector; V is [group][kv head][kGroup][value_width], value_width = head_dim rounded up to 16.
struct KVCache {
    float* k;
    float* v;
    size_t num_kv_heads, head_dim, value_width;

    float* k_group(size_t group, size_t head) const { return k + (group * num_kv_heads + head) * head_dim * kGroup; }
    float* v_group(size_t group, size_t head) const { return v + (group * num_kv_heads + head) * kGroup * value_width; }
};

struct RopeKVWriteArgs {
    const float* qkv;
    float* q;
    KVCache cache;
    const int64_t* slots;
    const int32_t* positions;
    const float* cos;  // [positions, half] or null: no rotation
    const float* sin;
    const float* q_norm;  // [head_dim] or null
    const float* k_norm;
    size_t num_heads, half;
    float eps;
};

struct AttentionArgs {
    const float* q;  // [tokens, num_heads * head_dim]
    float* out;
    KVCache cache;
    size_t num_heads, block_size, window;  // window 0: none
    float scale, softcap;
};

// Consecutive queries of one request, seen by one KV head.
struct QueryTile {
    const int32_t* block_table;
    size_t first_token;     // row of q
    size_t first_position;  // of that token in its request
    size_t num_tokens;
    size_t kv_head;
};

struct Kernels {
    const char* name;
    // Channels [first_channel, last_channel); first_channel is a multiple of kChannels.
    void (*linear)(const LinearArgs&, size_t first_channel, size_t last_channel);
    const PackedKernels* packed;
    void (*norm)(const NormArgs&, size_t first_row, size_t last_row);
    void (*embedding)(const EmbeddingArgs&, size_t first_row, size_t last_row);
    void (*add)(const float* x, const float* y, float* out, size_t count);
    void (*rope_kv_write)(const RopeKVWriteArgs&, size_t first_token, size_t last_token);
    void (*attention)(const AttentionArgs&, const QueryTile&, float* scratch);
    size_t (*attention_scratch)(size_t rows, size_t head_dim, size_t value_width);  // floats
    float (*max_value)(const float* values, size_t count);  // NaN is passed over
    // Sum of exp((values[i] - top) / temperature) for values <= top: quotients in float, the rest in double.
    double (*sum_exp)(const float* values, size_t count, float top, float temperature);
    // For measuring the machine: reads a buffer whose size is a multiple of 1 KiB; runs `turns` of the level's fastest
    // multiply-adds in registers and returns how many operations that was. Both return through *sink.
    void (*read_all)(const float* values, size_t count, float* sink);
    double (*multiply_adds)(size_t turns, float* sink);
};

// The level named `wanted`, or the best of this machine for "auto"; null when the machine or the build lacks it.
const Kernels* find_kernels(const char* wanted);

}  // namespace octavo
