// The KV cache and attention: the pool, and how a step's attention is cut into tasks.
#include "kv.h"

#include <algorithm>
#include <cstring>

#include "denormals.h"
#include "engine.h"
#include "error.h"

using namespace octavo;

namespace {

constexpr size_t kWhole = SIZE_MAX;
constexpr size_t kSplit = 4;  // a task of more than 1 / (kSplit * threads) of a layer's work is split, if it can be

}  // namespace

KVCache octavo::kv_layout(int32_t kv_type, size_t num_kv_heads, size_t head_dim) {
    const bool is_float = kv_type == OCTAVO_KV_FLOAT32;
    const size_t bytes = is_float ? 4 : kv_type == OCTAVO_KV_BFLOAT16 ? 2 : 1;
    KVCache c = {nullptr, kv_type, num_kv_heads, head_dim, 0, 0, 0, 0, 0};
    c.key_dim = round_up(head_dim, 4 / bytes);
    c.value_width = round_up(head_dim, kGroup);
    c.v_offset = round_up(kGroup * c.key_dim * bytes, 64);
    c.scale_offset = c.v_offset + kGroup * c.value_width * bytes;
    c.piece_bytes = c.scale_offset + (kv_type == OCTAVO_KV_INT8 ? 2 * kGroup * sizeof(float) : 0);
    return c;
}

void OctavoEngine::allocate_kv(int64_t num_blocks, int64_t block_size, int32_t kv_type) {
    constexpr int64_t most = int64_t{1} << 40;
    if (num_blocks <= 0 || block_size <= 0 || num_blocks > most / block_size)
        refuse("a KV pool of %lld blocks of %lld slots", (long long)num_blocks, (long long)block_size);
    if (kv_type < OCTAVO_KV_FLOAT32 || kv_type > OCTAVO_KV_INT8) refuse("there is no KV type %d", kv_type);
    const size_t groups = (static_cast<size_t>(num_blocks * block_size) + kGroup - 1) / kGroup;
    size_t bytes = 0;
    std::vector<size_t> starts(layers_.size());  // by place
    for (const size_t first : places_) {
        const Layer& layer = layers_[first];
        const KVCache cache = kv_layout(kv_type, layer.cache.num_kv_heads, layer.cache.head_dim);
        const size_t row = cache.num_kv_heads * cache.piece_bytes;
        if (row > (SIZE_MAX / 2 - bytes) / groups) throw Error{OCTAVO_OUT_OF_MEMORY, "cannot reserve so large a KV pool"};
        starts[static_cast<size_t>(layer.layer.place)] = bytes;
        bytes += round_up(groups * row, 4096);
    }
    kv_ = Mapping(bytes + 1024, false);  // a tile of AMX is read whole, also from a last piece that is shorter
    for (Layer& layer : layers_) {
        layer.cache = kv_layout(kv_type, layer.cache.num_kv_heads, layer.cache.head_dim);
        layer.cache.data = kv_.as<uint8_t>() + starts[static_cast<size_t>(layer.layer.place)];
    }
    num_blocks_ = num_blocks;
    block_size_ = block_size;
}

void OctavoEngine::copy_blocks(const int64_t* pairs, int64_t num_pairs) {
    for (int64_t i = 0; i < 2 * num_pairs; ++i)
        if (pairs[i] < 0 || pairs[i] >= num_blocks_) refuse("there is no block %lld", (long long)pairs[i]);
    const size_t size = static_cast<size_t>(block_size_);
    for (const size_t first : places_) {
        const KVCache& c = layers_[first].cache;
        if (size % kGroup == 0) {
            const size_t bytes = size / kGroup * c.num_kv_heads * c.piece_bytes;
            for (int64_t i = 0; i < num_pairs; ++i)
                std::memcpy(c.data + static_cast<size_t>(pairs[2 * i + 1]) * bytes,
                            c.data + static_cast<size_t>(pairs[2 * i]) * bytes, bytes);
            continue;
        }
        for (int64_t i = 0; i < num_pairs; ++i) {
            for (size_t offset = 0; offset < size; ++offset) {
                const size_t from = static_cast<size_t>(pairs[2 * i]) * size + offset;
                const size_t to = static_cast<size_t>(pairs[2 * i + 1]) * size + offset;
                for (size_t head = 0; head < c.num_kv_heads; ++head)
                    kernels_.kv->copy_slot(c, c.piece(from / kGroup, head), from % kGroup, c.piece(to / kGroup, head),
                                       to % kGroup);
            }
        }
    }
}

