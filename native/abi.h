// The C ABI of the native runtime: everything that crosses between Python (octavo/runtime/native/library.py) and C++.
//
// Every function returns 0 or one of the codes below; octavo_error() then has the text. No exception and no abort
// crosses this line. Change any struct or signature: raise OCTAVO_ABI_VERSION here and in library.py.
#pragma once

#include <cstddef>
#include <cstdint>

#define OCTAVO_ABI_VERSION 8
#define OCTAVO_API extern "C" __attribute__((visibility("default")))

enum OctavoCode : int32_t {
    OCTAVO_OK = 0,
    OCTAVO_INVALID = 1,        // an argument is out of its bounds; nothing was touched
    OCTAVO_OUT_OF_MEMORY = 2,  // the operating system refused a reservation
    OCTAVO_INTERNAL = 3,
};

enum OctavoOp : int32_t {
    OCTAVO_EMBEDDING = 0,
    OCTAVO_NORM = 1,
    OCTAVO_ADD = 2,
    OCTAVO_LINEAR = 3,
    OCTAVO_ROPE_KV_WRITE = 4,
    OCTAVO_ATTENTION = 5,
    OCTAVO_GATHER_ROWS = 6,
    OCTAVO_EXPERTS = 7,
};

enum OctavoActivation : int32_t {
    OCTAVO_NONE = 0,
    OCTAVO_RELU = 1,
    OCTAVO_GELU = 2,
    OCTAVO_GELU_TANH = 3,
    OCTAVO_SILU_MUL = 4,
    OCTAVO_GELU_TANH_MUL = 5,
};

enum OctavoKVType : int32_t { OCTAVO_KV_FLOAT32 = 0, OCTAVO_KV_BFLOAT16 = 1, OCTAVO_KV_INT8 = 2 };

// One node of the program. Ids are -1 where absent; docs of the fields are those of octavo/program/ops.py.
struct OctavoNode {
    int32_t op;
    int32_t x, y;              // input buffers
    int32_t out, residual_out;  // output buffers
    int32_t weight, bias, extra;  // extra: position_weight, k_norm (then weight is q_norm), or down (weight: gate_up)
    int32_t activation;
    int32_t layer_norm;  // 0: rms, 1: layer
    int32_t kv_layer, num_heads, num_kv_heads, head_dim, window;
    int32_t rope;
    int32_t position_offset;
    int32_t num_experts, top_k, renormalize, shared;  // shared: input buffer; y has the scores
    float eps, scale, softcap;
};

struct OctavoBuffer {
    int32_t slot;         // buffers of one slot share memory
    int32_t logits_rows;  // 0: one row per token, 1: one row per position that goes to the end
    int64_t width;        // floats in a row
};

struct OctavoRope {
    const float* cos;  // [max_positions, half], kept alive by the caller
    const float* sin;
    int64_t max_positions;
    int64_t half;
};

struct OctavoKVLayer {
    int32_t num_kv_heads, head_dim;
    int32_t group;  // whose block table it follows
    int32_t place;  // layers of one place share memory: they are of different groups
};

struct OctavoProgram {
    const OctavoNode* nodes;
    const OctavoBuffer* buffers;
    const OctavoRope* ropes;
    const OctavoKVLayer* kv_layers;
    int32_t num_nodes, num_buffers, num_ropes, num_kv_layers, num_kv_groups;
    int32_t logits, hidden;  // buffers: what is sampled from, and the last states that it is made of
    int32_t max_num_tokens, max_num_logits, max_num_requests;
};

struct OctavoNodeTime {
    int64_t nanoseconds;
    int64_t barriers;  // parallel loops: the threads waited for each other so often
};

