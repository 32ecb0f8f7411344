// Linear: the cut into tasks. Which task computes a channel changes nothing in its sum.
#include "denormals.h"
#include "engine.h"
#include "error.h"

using namespace octavo;

namespace {

constexpr size_t kMinTaskBytes = 16384;  // weights a task reads at least
constexpr size_t kTasksPerThread = 32;
constexpr size_t kFewRowsTasks = 4;    // the same for few rows, which read weights as fast as they come: longer runs
constexpr size_t kTaskGroups = 2;      // what the kernels compute together
constexpr size_t kSerialRows = 8;      // activations rounded by the caller: less work than waking anybody

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

}  // namespace

size_t OctavoEngine::Weight::up_part(size_t channels) const {
    size_t part = 0;
    while (part < parts.size() && parts[part].first_channel < channels) ++part;
    return part;
}

void OctavoEngine::linear(const OctavoNode& node, const RowRange& rows) {
    if (rows.count == 0) return;
    const Weight& weight = weights_[static_cast<size_t>(node.weight)];
    const Epilogue epilogue = {
        .bias = vector(node.bias, static_cast<int64_t>(weight.rows)),
        .out = data(node.out, rows),
        .channels = width(node.out),
        .activation = node.activation,
        .scale = node.scale,
        .softcap = node.softcap,
    };
    if (weight.values == nullptr) return packed_linear(node, weight, epilogue, rows);
    const LinearArgs args = {data(node.x, rows), weight.values, rows.count, weight.cols, epilogue};
    if (rows.alone()) return kernels_.linear(args, 0, epilogue.channels);
    const size_t channels = epilogue.channels, groups = divide_up(channels, kChannels);
    const size_t group_bytes = weight.rows * weight.cols * sizeof(float) / groups;
    const size_t even = divide_up(groups, pool_.num_threads() * kTasksPerThread);
    const size_t step = kChannels * std::max(even, divide_up(kMinTaskBytes, group_bytes));
    pool_.run(divide_up(channels, step), [&](size_t task, size_t) {
        kernels_.linear(args, task * step, std::min(channels, (task + 1) * step));
    });
}

void OctavoEngine::packed_linear(const OctavoNode& node, const Weight& weight, const Epilogue& epilogue,
                                 const RowRange& rows) {
    const PackedKernels& kernels = kernels_of(weight);
    const bool pairs = node.activation >= OCTAVO_SILU_MUL;
    const size_t num_parts = pairs ? weight.up_part(epilogue.channels) : weight.parts.size();
    const size_t blocks = divide_up(weight.cols, kernels.block_depth), depth = blocks * kernels.block_depth;
    const float* x = data(node.x, rows);
    char* rounded = rows.alone() ? rows.memory + block_rounded_ : rounded_.as<char>();
    const auto round = [&](size_t first, size_t last) {
        kernels.round_rows(x + first * weight.cols, last - first, weight.cols, depth,
                           rounded + first * kernels.row_bytes(depth));
    };
    if (rows.count <= kSerialRows)
        round(0, rows.count);
    else
        by_rows(rows, kRoundedRows, round);
    const PackedArgs args = {
        .x = rounded,
        .parts = weight.parts.data(),
        .ups = pairs ? weight.parts.data() + num_parts : nullptr,
        .num_rows = rows.count,
        .depth = depth,
        .num_blocks = blocks,
        .epilogue = epilogue,
    };
    if (rows.alone()) {
        const FlushDenormals as_tiles_do(!weight.is_int8());
        for (size_t part = 0; part < num_parts; ++part)
            kernels.linear(args, part, 0, args.parts[part].num_groups(), scratch_[rows.thread].as<void>());
        return;
    }
    const auto units_of = [](const Part& part) { return divide_up(part.num_groups(), kTaskGroups); };
    size_t bytes = 0, units = 0;
    for (size_t i = 0; i < num_parts; ++i) {
        bytes += args.parts[i].num_groups() * args.parts[i].group_bytes * (pairs ? 2 : 1);
        units += units_of(args.parts[i]);
    }
    // As many tasks of even size as keep the threads busy to the end, but none too small to be worth handing out.
    const size_t threads = pool_.num_threads();
    const size_t most = threads * (rows.count <= kSerialRows ? kFewRowsTasks : kTasksPerThread);
    const size_t wanted = round_up(std::max<size_t>(1, bytes * rows.count / kMinTaskBytes), threads);
    const size_t tasks = std::min({most, wanted, units});
    shares_.fill(tasks);
    pool_.run(tasks, [&](size_t, size_t thread) {
        const FlushDenormals as_tiles_do(!weight.is_int8());
        const size_t task = shares_.take(thread);
        size_t first = units * task / tasks, last = units * (task + 1) / tasks;  // counted from each part's own on
        for (size_t i = 0; i < num_parts && last > 0; ++i) {
            const size_t own = units_of(args.parts[i]);
            if (first < own)
                kernels.linear(args, i, first * kTaskGroups, std::min(args.parts[i].num_groups(), last * kTaskGroups),
                               scratch_[thread].as<void>());
            first -= std::min(first, own);
            last -= std::min(last, own);
        }
    });
}
