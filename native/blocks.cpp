// Many rows: the row-wise nodes between two attentions run for a block of rows at a time, each block by one thread. What a
// block makes and uses itself lies in memory of its thread and stays in the caches of that core, where node by node a line
// is written by one core and read by another; and the threads wait for each other once, not at every node.
//
// Few rows run node by node, cut by channels: each block reads all weights, which then takes longer than multiplying.
#include <chrono>

#include "engine.h"

using namespace octavo;

namespace {

constexpr size_t kBlockRows = 256;  // at most
// A step that is cut into blocks has at least as many rows for each thread, by how many bytes its weights have.
constexpr size_t kMinRows = 160, kMinRowsInt8 = 64;

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

bool is_row_wise(const OctavoNode& node) {
    return node.op == OCTAVO_EMBEDDING || node.op == OCTAVO_NORM || node.op == OCTAVO_LINEAR ||
           node.op == OCTAVO_ROPE_KV_WRITE || node.op == OCTAVO_ADD;
}

}  // namespace

// Finds the runs of row-wise nodes, and where the buffers that only one run touches lie in the memory of a block: by slot,
// since within a block nodes run in order.
void OctavoEngine::plan_blocks() {
    constexpr size_t none = SIZE_MAX, many = SIZE_MAX - 1;
    const auto at = [](int32_t id) { return static_cast<size_t>(id); };
    run_ends_.assign(nodes_.size(), 0);
    std::vector<size_t> run_of(buffers_.size(), none);  // the first node of the only run that touches a buffer
    size_t run = many;
    for (size_t i = 0; i < nodes_.size(); ++i) {
        const OctavoNode& node = nodes_[i];
        if (!is_row_wise(node) || buffers_[at(node.out)].logits_rows)
            run = many;
        else if (run == many)
            run = i;
        if (run != many) run_ends_[run] = i + 1;
        for (const int32_t id : {node.x, node.y, node.out, node.residual_out, node.shared})
            if (id >= 0) run_of[at(id)] = run_of[at(id)] == none || run_of[at(id)] == run ? run : many;
    }
    // Of other buffers two in one slot must have rows of one width, or those of a block would be another block's.
    std::vector<size_t> slot_widths(slots_.size(), 0);
    for (size_t i = 0; i < nodes_.size(); ++i) {
        std::vector<size_t> widths(slots_.size(), 0);
        for (size_t n = i, end = run_ends_[i]; n < end; ++n)
            for (const int32_t id : {nodes_[n].x, nodes_[n].y, nodes_[n].out, nodes_[n].residual_out}) {
                if (id < 0) continue;
                const bool own = run_of[at(id)] == i;
                size_t& in_slot = (own ? slot_widths : widths)[at(buffers_[at(id)].slot)];
                if (!own && in_slot != 0 && in_slot != width(id)) run_ends_[i] = 0;
                in_slot = std::max(in_slot, width(id));
            }
    }
    const bool int8 = std::any_of(weights_.begin(), weights_.end(), [](const Weight& weight) { return weight.is_int8(); });
    min_blocks_tokens_ = (int8 ? kMinRowsInt8 : kMinRows) * pool_.num_threads();
    const size_t most = static_cast<size_t>(max_tokens_);
    block_rows_ = std::min(kBlockRows, round_up(divide_up(most, pool_.num_threads()), kRoundedRows));
    std::vector<size_t> places;
    size_t bytes = 0, rounded = 0;
    for (const size_t slot_width : slot_widths) {
        places.push_back(bytes);
        bytes += round_up(block_rows_ * slot_width * sizeof(float), 64);
    }
    for (size_t id = 0; id < buffers_.size(); ++id)
        block_places_.push_back(run_of[id] < many ? places[at(buffers_[id].slot)] : kShared);
    for (const OctavoNode& node : nodes_) {
        if (node.op != OCTAVO_LINEAR || weights_[at(node.weight)].values != nullptr) continue;
        const PackedKernels& kernels = kernels_of(weights_[at(node.weight)]);
        rounded = std::max(rounded, block_rows_ * kernels.row_bytes(round_up(width(node.x), kernels.block_depth)));
    }
    block_rounded_ = bytes;
    for (size_t thread = 0; most >= min_blocks_tokens_ && thread < pool_.num_threads(); ++thread)
        block_memory_.emplace_back(bytes + rounded, true);
}

// Runs nodes [first_node, last_node). Of the time that passes, each gets its share.
void OctavoEngine::run_blocks(size_t first_node, size_t last_node, const OctavoStep& step, OctavoNodeTime* times) {
    using Clock = std::chrono::steady_clock;
    const size_t tokens = static_cast<size_t>(step.num_tokens), threads = pool_.num_threads();
    const size_t wanted = threads * divide_up(tokens, threads * block_rows_);
    const size_t size = round_up(divide_up(tokens, wanted), kRoundedRows), count = divide_up(tokens, size);
    const size_t num_nodes = last_node - first_node;
    if (times != nullptr) block_times_.assign(threads * num_nodes, 0);
    const auto start = Clock::now();
    const uint64_t loops = pool_.num_loops();
    shares_.fill(count);
    pool_.run(count, [&](size_t, size_t thread) {
        const size_t first = shares_.take(thread) * size;
        const RowRange rows = {first, std::min(size, tokens - first), thread, block_memory_[thread].as<char>()};
        for (size_t n = 0; n < num_nodes; ++n) {
            const auto began = times != nullptr ? Clock::now() : Clock::time_point{};
            run_rows(nodes_[first_node + n], step, rows);
            if (times != nullptr) block_times_[thread * num_nodes + n] += (Clock::now() - began).count();
        }
    });
    if (times == nullptr) return;
    const auto took = static_cast<double>(std::chrono::nanoseconds(Clock::now() - start).count());
    double all = 0.0;
    for (const int64_t part : block_times_) all += static_cast<double>(part);
    for (size_t n = 0; n < num_nodes; ++n) {
        double part = 0.0;
        for (size_t thread = 0; thread < threads; ++thread)
            part += static_cast<double>(block_times_[thread * num_nodes + n]);
        times[n] = {static_cast<int64_t>(took * part / all), n == 0 ? static_cast<int64_t>(pool_.num_loops() - loops) : 0};
    }
}
