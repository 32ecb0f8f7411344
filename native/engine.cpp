#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "error.h"

using namespace octavo;

OctavoEngine::OctavoEngine(size_t num_threads, const Kernels& kernels) : kernels_(kernels), pool_(num_threads), shares_(num_threads) {}

void OctavoEngine::set_program(const OctavoProgram& p) {
    if (!nodes_.empty()) refuse("a program is loaded already");
    buffers_.assign(p.buffers, p.buffers + p.num_buffers);
    ropes_.assign(p.ropes, p.ropes + p.num_ropes);
    num_groups_ = p.num_kv_groups;
    max_tokens_ = p.max_num_tokens;
    max_logits_ = p.max_num_logits;
    max_requests_ = p.max_num_requests;
    logits_ = p.logits;
    hidden_ = p.hidden;
    for (int32_t i = 0; i < p.num_kv_layers; ++i) {
        const OctavoKVLayer& layer = p.kv_layers[i];
        if (layer.num_kv_heads <= 0 || layer.head_dim <= 0 || layer.group < 0 || layer.group >= num_groups_ ||
            layer.place < 0 || layer.place >= p.num_kv_layers)
            refuse("KV layer %d is inconsistent", i);
        if (static_cast<size_t>(layer.head_dim) > kMaxHeadDim)
            refuse("KV layer %d has heads of %d; at most %zu", i, layer.head_dim, kMaxHeadDim);
        const size_t heads = static_cast<size_t>(layer.num_kv_heads), dim = static_cast<size_t>(layer.head_dim);
        layers_.push_back({layer, kv_layout(OCTAVO_KV_FLOAT32, heads, dim)});
        const auto first = std::find_if(places_.begin(), places_.end(), [&](size_t other) {
            return layers_[other].layer.place == layer.place;
        });
        if (first == places_.end())
            places_.push_back(layers_.size() - 1);
        else if (layers_[*first].cache.num_kv_heads != heads || layers_[*first].cache.head_dim != dim)
            refuse("KV layer %d does not fit into its place", i);
    }
    vocab_ = max_positions_ = INT32_MAX;
    for (const OctavoRope& rope : ropes_) max_positions_ = std::min(max_positions_, rope.max_positions);

    std::vector<int64_t> slot_elements;
    for (const OctavoBuffer& b : buffers_) {
        if (b.slot < 0 || b.slot >= p.num_buffers) refuse("there is no slot %d", b.slot);
        if (static_cast<size_t>(b.slot) >= slot_elements.size()) slot_elements.resize(static_cast<size_t>(b.slot) + 1);
        const size_t size = checked_size(b.logits_rows ? max_logits_ : max_tokens_, b.width, "a buffer");
        int64_t& elements = slot_elements[static_cast<size_t>(b.slot)];
        elements = std::max(elements, static_cast<int64_t>(size));
    }
    for (const int64_t elements : slot_elements) {
        slot_memory_.emplace_back(static_cast<size_t>(elements) * sizeof(float), true);
        slots_.push_back(slot_memory_.back().as<float>());
    }

    size_t scratch = 1, rounded = 0, expert_sums = 0;
    for (const OctavoNode* node = p.nodes; node != p.nodes + p.num_nodes; ++node) {
        check_node(*node);
        if (node->op == OCTAVO_EMBEDDING && node->weight >= 0)
            vocab_ = std::min(vocab_, static_cast<int64_t>(weights_[static_cast<size_t>(node->weight)].rows));
        if (node->op == OCTAVO_EMBEDDING && node->extra >= 0) {
            const int64_t rows = static_cast<int64_t>(weights_[static_cast<size_t>(node->extra)].rows);
            if (node->position_offset < 0 || node->position_offset >= rows) refuse("position_offset is out of bounds");
            max_positions_ = std::min(max_positions_, rows - node->position_offset);
        }
        if (node->op == OCTAVO_LINEAR && weights_[static_cast<size_t>(node->weight)].values == nullptr) {
            const PackedKernels& kernels = kernels_of(weights_[static_cast<size_t>(node->weight)]);
            const size_t depth = round_up(width(node->x), kernels.block_depth);
            scratch = std::max(scratch, round_up(kernels.scratch(depth), sizeof(float)) / sizeof(float));
            const int64_t rows = buffer(node->x).logits_rows ? max_logits_ : max_tokens_;
            rounded = std::max(rounded, round_up(static_cast<size_t>(rows), kRoundedRows) * kernels.row_bytes(depth));
        }
        if (node->op == OCTAVO_EXPERTS) {
            const ExpertSizes sizes = expert_sizes(*node);
            expert_sums = std::max(expert_sums, sizes.places * (sizes.inner + sizes.out) * sizeof(float));
            for (const int32_t id : {node->weight, node->extra}) {
                const Weight& weight = weights_[static_cast<size_t>(id)];
                rounded = std::max(rounded, sizes.places * expert_row_bytes(weight));
                if (weight.values != nullptr) continue;
                const PackedKernels& kernels = kernels_of(weight);
                const size_t needed = kernels.scratch(round_up(weight.cols, kernels.block_depth)) / sizeof(float) + 1;
                scratch = std::max({scratch, needed, kRoundedRows * weight.cols});
            }
        }
        if (node->op == OCTAVO_ATTENTION) {
            const KVCache& cache = kv_layer(*node).cache;
            const size_t rows = std::max(kernels_.kv->query_rows, static_cast<size_t>(node->num_heads / node->num_kv_heads));
            for (const int32_t type : {OCTAVO_KV_FLOAT32, OCTAVO_KV_BFLOAT16, OCTAVO_KV_INT8}) {
                const KVCache layout = kv_layout(type, cache.num_kv_heads, cache.head_dim);
                scratch = std::max(scratch, kernels_.kv->attention_scratch(rows, layout) / sizeof(float));
            }
        }
    }
    if (!buffer(logits_).logits_rows || !buffer(hidden_).logits_rows)
        refuse("logits and last states must have one row per position that goes to the end");
    rounded_ = Mapping(rounded, true);
    expert_sums_ = Mapping(expert_sums, true);
    nodes_.assign(p.nodes, p.nodes + p.num_nodes);
    sampler_scratch_.resize(pool_.num_threads());
    for (size_t thread = 0; thread < pool_.num_threads(); ++thread) {
        scratch_.emplace_back(scratch * sizeof(float), false);
        reserve(sampler_scratch_[thread], width(logits_));
    }
    plan_blocks();
}