void OctavoEngine::rope_kv_write(const OctavoNode& node, const OctavoStep& step, const RowRange& rows) {
    const Layer& layer = layers_[static_cast<size_t>(node.kv_layer)];
    const OctavoRope* rope = node.rope < 0 ? nullptr : &ropes_[static_cast<size_t>(node.rope)];
    const RopeKVWriteArgs args = {
        .qkv = data(node.x, rows),
        .q = data(node.out, rows),
        .cache = layer.cache,
        .slots = step.slots + layer.layer.group * step.num_tokens + rows.first,
        .positions = step.positions + rows.first,
        .cos = rope ? rope->cos : nullptr,
        .sin = rope ? rope->sin : nullptr,
        .q_norm = vector(node.weight, node.head_dim),
        .k_norm = vector(node.extra, node.head_dim),
        .num_heads = static_cast<size_t>(node.num_heads),
        .half = rope ? static_cast<size_t>(rope->half) : 0,
        .eps = node.eps,
    };
    const size_t together = rows.count >= 4 * kGroup ? kGroup : kRowsPerTask;  // slots of one group share cache lines
    by_rows(rows, together, [&](size_t first, size_t last) { kernels_.kv->rope_kv_write(args, first, last); });
}

void OctavoEngine::attention(const OctavoNode& node, const OctavoStep& step) {
    const AttentionArgs args = {
        .q = data(node.x),
        .out = data(node.out),
        .cache = layers_[static_cast<size_t>(node.kv_layer)].cache,
        .num_heads = static_cast<size_t>(node.num_heads),
        .block_size = static_cast<size_t>(block_size_),
        .window = static_cast<size_t>(node.window),
        .scale = node.scale,
        .softcap = node.softcap,
    };
    const AttentionPlan& plan = plan_attention(node, step);
    shares_.fill(plan.tasks.size());
    pool_.run(plan.tasks.size(), [&](size_t, size_t thread) {
        const FlushDenormals in_softmax;
        const AttentionTask& task = plan.tasks[shares_.take(thread)];
        float* states = task.state == kWhole ? nullptr : states_.data() + task.state;
        kernels_.kv->attention(args, task.tile, task.last_head, task.first_range, task.last_range,
                               scratch_[thread].as<uint8_t>(), states);
    });
    pool_.run(plan.merges.size(), [&](size_t index, size_t) {
        const FlushDenormals in_softmax;
        const AttentionTask& task = plan.merges[index];
        kernels_.kv->attention_merge(args, task.tile, task.last_range - task.first_range, states_.data() + task.state);
    });
}

