// Experts: rows grouped by the experts that they chose, so that the weights of an expert are read once for all its
// rows, and those of an expert without rows not at all.
//
// A pass takes experts in order, as many as its buffers hold rows for. There, the rows of an expert begin at a multiple
// of kRoundedRows, its `place`. What is computed for a row depends on that row alone, and its sum goes over its experts
// in order, whichever pass they are in.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "denormals.h"
#include "engine.h"
#include "error.h"

using namespace octavo;

namespace {

constexpr size_t kTasksPerThread = 8;
constexpr size_t kTaskGroups = 2;  // what the kernels compute together
constexpr size_t kReadRows = 8;    // reading an expert's weights takes as long as computing about so many rows

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace

OctavoEngine::ExpertSizes OctavoEngine::expert_sizes(const OctavoNode& node) const {
    const auto count = static_cast<size_t>(node.num_experts);
    const size_t inner = weights_[static_cast<size_t>(node.weight)].rows / (2 * count);
    const auto most = static_cast<size_t>(buffer(node.x).logits_rows ? max_logits_ : max_tokens_);
    // All rows may choose one expert; few rows for each of many shall be one pass.
    const size_t places = round_up(most, kRoundedRows) +
                          kRoundedRows * std::min(count, most * static_cast<size_t>(node.top_k));
    return {count, static_cast<size_t>(node.top_k), width(node.x), inner, width(node.out), places};
}

// What an input of `cols` takes at one place, as the weight's kernels read it.
size_t OctavoEngine::expert_row_bytes(const Weight& weight) const {
    if (weight.values != nullptr) return weight.cols * sizeof(float);
    const PackedKernels& kernels = kernels_of(weight);
    return kernels.row_bytes(round_up(weight.cols, kernels.block_depth));
}

void OctavoEngine::experts(const OctavoNode& node, size_t rows) {
    if (rows == 0) return;
    const ExpertSizes sizes = expert_sizes(node);
    const Weight& pair = weights_[static_cast<size_t>(node.weight)];
    const Weight& down = weights_[static_cast<size_t>(node.extra)];
    choose_experts(node, sizes, rows);
    float* inner = expert_sums_.as<float>();
    float* results = inner + sizes.places * sizes.inner;
    for (size_t first = 0, last = 0; first < expert_rows_.size(); first = last) {
        while (last < expert_rows_.size() &&
               expert_rows_[last].end_place() <= expert_rows_[first].place + sizes.places)
            ++last;
        const std::span<const ExpertRows> pass(expert_rows_.data() + first, last - first);
        const size_t base = pass[0].place, end = pass.back().end_place();
        round_for_experts(pair, pass, [&](size_t place, float* to) {
            std::memcpy(to, data(node.x) + expert_sources_[place] * sizes.width, sizes.width * sizeof(float));
        });
        expert_product(pair, pass, sizes.inner, node.activation, inner);
        round_for_experts(down, pass, [&](size_t place, float* to) {
            std::memcpy(to, inner + (place - base) * sizes.inner, sizes.inner * sizeof(float));
        });
        expert_product(down, pass, sizes.out, OCTAVO_NONE, results);
        by_rows(rows, kRowsPerTask, [&](size_t row, size_t last_row) {
            for (; row < last_row; ++row) {
                float* out = data(node.out) + row * sizes.out;
                if (first == 0) begin_expert_sum(node, sizes, row, out);
                for (size_t i = row * sizes.top_k; i < (row + 1) * sizes.top_k; ++i) {
                    const ExpertChoice& choice = expert_choices_[i];
                    if (choice.place < base || choice.place >= end) continue;
                    const float* result = results + (choice.place - base) * sizes.out;
                    for (size_t c = 0; c < sizes.out; ++c) out[c] += choice.share * result[c];
                }
            }
        });
    }
}

// The gated result of the shared expert, or zeros.
void OctavoEngine::begin_expert_sum(const OctavoNode& node, const ExpertSizes& sizes, size_t row, float* out) const {
    if (node.shared < 0) return void(std::fill_n(out, sizes.out, 0.0f));
    const float gate = 1.0f / (1.0f + std::exp(-data(node.y)[row * (sizes.count + 1) + sizes.count]));
    const float* shared = data(node.shared) + row * sizes.out;
    for (size_t c = 0; c < sizes.out; ++c) out[c] = gate * shared[c];
}

// Fills expert_choices_ (of each row, by expert), expert_rows_ (experts that have rows, in order) and expert_sources_.
void OctavoEngine::choose_experts(const OctavoNode& node, const ExpertSizes& sizes, size_t rows) {
    expert_choices_.resize(rows * sizes.top_k);
    const size_t score_width = width(node.y);
    by_rows(rows, kRoundedRows, [&](size_t row, size_t last) {
        for (; row < last; ++row)
            choose_for_row(data(node.y) + row * score_width, sizes.count,
                           {expert_choices_.data() + row * sizes.top_k, sizes.top_k}, node.renormalize != 0);
    });
    expert_counts_.assign(sizes.count, 0);
    for (const ExpertChoice& choice : expert_choices_) ++expert_counts_[choice.expert];
    expert_rows_.clear();
    size_t place = 0;
    for (size_t expert = 0; expert < sizes.count; ++expert) {
        const size_t count = expert_counts_[expert];
        if (count == 0) continue;
        expert_rows_.push_back({expert, place, count});
        expert_counts_[expert] = place;  // from here on: the next free place
        place += round_up(count, kRoundedRows);
    }
    expert_sources_.resize(place);
    for (size_t i = 0; i < expert_choices_.size(); ++i) {
        expert_choices_[i].place = expert_counts_[expert_choices_[i].expert]++;
        expert_sources_[expert_choices_[i].place] = i / sizes.top_k;
    }
}

// The largest scores, of equal ones the first, by expert; comparisons are written so that NaN is no trap.
void OctavoEngine::choose_for_row(const float* scores, size_t count, std::span<ExpertChoice> chosen, bool renormalize) {
    size_t size = 0;
    for (size_t expert = 0; expert < count; ++expert) {
        if (size == chosen.size() && !(scores[expert] > scores[chosen[size - 1].expert])) continue;
        size_t at = size < chosen.size() ? size++ : size - 1;
        for (; at > 0 && scores[expert] > scores[chosen[at - 1].expert]; --at) chosen[at] = chosen[at - 1];
        chosen[at].expert = expert;
    }
    const float top = scores[chosen[0].expert];
    std::sort(chosen.begin(), chosen.end(), [](const auto& a, const auto& b) { return a.expert < b.expert; });
    float total = 0.0f;
    for (ExpertChoice& choice : chosen) total += choice.share = std::exp(scores[choice.expert] - top);
    if (!renormalize) {
        total = 0.0f;
        for (size_t expert = 0; expert < count; ++expert) total += std::exp(scores[expert] - top);
    }
    for (ExpertChoice& choice : chosen) choice.share /= total;
}

// Puts the inputs of a pass where the weight's kernels read them; gather(place, to) copies one of them.
template <class Gather>
void OctavoEngine::round_for_experts(const Weight& weight, std::span<const ExpertRows> pass, const Gather& gather) {
    const size_t row_bytes = expert_row_bytes(weight), base = pass[0].place;
    std::vector<ExpertRows>& tiles = expert_tiles_;
    tiles.clear();
    for (const ExpertRows& rows : pass)
        for (size_t row = 0; row < rows.count; row += kRoundedRows)
            tiles.push_back({rows.expert, rows.place + row, std::min(kRoundedRows, rows.count - row)});
    pool_.run(tiles.size(), [&](size_t index, size_t thread) {
        const ExpertRows& tile = tiles[index];
        char* to = rounded_.as<char>() + (tile.place - base) * row_bytes;
        float* rows = weight.values != nullptr ? reinterpret_cast<float*>(to) : scratch_[thread].as<float>();
        for (size_t row = 0; row < tile.count; ++row) gather(tile.place + row, rows + row * weight.cols);
        if (weight.values != nullptr) return;
        const PackedKernels& kernels = kernels_of(weight);
        kernels.round_rows(rows, tile.count, weight.cols, round_up(weight.cols, kernels.block_depth), to);
    });
}

// out [places, channels] = the inputs of each expert in the pass times its matrix, or its pair of gate and up.
void OctavoEngine::expert_product(const Weight& weight, std::span<const ExpertRows> pass, size_t channels,
                                  int activation, float* out) {
    const bool pairs = activation >= OCTAVO_SILU_MUL;
    const size_t groups = divide_up(channels, kChannels), units = divide_up(groups, kTaskGroups);
    size_t work = 0;
    for (const ExpertRows& rows : pass) work += rows.count + kReadRows;
    expert_tasks_.clear();
    for (size_t i = 0; i < pass.size(); ++i) {
        const size_t wanted = divide_up(pool_.num_threads() * kTasksPerThread * (pass[i].count + kReadRows), work);
        const size_t tasks = std::min(units, wanted);
        for (size_t task = 0; task < tasks; ++task)
            expert_tasks_.push_back({i, units * task / tasks * kTaskGroups,
                                     std::min(groups, units * (task + 1) / tasks * kTaskGroups)});
    }
    const size_t row_bytes = expert_row_bytes(weight);
    pool_.run(expert_tasks_.size(), [&](size_t index, size_t thread) {
        const FlushDenormals as_tiles_do(weight.values == nullptr && !weight.is_int8());
        const LinearTask& task = expert_tasks_[index];
        const ExpertRows& rows = pass[task.part];
        const size_t first = rows.place - pass[0].place;
        const char* x = rounded_.as<char>() + first * row_bytes;
        const Epilogue epilogue = {
            .bias = nullptr,
            .out = out + first * channels,
            .channels = channels,
            .activation = activation,
            .scale = 1.0f,
            .softcap = 0.0f,
        };
        if (weight.values != nullptr) {
            const float* values = weight.values + rows.expert * (pairs ? 2 : 1) * channels * weight.cols;
            const LinearArgs args = {reinterpret_cast<const float*>(x), values, rows.count, weight.cols, epilogue};
            return kernels_.linear(args, task.first_group * kChannels, std::min(channels, task.last_group * kChannels));
        }
        const PackedKernels& kernels = kernels_of(weight);
        Part part = weight.parts[pairs ? 2 * rows.expert : rows.expert], up = part;
        if (pairs) up = weight.parts[2 * rows.expert + 1];
        part.first_channel = 0;
        up.first_channel = channels;
        const size_t blocks = divide_up(weight.cols, kernels.block_depth);
        const PackedArgs args = {
            .x = x,
            .parts = &part,
            .ups = pairs ? &up : nullptr,
            .num_rows = rows.count,
            .depth = blocks * kernels.block_depth,
            .num_blocks = blocks,
            .epilogue = epilogue,
        };
        kernels.linear(args, 0, task.first_group, task.last_group, scratch_[thread].as<void>());
    });
}
