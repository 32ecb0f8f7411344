#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "error.h"
#include "stores.h"

using namespace octavo;

namespace {

constexpr size_t kRowsPerTask = 4;

}  // namespace

OctavoEngine::OctavoEngine(size_t num_threads, const Kernels& kernels) : kernels_(kernels), pool_(num_threads) {}

void OctavoEngine::set_program(const OctavoProgram& p) {
    if (!nodes_.empty()) refuse("a program is loaded already");
    buffers_.assign(p.buffers, p.buffers + p.num_buffers);
    ropes_.assign(p.ropes, p.ropes + p.num_ropes);
    num_groups_ = p.num_kv_groups;
    max_tokens_ = p.max_num_tokens;
    max_logits_ = p.max_num_logits;
    max_requests_ = p.max_num_requests;
    logits_ = p.logits;
    for (int32_t i = 0; i < p.num_kv_layers; ++i) {
        const OctavoKVLayer& layer = p.kv_layers[i];
        if (layer.num_kv_heads <= 0 || layer.head_dim <= 0 || layer.group < 0 || layer.group >= num_groups_)
            refuse("KV layer %d is inconsistent", i);
        const size_t dim = static_cast<size_t>(layer.head_dim);
        layers_.push_back(
            {layer, {nullptr, nullptr, static_cast<size_t>(layer.num_kv_heads), dim, round_up(dim, kGroup)}});
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
        slot_memory_.emplace_back(static_cast<size_t>(elements) * sizeof(float), false);
        slots_.push_back(slot_memory_.back().as<float>());
    }

    size_t scratch = 1, rounded = 0;
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
            const size_t depth = round_up(width(node->x), kBlockDepth);
            scratch = std::max(scratch, round_up(kernels_.packed->scratch(depth), sizeof(float)) / sizeof(float));
            const int64_t rows = buffer(node->x).logits_rows ? max_logits_ : max_tokens_;
            rounded = std::max(rounded, static_cast<size_t>(rows) * depth * kernels_.packed->activation_bytes);
        }
        if (node->op == OCTAVO_ATTENTION) {
            const KVCache& cache = kv_layer(*node).cache;
            const size_t share = static_cast<size_t>(node->num_heads / node->num_kv_heads);
            const size_t rows = std::max(kQueryRows, share);
            scratch = std::max(scratch, kernels_.attention_scratch(rows, cache.head_dim, cache.value_width));
        }
    }
    if (!buffer(logits_).logits_rows) refuse("logits must have one row per sampled position");
    rounded_ = Mapping(rounded, true);
    nodes_.assign(p.nodes, p.nodes + p.num_nodes);
    sampler_scratch_.resize(pool_.num_threads());
    for (size_t thread = 0; thread < pool_.num_threads(); ++thread) {
        scratch_.emplace_back(scratch * sizeof(float), false);
        reserve(sampler_scratch_[thread], width(logits_));
    }
    tiles_.reserve(static_cast<size_t>(max_tokens_ + max_requests_));
}

void OctavoEngine::allocate_kv(int64_t num_blocks, int64_t block_size) {
    const size_t slots = round_up(checked_size(num_blocks, block_size, "a KV pool"), kGroup);
    constexpr size_t page = 4096 / sizeof(float);
    size_t elements = 0;
    std::vector<size_t> starts;
    for (const Layer& layer : layers_) {
        for (const size_t width : {layer.cache.head_dim, layer.cache.value_width}) {
            starts.push_back(elements);
            elements += round_up(checked_size(static_cast<int64_t>(slots),
                                              static_cast<int64_t>(width * layer.cache.num_kv_heads), "a KV layer"),
                                 page);
        }
    }
    kv_ = Mapping(elements * sizeof(float), false);
    for (size_t i = 0; i < layers_.size(); ++i) {
        layers_[i].cache.k = kv_.as<float>() + starts[2 * i];
        layers_[i].cache.v = kv_.as<float>() + starts[2 * i + 1];
    }
    num_blocks_ = num_blocks;
    block_size_ = block_size;
}

void OctavoEngine::copy_blocks(const int64_t* pairs, int64_t num_pairs) {
    for (int64_t i = 0; i < 2 * num_pairs; ++i)
        if (pairs[i] < 0 || pairs[i] >= num_blocks_) refuse("there is no block %lld", (long long)pairs[i]);
    const size_t size = static_cast<size_t>(block_size_);
    for (const Layer& layer : layers_) {
        const KVCache& c = layer.cache;
        for (int64_t i = 0; i < num_pairs; ++i) {
            for (size_t offset = 0; offset < size; ++offset) {
                const size_t from = static_cast<size_t>(pairs[2 * i]) * size + offset;
                const size_t to = static_cast<size_t>(pairs[2 * i + 1]) * size + offset;
                for (size_t head = 0; head < c.num_kv_heads; ++head) {
                    const float* k = c.k_group(from / kGroup, head) + from % kGroup;
                    float* k_to = c.k_group(to / kGroup, head) + to % kGroup;
                    for (size_t d = 0; d < c.head_dim; ++d) k_to[d * kGroup] = k[d * kGroup];
                    std::memcpy(c.v_group(to / kGroup, head) + to % kGroup * c.value_width,
                                c.v_group(from / kGroup, head) + from % kGroup * c.value_width,
                                c.value_width * sizeof(float));
                }
            }
        }
    }
}