const OctavoEngine::AttentionPlan& OctavoEngine::plan_attention(const OctavoNode& node, const OctavoStep& step) {
    const Layer& layer = layers_[static_cast<size_t>(node.kv_layer)];
    const int32_t group = layer.layer.group, share = node.num_heads / node.num_kv_heads;
    auto plan = std::find_if(plans_.begin(), plans_.end(), [&](const AttentionPlan& p) {
        return p.group == group && p.share == share && p.num_kv_heads == node.num_kv_heads &&
               p.head_dim == node.head_dim && p.window == node.window;
    });
    if (plan == plans_.end())
        plan = plans_.insert(plan, {group, share, node.num_kv_heads, node.head_dim, node.window, 0, {}, {}});
    if (plan->step == step_number_) return *plan;
    plan->step = step_number_;
    plan->tasks.clear();
    const size_t rows = static_cast<size_t>(share), tile_tokens = std::max<size_t>(1, kernels_.kv->query_rows / rows);
    const size_t window = static_cast<size_t>(node.window), num_heads = layer.cache.num_kv_heads;
    const auto num_requests = static_cast<size_t>(step.num_requests), num_tokens = static_cast<size_t>(step.num_tokens);
    const bool whole = num_requests + num_tokens / tile_tokens >= kSplit * pool_.num_threads();
    const size_t task_heads = whole ? num_heads : 1;  // of a task: the heads of a token lie side by side in memory
    for (size_t b = 0; b < num_requests; ++b) {
        const size_t first = static_cast<size_t>(step.query_start_loc[b]);
        const size_t end = static_cast<size_t>(step.query_start_loc[b + 1]);
        const size_t past = static_cast<size_t>(step.seq_lens[b]) - (end - first);
        const int32_t* table = step.block_tables + (static_cast<size_t>(group) * num_requests + b) *
                                                       static_cast<size_t>(step.max_blocks);
        for (size_t token = first; token < end; token += tile_tokens) {
            const size_t position = past + token - first, count = std::min(tile_tokens, end - token);
            const size_t oldest = window != 0 && position + 1 > window ? position + 1 - window : 0;
            const size_t last = position + count;
            const size_t cost = (last - oldest) * (count * rows + kGroup);  // reading KV weighs as much as 16 rows
            for (size_t head = 0; head < num_heads; head += task_heads)
                plan->tasks.push_back({{table, token, position, count, head, nullptr, 0},
                                       head + task_heads,
                                       oldest / kKVRange,
                                       (last + kKVRange - 1) / kKVRange,
                                       kWhole,
                                       cost * task_heads});
        }
    }
    split(*plan, layer.cache);
    deal(plan->tasks);
    return *plan;
}

// Splits tasks that would keep one thread busy while the others have nothing left.
void OctavoEngine::split(AttentionPlan& plan, const KVCache& cache) {
    plan.merges.clear();
    size_t total = 0, floats = 0;
    for (const AttentionTask& task : plan.tasks) total += task.cost;
    const size_t most = total / (kSplit * pool_.num_threads());
    for (size_t i = plan.tasks.size(); i-- > 0 && pool_.num_threads() > 1;) {
        const AttentionTask task = plan.tasks[i];
        const size_t num_ranges = task.last_range - task.first_range;
        const size_t num_heads = task.last_head - task.tile.kv_head;
        if (task.cost <= most || num_heads * num_ranges < 2) continue;
        const size_t range_floats = kernels_.kv->attention_state(task.tile.num_tokens * static_cast<size_t>(plan.share), cache);
        plan.tasks[i].cost = 0;  // its place is taken by the parts
        for (size_t head = task.tile.kv_head; head < task.last_head; ++head) {
            AttentionTask part = task;
            part.tile.kv_head = head;
            part.last_head = head + 1;
            part.state = floats;
            plan.merges.push_back(part);
            part.cost = task.cost / (num_heads * num_ranges);
            for (part.last_range = part.first_range + 1; part.first_range < task.last_range;
                 ++part.first_range, ++part.last_range, part.state += range_floats)
                plan.tasks.push_back(part);
            floats += num_ranges * range_floats;
        }
    }
    std::erase_if(plan.tasks, [](const AttentionTask& task) { return task.cost == 0; });
    if (states_.size() < floats) states_.resize(floats);
}

// Gives each thread a run of as much work, the long tasks first; what one has not begun at its end, others may take.
void OctavoEngine::deal(std::vector<AttentionTask>& tasks) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
    const size_t threads = pool_.num_threads();
    std::vector<AttentionTask> dealt(tasks.size());
    size_t next = 0;
    for (size_t turn = 0; next < tasks.size(); ++turn)
        for (size_t thread = 0; thread < threads; ++thread) {
            const auto [first, end] = Shares::of(thread, threads, tasks.size());
            if (first + turn >= end) continue;
            AttentionTask& task = dealt[first + turn] = tasks[next++];
            if (turn == 0) continue;
            QueryTile& before = dealt[first + turn - 1].tile;
            before.next = &task.tile, before.next_range = task.first_range;
        }
    tasks = std::move(dealt);  // which stay where they are in memory
}
