// The program as loaded: weights, buffers, KV cache, nodes, and the turn of one step.
#pragma once

#include <memory>
#include <vector>

#include "abi.h"
#include "kernels.h"
#include "memory.h"
#include "sampler.h"
#include "thread_pool.h"

struct OctavoEngine {
public:
    OctavoEngine(size_t num_threads, const octavo::Kernels& kernels);

    void add_weight(int64_t rows, int64_t cols, int32_t dtype);
    void pack(int32_t weight, int64_t first_row, int64_t num_rows, const char* type, const void* data, int64_t bytes);
    void set_program(const OctavoProgram& program);
    void allocate_kv(int64_t num_blocks, int64_t block_size);
    void copy_blocks(const int64_t* pairs, int64_t num_pairs);
    void step(const OctavoStep& step);
    void probe(double& bytes_per_second, double& operations_per_second);
    const float* logits() const { return data(logits_); }

private:
    struct Weight {
        void* data;
        size_t rows, cols;
        bool bfloat16;

        size_t bytes() const { return rows * cols * (bfloat16 ? 2 : 4); }
    };
    struct Layer {
        OctavoKVLayer layer;
        octavo::KVCache cache;
    };

    // check.cpp: everything that could make a kernel leave its memory is refused here.
    void check_node(const OctavoNode& node) const;
    void check_step(const OctavoStep& step) const;
    void check_rows(const OctavoStep& step) const;
    void check_sampling(const OctavoStep& step) const;
    const OctavoBuffer& buffer(int32_t id) const;
    const Weight& matrix(int32_t id, int64_t rows, int64_t cols) const;
    const float* vector(int32_t id, int64_t width) const;  // null for -1
    const Layer& kv_layer(const OctavoNode& node) const;

    template <class Body>
    void measured(OctavoNodeTime*& times, const Body& body);
    void run(const OctavoNode& node, const OctavoStep& step);
    void embedding(const OctavoNode& node, const OctavoStep& step);
    void norm(const OctavoNode& node, size_t rows);
    void linear(const OctavoNode& node, size_t rows);
    void rope_kv_write(const OctavoNode& node, const OctavoStep& step);
    void attention(const OctavoNode& node, const OctavoStep& step);
    void gather_rows(const OctavoNode& node, const OctavoStep& step);
    void sample(const OctavoStep& step);

    float* data(int32_t id) const { return id < 0 ? nullptr : slots_[static_cast<size_t>(buffers_[id].slot)]; }
    size_t width(int32_t id) const { return static_cast<size_t>(buffers_[id].width); }
    size_t rows_of(int32_t id, const OctavoStep& step) const {
        return static_cast<size_t>(buffers_[id].logits_rows ? step.num_logits : step.num_tokens);
    }
    template <class Body>
    void by_rows(size_t rows, size_t rows_per_task, const Body& body);

    const octavo::Kernels& kernels_;
    octavo::ThreadPool pool_;
    octavo::Arena weight_memory_;
    std::vector<Weight> weights_;
    std::vector<OctavoNode> nodes_;
    std::vector<OctavoBuffer> buffers_;
    std::vector<OctavoRope> ropes_;
    std::vector<Layer> layers_;
    std::vector<octavo::Mapping> slot_memory_;
    std::vector<float*> slots_;
    std::vector<octavo::Mapping> scratch_;  // one per thread
    std::vector<octavo::SamplerScratch> sampler_scratch_;
    std::vector<octavo::QueryTile> tiles_;
    octavo::Mapping kv_;
    int32_t logits_ = -1;
    int64_t num_groups_ = 0, max_tokens_ = 0, max_logits_ = 0, max_requests_ = 0;
    int64_t num_blocks_ = 0, block_size_ = 0;
    int64_t vocab_ = 0;          // token ids below this may be embedded
    int64_t max_positions_ = 0;  // positions below this have a rotation and a learned row
};