void OctavoEngine::step(const OctavoStep& step) {
    check_step(step);
    OctavoNodeTime* times = step.out_times;
    for (const OctavoNode& node : nodes_) measured(times, [&] { run(node, step); });
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
        case OCTAVO_EMBEDDING: return embedding(node, step);
        case OCTAVO_NORM: return norm(node, rows);
        case OCTAVO_LINEAR: return linear(node, rows);
        case OCTAVO_ROPE_KV_WRITE: return rope_kv_write(node, step);
        case OCTAVO_ATTENTION: return attention(node, step);
        case OCTAVO_GATHER_ROWS: return gather_rows(node, step);
        case OCTAVO_ADD: return kernels_.add(data(node.x), data(node.y), data(node.out), rows * width(node.out));
    }
}

void OctavoEngine::embedding(const OctavoNode& node, const OctavoStep& step) {
    const Weight* weight = node.weight < 0 ? nullptr : &weights_[static_cast<size_t>(node.weight)];
    const Weight* learned = node.extra < 0 ? nullptr : &weights_[static_cast<size_t>(node.extra)];
    const EmbeddingArgs args = {
        .token_ids = step.token_ids,
        .positions = step.positions,
        .weight = weight ? weight->table() : EmbeddingTable{},
        .position_weight = learned ? learned->table() : EmbeddingTable{},
        .out = data(node.out),
        .width = width(node.out),
        .scale = node.scale,
        .position_offset = node.position_offset,
    };
    by_rows(static_cast<size_t>(step.num_tokens), 2 * kRowsPerTask,
            [&](size_t first, size_t last) { kernels_.embedding(args, first, last); });
}

void OctavoEngine::norm(const OctavoNode& node, size_t rows) {
    const int64_t size = buffers_[static_cast<size_t>(node.out)].width;
    const NormArgs args = {
        .x = data(node.x),
        .residual = data(node.y),
        .weight = vector(node.weight, size),
        .bias = vector(node.bias, size),
        .out = data(node.out),
        .residual_out = data(node.residual_out),
        .width = static_cast<size_t>(size),
        .layer_norm = node.layer_norm != 0,
        .eps = node.eps,
    };
    by_rows(rows, 2 * kRowsPerTask, [&](size_t first, size_t last) { kernels_.norm(args, first, last); });
}

void OctavoEngine::rope_kv_write(const OctavoNode& node, const OctavoStep& step) {
    const Layer& layer = layers_[static_cast<size_t>(node.kv_layer)];
    const OctavoRope* rope = node.rope < 0 ? nullptr : &ropes_[static_cast<size_t>(node.rope)];
    const RopeKVWriteArgs args = {
        .qkv = data(node.x),
        .q = data(node.out),
        .cache = layer.cache,
        .slots = step.slots + layer.layer.group * step.num_tokens,
        .positions = step.positions,
        .cos = rope ? rope->cos : nullptr,
        .sin = rope ? rope->sin : nullptr,
        .q_norm = vector(node.weight, node.head_dim),
        .k_norm = vector(node.extra, node.head_dim),
        .num_heads = static_cast<size_t>(node.num_heads),
        .half = rope ? static_cast<size_t>(rope->half) : 0,
        .eps = node.eps,
    };
    by_rows(static_cast<size_t>(step.num_tokens), kRowsPerTask,
            [&](size_t first, size_t last) { kernels_.rope_kv_write(args, first, last); });
}

void OctavoEngine::attention(const OctavoNode& node, const OctavoStep& step) {
    const Layer& layer = layers_[static_cast<size_t>(node.kv_layer)];
    const AttentionArgs args = {
        .q = data(node.x),
        .out = data(node.out),
        .cache = layer.cache,
        .num_heads = static_cast<size_t>(node.num_heads),
        .block_size = static_cast<size_t>(block_size_),
        .window = static_cast<size_t>(node.window),
        .scale = node.scale,
        .softcap = node.softcap,
    };
    const size_t kv_heads = layer.cache.num_kv_heads;
    const size_t tile_tokens = std::max<size_t>(1, kQueryRows / (args.num_heads / kv_heads));
    tiles_.clear();
    for (int64_t b = 0; b < step.num_requests; ++b) {
        const size_t first = static_cast<size_t>(step.query_start_loc[b]);
        const size_t end = static_cast<size_t>(step.query_start_loc[b + 1]);
        const size_t past = static_cast<size_t>(step.seq_lens[b]) - (end - first);
        const int32_t* table = step.block_tables + (layer.layer.group * step.num_requests + b) * step.max_blocks;
        for (size_t token = first; token < end; token += tile_tokens)
            tiles_.push_back({table, token, past + token - first, std::min(tile_tokens, end - token), 0});
    }
    pool_.run(tiles_.size() * kv_heads, [&](size_t task, size_t thread) {
        QueryTile tile = tiles_[task / kv_heads];
        tile.kv_head = task % kv_heads;
        kernels_.attention(args, tile, scratch_[thread].as<float>());
    });
}

void OctavoEngine::gather_rows(const OctavoNode& node, const OctavoStep& step) {
    const size_t size = width(node.out);
    for (size_t row = 0; row < static_cast<size_t>(step.num_logits); ++row)
        std::memcpy(data(node.out) + row * size, data(node.x) + static_cast<size_t>(step.logits_indices[row]) * size,
                    size * sizeof(float));
}

void OctavoEngine::sample(const OctavoStep& step) {
    const size_t vocab = width(logits_);
    pool_.run(static_cast<size_t>(step.num_logits), [&](size_t row, size_t thread) {
        sample_row(step, row, logits() + row * vocab, vocab, kernels_, sampler_scratch_[thread]);
    });
}
