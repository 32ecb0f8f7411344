// Refuses programs and steps that would touch memory they must not; nothing has been written when it does.
#include <climits>

#include "engine.h"
#include "error.h"

using octavo::refuse;

namespace {


void require(bool holds, const char* what, const OctavoNode& node) {
    if (!holds) refuse("a node of op %d is inconsistent: %s", node.op, what);
}

void check_ragged(const char* name, const int32_t* start, int64_t rows, int64_t length) {
    if (start[0] != 0 || start[rows] != length) refuse("%s_start must go from 0 to %lld", name, (long long)length);
    for (int64_t r = 0; r < rows; ++r)
        if (start[r] > start[r + 1]) refuse("%s_start falls at row %lld", name, (long long)r);
}

void check_ids(const char* name, const int32_t* ids, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= limit)
            refuse("%s[%lld] is %d, but must be from 0 to %lld", name, (long long)i, ids[i], (long long)limit - 1);
}

}  // namespace

const OctavoBuffer& OctavoEngine::buffer(int32_t id) const {
    if (id < 0 || static_cast<size_t>(id) >= buffers_.size()) refuse("there is no buffer %d", id);
    return buffers_[static_cast<size_t>(id)];
}

const OctavoEngine::Weight& OctavoEngine::find_weight(int32_t id) const {
    if (id < 0 || static_cast<size_t>(id) >= weights_.size()) refuse("there is no weight %d", id);
    return weights_[static_cast<size_t>(id)];
}

// Whether the parts behind `channels` are as long as those before it, one by one.
bool OctavoEngine::Weight::halves_agree(size_t channels) const {
    const size_t half = up_part(channels);
    if (2 * half != parts.size()) return false;
    for (size_t i = 0; i < half; ++i)
        if (parts[half + i].first_channel != channels + parts[i].first_channel ||
            parts[half + i].channels != parts[i].channels)
            return false;
    return true;
}

const OctavoEngine::Weight& OctavoEngine::matrix(int32_t id, int64_t rows, int64_t cols) const {
    const Weight& weight = find_weight(id);
    if ((rows >= 0 && weight.rows != static_cast<size_t>(rows)) || weight.cols != static_cast<size_t>(cols))
        refuse("weight %d is [%zu, %zu], but its node needs [%lld, %lld]", id, weight.rows, weight.cols, (long long)rows,
               (long long)cols);
    return weight;
}

const float* OctavoEngine::vector(int32_t id, int64_t width) const {
    if (id < 0) return nullptr;
    const Weight& weight = matrix(id, 1, width);
    if (weight.values == nullptr) refuse("weight %d is a vector and must not be packed", id);
    return weight.values;
}

const OctavoEngine::Layer& OctavoEngine::kv_layer(const OctavoNode& node) const {
    if (node.kv_layer < 0 || static_cast<size_t>(node.kv_layer) >= layers_.size())
        refuse("there is no KV layer %d", node.kv_layer);
    const Layer& layer = layers_[static_cast<size_t>(node.kv_layer)];
    require(layer.layer.num_kv_heads == node.num_kv_heads && layer.layer.head_dim == node.head_dim, "KV layer", node);
    require(node.num_heads > 0 && node.num_heads % node.num_kv_heads == 0, "heads", node);
    return layer;
}

void OctavoEngine::check_node(const OctavoNode& node) const {
    const int64_t width = buffer(node.out).width, heads = int64_t{node.num_heads} * node.head_dim;
    const int32_t out_rows = buffer(node.out).logits_rows;
    if (node.x >= 0 && node.op != OCTAVO_GATHER_ROWS)
        require(buffer(node.x).logits_rows == out_rows, "kinds of rows", node);
    switch (node.op) {
        case OCTAVO_EMBEDDING:
            require(!out_rows && (node.weight >= 0 || node.extra >= 0), "rows", node);
            if (node.weight >= 0) matrix(node.weight, -1, width);
            if (node.extra >= 0) matrix(node.extra, -1, width);
            return;
        case OCTAVO_NORM:
            require(buffer(node.x).width == width && vector(node.weight, width), "widths", node);
            vector(node.bias, width);
            if (node.y >= 0) require(buffer(node.y).width == width && buffer(node.y).logits_rows == out_rows, "y", node);
            if (node.residual_out >= 0)
                require(buffer(node.residual_out).width == width && buffer(node.residual_out).logits_rows == out_rows,
                        "residual_out", node);
            return;
        case OCTAVO_ADD:
            require(buffer(node.x).width == width && buffer(node.y).width == width, "widths", node);
            require(buffer(node.y).logits_rows == out_rows, "kinds of rows", node);
            return;
        case OCTAVO_LINEAR: {
            require(node.activation >= OCTAVO_NONE && node.activation <= OCTAVO_GELU_TANH_MUL, "activation", node);
            const int64_t rows = node.activation >= OCTAVO_SILU_MUL ? 2 * width : width;
            const Weight& weight = matrix(node.weight, rows, buffer(node.x).width);
            if (rows != width && weight.values == nullptr)
                require(weight.halves_agree(static_cast<size_t>(width)), "parts of gate and up", node);
            vector(node.bias, rows);
            return;
        }
        case OCTAVO_EXPERTS: return check_experts(node);
        case OCTAVO_ROPE_KV_WRITE:
            kv_layer(node);
            require(!out_rows && width == heads, "out", node);
            require(buffer(node.x).width == heads + 2 * int64_t{node.num_kv_heads} * node.head_dim, "qkv", node);
            vector(node.weight, node.head_dim);
            vector(node.extra, node.head_dim);
            if (node.rope >= 0) {
                require(static_cast<size_t>(node.rope) < ropes_.size(), "rope", node);
                require(2 * ropes_[static_cast<size_t>(node.rope)].half <= node.head_dim, "rope width", node);
            }
            return;
        case OCTAVO_ATTENTION:
            kv_layer(node);
            require(!out_rows && width == heads && buffer(node.x).width == heads && node.window >= 0, "widths", node);
            return;
        case OCTAVO_GATHER_ROWS:
            require(buffer(node.x).width == width && !buffer(node.x).logits_rows && out_rows, "widths", node);
            return;
        default: refuse("there is no op %d", node.op);
    }
}