void OctavoEngine::step(const OctavoStep& step) {
    check_step(step);
    ++step_number_;
    num_logits_ = static_cast<size_t>(step.num_logits);
    OctavoNodeTime* times = step.out_times;
    const bool in_blocks = !block_memory_.empty() && static_cast<size_t>(step.num_tokens) >= min_blocks_tokens_;
    for (size_t i = 0; i < nodes_.size();) {
        if (in_blocks && run_ends_[i] != 0) {
            run_blocks(i, run_ends_[i], step, times);
            if (times != nullptr) times += run_ends_[i] - i;
            i = run_ends_[i];
        } else {
            measured(times, [&] { run(nodes_[i], step); });
            ++i;
        }
    }
    measured(times, [&] { sample(step); });
}

// Runs a part of the step; where somebody asks, what it took goes to *times, which moves on.
template <class Body>
void OctavoEngine::measured(OctavoNodeTime*& times, const Body& body) {
    if (times == nullptr) return body();
    const auto start = std::chrono::steady_clock::now();
    const uint64_t loops = pool_.num_loops();
    body();
    const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
    *times++ = {took.count(), static_cast<int64_t>(pool_.num_loops() - loops)};
}

void OctavoEngine::run(const OctavoNode& node, const OctavoStep& step) {
    const size_t rows = rows_of(node.out, step);
    switch (node.op) {
        case OCTAVO_EXPERTS: return experts(node, rows);
        case OCTAVO_ATTENTION: return attention(node, step);
        case OCTAVO_GATHER_ROWS: return gather_rows(node, step);
        default: return run_rows(node, step, {0, rows});
    }
}

void OctavoEngine::run_rows(const OctavoNode& node, const OctavoStep& step, const RowRange& rows) {
    switch (node.op) {
        case OCTAVO_EMBEDDING: return embedding(node, step, rows);
        case OCTAVO_NORM: return norm(node, rows);
        case OCTAVO_LINEAR: return linear(node, rows);
        case OCTAVO_ROPE_KV_WRITE: return rope_kv_write(node, step, rows);
        case OCTAVO_ADD:
            return kernels_.add(data(node.x, rows), data(node.y, rows), data(node.out, rows), rows.count * width(node.out));
    }
}

void OctavoEngine::embedding(const OctavoNode& node, const OctavoStep& step, const RowRange& rows) {
    const Weight* weight = node.weight < 0 ? nullptr : &weights_[static_cast<size_t>(node.weight)];
    const Weight* learned = node.extra < 0 ? nullptr : &weights_[static_cast<size_t>(node.extra)];
    const EmbeddingArgs args = {
        .token_ids = step.token_ids + rows.first,
        .positions = step.positions + rows.first,
        .weight = weight ? weight->table() : EmbeddingTable{},
        .position_weight = learned ? learned->table() : EmbeddingTable{},
        .out = data(node.out, rows),
        .width = width(node.out),
        .scale = node.scale,
        .position_offset = node.position_offset,
    };
    by_rows(rows, 2 * kRowsPerTask, [&](size_t first, size_t last) { kernels_.embedding(args, first, last); });
}

void OctavoEngine::norm(const OctavoNode& node, const RowRange& rows) {
    const int64_t size = buffers_[static_cast<size_t>(node.out)].width;
    const NormArgs args = {
        .x = data(node.x, rows),
        .residual = data(node.y, rows),
        .weight = vector(node.weight, size),
        .bias = vector(node.bias, size),
        .out = data(node.out, rows),
        .residual_out = data(node.residual_out, rows),
        .width = static_cast<size_t>(size),
        .layer_norm = node.layer_norm != 0,
        .eps = node.eps,
    };
    by_rows(rows, 2 * kRowsPerTask, [&](size_t first, size_t last) { kernels_.norm(args, first, last); });
}

void OctavoEngine::gather_rows(const OctavoNode& node, const OctavoStep& step) {
    const size_t size = width(node.out);
    for (size_t row = 0; row < rows_of(node.out, step); ++row)
        std::memcpy(data(node.out) + row * size, data(node.x) + static_cast<size_t>(step.logits_indices[row]) * size,
                    size * sizeof(float));
}

void OctavoEngine::sample(const OctavoStep& step) {
    const size_t vocab = width(logits_);
    pool_.run(static_cast<size_t>(step.num_logits), [&](size_t row, size_t thread) {
        sample_row(step, row, logits() + row * vocab, vocab, kernels_, sampler_scratch_[thread]);
    });
}
