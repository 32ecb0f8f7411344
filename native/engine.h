// The program as loaded: weights, buffers, KV cache, nodes, and the turn of one step.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "abi.h"
#include "dequantize.h"
#include "kernels.h"
#include "kv.h"
#include "memory.h"
#include "sampler.h"
#include "stores.h"
#include "thread_pool.h"

struct OctavoEngine {
public:
    OctavoEngine(size_t num_threads, const octavo::Kernels& kernels);

    void add_weight(int64_t rows, int64_t cols);
    void add_packed(int64_t cols);
    void add_part(int32_t weight, int64_t rows, const char* store);
    void pack(int32_t weight, int64_t first_row, int64_t num_rows, const char* type, const void* data, int64_t bytes);
    void set_program(const OctavoProgram& program);
    void allocate_kv(int64_t num_blocks, int64_t block_size, int32_t kv_type);
    void copy_blocks(const int64_t* pairs, int64_t num_pairs);
    void step(const OctavoStep& step);
    void probe(double* rates);
    const float* logits() const { return data(logits_); }
    const float* states() const { return data(hidden_) + num_logits_ * width(hidden_); }

private:
    struct Weight {
        float* values;  // row-major, or null: packed
        size_t rows, cols;
        std::vector<octavo::Part> parts;
        std::vector<const octavo::StoredType*> stores;  // of the parts

        octavo::EmbeddingTable table() const { return {values, values != nullptr ? nullptr : parts.data()}; }
        size_t up_part(size_t channels) const;  // the first part from that channel on
        bool is_int8() const { return !parts.empty() && parts[0].layout == octavo::kInt8Layout; }
        bool halves_agree(size_t channels) const;
    };
    // Groups of one part of a packed weight.
    struct LinearTask {
        size_t part, first_group, last_group;
    };
    struct ExpertSizes {
        size_t count, top_k, width, inner, out;
        size_t places;  // rows that a pass has room for
    };
    // One expert of one row, and where the row lies among those of the expert.
    struct ExpertChoice {
        size_t expert, place;
        float share;
    };
    // The rows of one expert, places that follow each other.
    struct ExpertRows {
        size_t expert, place, count;

        size_t end_place() const { return octavo::round_up(place + count, octavo::kRoundedRows); }
    };
    struct Layer {
        OctavoKVLayer layer;
        octavo::KVCache cache;
    };
    // Rows that a row-wise node is run for: of all threads, task by task, or of one that runs a block by itself (blocks.cpp).
    struct RowRange {
        size_t first, count;
        size_t thread = 0;
        char* memory = nullptr;  // of the block; null: the step's buffers are meant, and all threads

        bool alone() const { return memory != nullptr; }
    };
    // Part of a step's attention: some ranges of what one query tile sees, of the KV heads from tile.kv_head on.
    struct AttentionTask {
        octavo::QueryTile tile;
        size_t last_head;
        size_t first_range, last_range;
        size_t state;  // offset of the sums in states_, or kWhole: the task makes the output itself
        size_t cost;
    };
    // The tasks of one step, the same for all layers with these numbers.
    struct AttentionPlan {
        int32_t group, share, num_kv_heads, head_dim, window;
        uint64_t step;
        std::vector<AttentionTask> tasks;
        std::vector<AttentionTask> merges;  // split tiles: all ranges, and where their sums start
    };

    // check.cpp: everything that could make a kernel leave its memory is refused here.
    void check_node(const OctavoNode& node) const;
    void check_experts(const OctavoNode& node) const;
    void check_step(const OctavoStep& step) const;
    void check_rows(const OctavoStep& step) const;
    void check_sampling(const OctavoStep& step) const;
    const OctavoBuffer& buffer(int32_t id) const;
    const Weight& find_weight(int32_t id) const;
    const Weight& matrix(int32_t id, int64_t rows, int64_t cols) const;
    const float* vector(int32_t id, int64_t width) const;  // null for -1
    const Layer& kv_layer(const OctavoNode& node) const;