void OctavoEngine::check_experts(const OctavoNode& node) const {
    const OctavoBuffer &out = buffer(node.out), &scores = buffer(node.y);
    const int64_t count = node.num_experts;
    require(count > 0 && count <= 65536 && node.top_k > 0 && node.top_k <= count, "top_k", node);
    require(node.activation >= OCTAVO_SILU_MUL && node.activation <= OCTAVO_GELU_TANH_MUL, "activation", node);
    require(scores.logits_rows == out.logits_rows && scores.width == count + (node.shared >= 0), "scores", node);
    if (node.shared >= 0)
        require(buffer(node.shared).logits_rows == out.logits_rows && buffer(node.shared).width == out.width, "shared",
                node);
    const Weight& pair = matrix(node.weight, -1, buffer(node.x).width);
    const auto experts = static_cast<size_t>(count), inner = pair.rows / (2 * experts);
    require(inner > 0 && pair.rows == 2 * experts * inner, "gate and up", node);
    const Weight& down = matrix(node.extra, count * out.width, static_cast<int64_t>(inner));
    const auto even = [](const Weight& weight, size_t parts) {
        return weight.values != nullptr ||
               (weight.parts.size() == parts && std::all_of(weight.parts.begin(), weight.parts.end(), [&](const auto& p) {
                    return p.channels == weight.rows / parts;
                }));
    };
    require(even(pair, 2 * experts) && even(down, experts), "parts of experts", node);
}

void OctavoEngine::check_step(const OctavoStep& s) const {
    if (nodes_.empty() || (num_blocks_ == 0 && !layers_.empty())) refuse("no program or no KV cache is loaded");
    if (s.num_tokens < 0 || s.num_tokens > max_tokens_)
        refuse("%lld tokens in a step; at most %lld", (long long)s.num_tokens, (long long)max_tokens_);
    if (s.num_logits < 0 || s.num_states < 0 || s.num_logits + s.num_states > max_logits_)
        refuse("%lld and %lld positions go to the end of a step; at most %lld", (long long)s.num_logits,
               (long long)s.num_states, (long long)max_logits_);
    if (s.num_requests < 0 || s.num_requests > max_requests_)
        refuse("%lld requests in a step; at most %lld", (long long)s.num_requests, (long long)max_requests_);
    check_ids("token_ids", s.token_ids, s.num_tokens, vocab_);
    check_ids("positions", s.positions, s.num_tokens, max_positions_);
    check_ids("logits_indices", s.logits_indices, s.num_logits + s.num_states, s.num_tokens);
    const int64_t num_slots = num_blocks_ * block_size_;
    for (int64_t i = 0; i < num_groups_ * s.num_tokens; ++i)
        if (s.slots[i] < 0 || s.slots[i] >= num_slots)
            refuse("slots[%lld] is %lld, but the pool has %lld", (long long)i, (long long)s.slots[i], (long long)num_slots);
    check_rows(s);
    check_sampling(s);
}

void OctavoEngine::check_rows(const OctavoStep& s) const {
    check_ragged("query", s.query_start_loc, s.num_requests, s.num_tokens);
    if (layers_.empty()) return;
    for (int64_t b = 0; b < s.num_requests; ++b) {
        const int64_t length = s.seq_lens[b], queries = s.query_start_loc[b + 1] - s.query_start_loc[b];
        if (length < queries || length > INT32_MAX - 1024)
            refuse("seq_lens[%lld] is %lld with %lld queries", (long long)b, (long long)length, (long long)queries);
        const int64_t blocks = (length + block_size_ - 1) / block_size_;
        if (blocks > s.max_blocks)
            refuse("seq_lens[%lld] needs %lld blocks, but its table has %lld", (long long)b, (long long)blocks,
                   (long long)s.max_blocks);
        for (int64_t g = 0; g < num_groups_; ++g)
            check_ids("block_tables", s.block_tables + (g * s.num_requests + b) * s.max_blocks, blocks, num_blocks_);
    }
}

void OctavoEngine::check_sampling(const OctavoStep& s) const {
    const int64_t vocab = buffer(logits_).width;
    check_ragged("bias", s.bias_start, s.num_logits, s.num_bias);
    check_ragged("seen", s.seen_start, s.num_logits, s.num_seen);
    check_ids("bias_ids", s.bias_ids, s.num_bias, vocab);
    check_ids("seen_ids", s.seen_ids, s.num_seen, vocab);
    for (int64_t r = 0; s.mask_of && r < s.num_logits; ++r)
        if (s.mask_of[r] < -1 || s.mask_of[r] >= s.num_masks)
            refuse("mask_of[%lld] is %d, with %lld masks", (long long)r, s.mask_of[r], (long long)s.num_masks);
    for (int64_t r = 0; r < s.num_logits; ++r)
        if (s.num_logprobs[r] > s.max_logprobs)
            refuse("num_logprobs[%lld] is %d, above %lld", (long long)r, s.num_logprobs[r], (long long)s.max_logprobs);
}