// Everything a step reads and writes; arrays as in runtime/base.py (StepInputs, SamplingInputs, SamplerOutput).
struct OctavoStep {
    int64_t num_tokens, num_requests, num_logits;
    int64_t num_states;  // positions behind those with logits of which only the last states are wanted
    int64_t max_blocks, max_logprobs;
    const int32_t* token_ids;
    const int32_t* positions;
    const int64_t* slots;
    const int32_t* query_start_loc;
    const int32_t* seq_lens;
    const int32_t* block_tables;
    const int32_t* logits_indices;

    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const uint64_t* seeds;
    const int64_t* sample_positions;
    const int32_t* num_logprobs;
    const int32_t* bias_start;
    const int32_t* bias_ids;
    const float* bias_values;
    const float* repetition_penalty;
    const float* presence_penalty;
    const float* frequency_penalty;
    const int32_t* seen_start;
    const int32_t* seen_ids;
    const int32_t* seen_counts;
    const int32_t* mask_of;  // [num_logits] into masks, -1 none; null: no row has one
    const uint32_t* masks;   // [num_masks, ceil(vocab / 32)]: bit i of word w allows token 32 w + i
    int64_t num_bias, num_seen, num_masks;  // lengths of the ragged values, masks

    int32_t* out_token_ids;
    float* out_logprobs;
    int32_t* out_ranks;
    int32_t* out_top_ids;
    float* out_top_logprobs;
    OctavoNodeTime* out_times;  // one per node, then one for the sampler; null: not measured
};

struct OctavoEngine;

OCTAVO_API int32_t octavo_abi_version();
// Name of the level that `wanted` ("auto", "portable", "avx2", ...) means on this machine, or null.
OCTAVO_API const char* octavo_level(const char* wanted);
// The message of the last call that failed on this thread.
OCTAVO_API const char* octavo_error();

OCTAVO_API int32_t octavo_create(int32_t num_threads, const char* level, OctavoEngine** engine);
OCTAVO_API void octavo_destroy(OctavoEngine* engine);
// Declares the next weight (ids count from 0) as a matrix [rows, cols] of float32; memory is reserved here.
OCTAVO_API int32_t octavo_add_weight(OctavoEngine* engine, int64_t rows, int64_t cols);
// Declares the next weight as a packed matrix (stores.h) of `cols` columns, without rows yet.
OCTAVO_API int32_t octavo_add_packed(OctavoEngine* engine, int64_t cols);
// Adds `rows` rows to a packed weight, kept as the GGUF type `store` is kept; the float types are kept as bf16.
OCTAVO_API int32_t octavo_add_part(OctavoEngine* engine, int32_t weight, int64_t rows, const char* store);
// Bytes that such a part takes, or 0 where octavo_add_part() would refuse.
OCTAVO_API int64_t octavo_part_bytes(const char* store, int64_t rows, int64_t cols);
// Converts `num_rows` stored rows (a GGUF type name: "F32", "BF16", "Q4_K", ...) into rows first_row .. of a weight.
// Of a packed weight: into one whole part, once; its store must be that type or bf16.
OCTAVO_API int32_t octavo_pack(OctavoEngine* engine, int32_t weight, int64_t first_row, int64_t num_rows,
                               const char* type, const void* data, int64_t num_bytes);
// Bytes of one stored row of `cols` elements, or 0 where octavo_pack() does not know the type or the length.
OCTAVO_API int64_t octavo_row_bytes(const char* type, int64_t cols);
OCTAVO_API int32_t octavo_set_program(OctavoEngine* engine, const OctavoProgram* program);
// Bytes that 16 slots of one layer take, padding and scales included; 0 for a type or sizes that there are not.
OCTAVO_API int64_t octavo_kv_bytes(int32_t kv_type, int64_t num_kv_heads, int64_t head_dim);
OCTAVO_API int32_t octavo_allocate_kv(OctavoEngine* engine, int64_t num_blocks, int64_t block_size, int32_t kv_type);
OCTAVO_API int32_t octavo_copy_blocks(OctavoEngine* engine, const int64_t* pairs, int64_t num_pairs);
// Runs the whole program and the sampler.
OCTAVO_API int32_t octavo_step(OctavoEngine* engine, const OctavoStep* step);
// What the engine's threads can do at most, measured for a fraction of a second: bytes a second read from memory, and
// operations a second (a multiply-add counts two) of the level's fastest instruction, from registers, for float32, bf16
// and int8. rates: [4], in this order.
OCTAVO_API int32_t octavo_probe(OctavoEngine* engine, double* rates);
// The raw logits of the last step, [num_logits, vocab]; valid until the next call on this engine.
OCTAVO_API const float* octavo_logits(OctavoEngine* engine);
// The last states of the last step, [num_states, hidden]; valid as long.
OCTAVO_API const float* octavo_states(OctavoEngine* engine);
