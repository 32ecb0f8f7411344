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
constexpr size_t kKVRange = 256;   // positions whose sums are kept together; those of ranges are merged in order
constexpr size_t kMaxHeadDim = 1024;
constexpr size_t kRoundedRows = 16;  // rows whose rounded activations a level may lay out together

constexpr size_t kLogitsChunk = 64;     // logits that the sampler looks at together
constexpr float kNegligible = -55.0f;  // exponent of a weight of which 2^20 are less than a rounding of 1

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
    size_t layout;        // index into kLayouts, or kInt8Layout (int8.h)
    const float* table;   // the 16 values of 4-bit quanta
    size_t group_bytes, first_channel, channels;

    size_t num_groups() const { return round_up(channels, kChannels) / kChannels; }
};

struct PackedArgs {
    const void* x;      // as round_rows() leaves it
    const Part* parts;  // they cover the channels in order
    const Part* ups;    // as many, for gated activations, else null; their first_channel continues
    size_t num_rows, depth, num_blocks;  // depth = block_depth * num_blocks
    Epilogue epilogue;
};

// The Linear of packed weights. Of bf16 and quantised ones (stores.h): weights and activations are rounded to bf16,
// products summed in float32. Of int8 ones: as int8.h says.
struct PackedKernels {
    size_t activation_bytes;  // of an element of rounded rows
    // Rows from a multiple of kRoundedRows on, into room for whole kRoundedRows, in the order that linear() reads them;
    // depth pads with zeros.
    void (*round_rows)(const float* x, size_t rows, size_t width, size_t depth, void* out);
    // Groups [first_group, last_group) of one part, and of its counterpart in `ups`.
    void (*linear)(const PackedArgs&, size_t part, size_t first_group, size_t last_group, void* scratch);
    size_t (*scratch)(size_t depth);  // bytes
    size_t block_depth = 32;          // depth is a multiple of it
    size_t row_tail = 0;              // bytes behind the elements of a rounded row
    double (*multiply_adds)(size_t turns, float* sink) = nullptr;  // as that of the level, where it is another

    size_t row_bytes(size_t depth) const { return depth * activation_bytes + row_tail; }
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

// The cache of one layer: a piece for each group of kGroup slots and each KV head, [group][kv head], holding K, V and,
// for int8, their scales. Slots lie side by side in K, so that 16 scores are one vector and nothing is reduced across
// lanes. With the narrow types, the numbers that follow each other in a reduction lie together: four bytes of them.
//   float32:  K [head_dim][16]         V [16][value_width]
//   bfloat16: K [key_dim / 2][16][2]   V [16 / 2][value_width][2]
//   int8:     K [key_dim / 4][16][4]   V [16 / 4][value_width][4]   scales [2][16] float32: of K, of V
struct KVCache {
    uint8_t* data;
    int type;  // OctavoKVType
    size_t num_kv_heads, head_dim;
    size_t key_dim;      // head_dim, padded to whole four bytes
    size_t value_width;  // head_dim, padded to a multiple of 16
    size_t v_offset, scale_offset, piece_bytes;

    uint8_t* piece(size_t group, size_t head) const { return data + (group * num_kv_heads + head) * piece_bytes; }
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
    const QueryTile* next;  // what the thread goes on with, as far as is known, or null
    size_t next_range;      // the first KV range of it
};

// The KV cache and attention of a level.
struct KVKernels {
    void (*rope_kv_write)(const RopeKVWriteArgs&, size_t first_token, size_t last_token);
    // One slot, in all of K, V and scales, from one piece to another.
    void (*copy_slot)(const KVCache&, const uint8_t* from, size_t from_lane, uint8_t* to, size_t to_lane);
    // KV heads from that of the tile up to last_head. The KV ranges [first_range, last_range) that the tile sees: all of
    // them, or with `states`, of one head, some, whose sums go to states [range][rows]; attention_merge() then makes the
    // output from those of all ranges.
    void (*attention)(const AttentionArgs&, const QueryTile&, size_t last_head, size_t first_range, size_t last_range,
                      uint8_t* scratch, float* states);
    void (*attention_merge)(const AttentionArgs&, const QueryTile&, size_t num_ranges, float* states);
    size_t (*attention_scratch)(size_t rows, const KVCache&);  // bytes
    size_t (*attention_state)(size_t rows, const KVCache&);    // floats of `states` for one range
    size_t query_rows;  // rows (tokens x query heads) of a task at most, unless one token has more
};

struct Kernels {
    const char* name;
    // Channels [first_channel, last_channel); first_channel is a multiple of kChannels.
    void (*linear)(const LinearArgs&, size_t first_channel, size_t last_channel);
    const PackedKernels* packed;
    const PackedKernels* int8;
    void (*norm)(const NormArgs&, size_t first_row, size_t last_row);
    void (*embedding)(const EmbeddingArgs&, size_t first_row, size_t last_row);
    void (*add)(const float* x, const float* y, float* out, size_t count);
    const KVKernels* kv;
    // The largest of each kLogitsChunk values; NaN is passed over.
    void (*chunk_maxima)(const float* values, size_t count, float* maxima);
    // Of each kLogitsChunk values, which are <= top, the sum of exp((value - top) / temperature): quotients in float, the
    // rest in double. Chunks whose maximum lies kNegligible below have 0: all of them are nothing beside the top.
    void (*sum_exp)(const float* values, size_t count, const float* maxima, float top, float temperature, double* sums);
    // For measuring the machine: reads a buffer whose size is a multiple of 1 KiB; runs `turns` of the level's fastest
    // multiply-adds in registers and returns how many operations that was. Both return through *sink.
    void (*read_all)(const float* values, size_t count, float* sink);
    double (*multiply_adds)(size_t turns, float* sink);
    double (*float_multiply_adds)(size_t turns, float* sink);  // those of float32
};

// The level named `wanted`, or the best of this machine for "auto"; null when the machine or the build lacks it.
const Kernels* find_kernels(const char* wanted);

}  // namespace octavo