    template <class Body>
    void measured(OctavoNodeTime*& times, const Body& body);
    void run(const OctavoNode& node, const OctavoStep& step);
    // Row-wise nodes.
    void run_rows(const OctavoNode& node, const OctavoStep& step, const RowRange& rows);
    void plan_blocks();
    void run_blocks(size_t first_node, size_t last_node, const OctavoStep& step, OctavoNodeTime* times);
    void embedding(const OctavoNode& node, const OctavoStep& step, const RowRange& rows);
    void norm(const OctavoNode& node, const RowRange& rows);
    void linear(const OctavoNode& node, const RowRange& rows);
    void packed_linear(const OctavoNode& node, const Weight& weight, const octavo::Epilogue& epilogue, const RowRange& rows);
    const octavo::PackedKernels& kernels_of(const Weight& weight) const {
        return weight.is_int8() ? *kernels_.int8 : *kernels_.packed;
    }
    void experts(const OctavoNode& node, size_t rows);
    ExpertSizes expert_sizes(const OctavoNode& node) const;
    size_t expert_row_bytes(const Weight& weight) const;
    void choose_experts(const OctavoNode& node, const ExpertSizes& sizes, size_t rows);
    static void choose_for_row(const float* scores, size_t count, std::span<ExpertChoice> chosen, bool renormalize);
    void begin_expert_sum(const OctavoNode& node, const ExpertSizes& sizes, size_t row, float* out) const;
    template <class Gather>
    void round_for_experts(const Weight& weight, std::span<const ExpertRows> pass, const Gather& gather);
    void expert_product(const Weight& weight, std::span<const ExpertRows> pass, size_t channels, int activation,
                        float* out);
    void pack_int8(const Weight& weight, size_t part, const octavo::StoredType& type, const uint8_t* data);
    void pack_floats(const Weight& weight, size_t first_row, size_t num_rows, const octavo::StoredType& type,
                     const uint8_t* data);
    void pack_part(const Weight& weight, size_t part, const octavo::StoredType& type, const uint8_t* data);
    void rope_kv_write(const OctavoNode& node, const OctavoStep& step, const RowRange& rows);
    void attention(const OctavoNode& node, const OctavoStep& step);
    const AttentionPlan& plan_attention(const OctavoNode& node, const OctavoStep& step);
    void split(AttentionPlan& plan, const octavo::KVCache& cache);
    void deal(std::vector<AttentionTask>& tasks);
    void gather_rows(const OctavoNode& node, const OctavoStep& step);
    void sample(const OctavoStep& step);

    float* data(int32_t id) const { return id < 0 ? nullptr : slots_[static_cast<size_t>(buffers_[id].slot)]; }
    // The first of the rows.
    float* data(int32_t id, const RowRange& rows) const {
        if (id < 0) return nullptr;
        const size_t own = rows.alone() ? block_places_[static_cast<size_t>(id)] : kShared;
        if (own == kShared) return data(id) + rows.first * width(id);
        return reinterpret_cast<float*>(rows.memory + own);
    }
    size_t width(int32_t id) const { return static_cast<size_t>(buffers_[id].width); }
    size_t rows_of(int32_t id, const OctavoStep& step) const {
        if (!buffers_[id].logits_rows) return static_cast<size_t>(step.num_tokens);
        return static_cast<size_t>(step.num_logits + (id == logits_ ? 0 : step.num_states));
    }
    static constexpr size_t kRowsPerTask = 4, kShared = SIZE_MAX;

    // Tasks of `rows_per_task` rows.
    template <class Body>
    void by_rows(const RowRange& range, size_t rows_per_task, const Body& body) {
        if (range.alone()) return body(0, range.count);
        by_rows(range.count, rows_per_task, body);
    }
    template <class Body>
    void by_rows(size_t rows, size_t rows_per_task, const Body& body) {
        pool_.run((rows + rows_per_task - 1) / rows_per_task, [&](size_t task, size_t) {
            body(task * rows_per_task, std::min(rows, (task + 1) * rows_per_task));
        });
    }

    const octavo::Kernels& kernels_;
    octavo::ThreadPool pool_;
    octavo::Arena weight_memory_;
    std::vector<Weight> weights_;
    std::vector<OctavoNode> nodes_;
    std::vector<OctavoBuffer> buffers_;
    std::vector<OctavoRope> ropes_;
    std::vector<Layer> layers_;
    std::vector<size_t> places_;  // the first layer of each
    std::vector<octavo::Mapping> slot_memory_;
    std::vector<float*> slots_;
    std::vector<octavo::Mapping> scratch_;  // one per thread
    std::vector<size_t> run_ends_;          // of each node: where the row-wise nodes that begin with it end, or 0
    std::vector<size_t> block_places_;  // of each buffer: where it lies in the memory of a block, or kShared
    std::vector<octavo::Mapping> block_memory_;  // one per thread, or none
    size_t block_rounded_ = 0;  // where rounded inputs lie there
    size_t min_blocks_tokens_ = 0, block_rows_ = 0;  // of a step that is cut into blocks, and of one of them
    std::vector<int64_t> block_times_;  // [thread][node of a run]
    std::vector<octavo::SamplerScratch> sampler_scratch_;
    octavo::Shares shares_;  // of the tasks of a Linear, of blocks, or of an attention
    octavo::Mapping rounded_;  // inputs of a packed Linear, or of experts
    octavo::Mapping expert_sums_;
    std::vector<ExpertChoice> expert_choices_;  // [rows][top_k]
    std::vector<ExpertRows> expert_rows_, expert_tiles_;
    std::vector<size_t> expert_counts_, expert_sources_;  // of each expert; the row at each place
    std::vector<LinearTask> expert_tasks_;
    std::vector<AttentionPlan> plans_;
    std::vector<float> states_;
    uint64_t step_number_ = 0;
    octavo::Mapping kv_;
    int32_t logits_ = -1, hidden_ = -1;
    size_t num_logits_ = 0;  // of the last step
    int64_t num_groups_ = 0, max_tokens_ = 0, max_logits_ = 0, max_requests_ = 0;
    int64_t num_blocks_ = 0, block_size_ = 0;
    int64_t vocab_ = 0;          // token ids below this may be embedded
    int64_t max_positions_ = 0;  // positions below this have a rotation and a learned row
};
