// Weights: reserving their memory, and converting stored tensors into it with all threads.
#include <algorithm>

#include "engine.h"
#include "error.h"
#include "int8.h"

using namespace octavo;

namespace {

constexpr size_t kValuesPerTask = 65536;

}  // namespace

void OctavoEngine::add_weight(int64_t rows, int64_t cols) {
    float* values = static_cast<float*>(weight_memory_.take(checked_size(rows, cols, "a weight") * sizeof(float)));
    weights_.push_back({values, static_cast<size_t>(rows), static_cast<size_t>(cols), {}, {}});
}

void OctavoEngine::add_packed(int64_t cols) {
    checked_size(1, cols, "a packed weight");
    weights_.push_back({nullptr, 0, static_cast<size_t>(cols), {}, {}});
}

void OctavoEngine::add_part(int32_t id, int64_t rows, const char* store) {
    find_weight(id);
    Weight& weight = weights_[static_cast<size_t>(id)];
    const size_t bytes = part_bytes(store, rows, static_cast<int64_t>(weight.cols));
    if (weight.values != nullptr || bytes == 0)
        refuse("weight %d cannot keep %lld rows of %zu as %s", id, (long long)rows, weight.cols, store);
    const StoredType* type = find_store(store);
    if (!weight.parts.empty() && weight.is_int8() != (type->layout == kInt8Layout))
        refuse("weight %d would be int8 in part", id);
    Part part = {static_cast<uint8_t*>(weight_memory_.take(bytes)), type->layout, type->table, 0, weight.rows,
                 static_cast<size_t>(rows)};
    part.group_bytes = bytes / part.num_groups();
    weight.parts.push_back(part);
    weight.stores.push_back(type);
    weight.rows += part.channels;
}

void OctavoEngine::pack(int32_t id, int64_t first_row, int64_t num_rows, const char* type_name, const void* data,
                        int64_t num_bytes) {
    const Weight& weight = find_weight(id);
    const StoredType* type = find_stored_type(type_name);
    const int64_t row_bytes = octavo_row_bytes(type_name, static_cast<int64_t>(weight.cols));
    if (type == nullptr || row_bytes == 0) refuse("a row of %zu values cannot be stored as %s", weight.cols, type_name);
    if (first_row < 0 || num_rows < 0 || static_cast<size_t>(first_row + num_rows) > weight.rows ||
        num_bytes != num_rows * row_bytes)
        refuse("%lld rows (%lld bytes) of %s do not fit at row %lld of a weight with %zu rows", (long long)num_rows,
               (long long)num_bytes, type_name, (long long)first_row, weight.rows);
    const uint8_t* source = static_cast<const uint8_t*>(data);
    if (weight.values != nullptr)
        return pack_floats(weight, static_cast<size_t>(first_row), static_cast<size_t>(num_rows), *type, source);
    for (size_t i = 0; i < weight.parts.size(); ++i)
        if (weight.parts[i].first_channel == static_cast<size_t>(first_row) &&
            weight.parts[i].channels == static_cast<size_t>(num_rows) &&
            (weight.stores[i] == type || weight.is_int8() || kLayouts[weight.parts[i].layout].bits == 16))
            return weight.is_int8() ? pack_int8(weight, i, *type, source) : pack_part(weight, i, *type, source);
    refuse("rows %lld to %lld of weight %d are no part that can hold %s", (long long)first_row,
           (long long)(first_row + num_rows), id, type_name);
}

void OctavoEngine::pack_floats(const Weight& weight, size_t first_row, size_t num_rows, const StoredType& type,
                               const uint8_t* data) {
    const size_t cols = weight.cols, row_bytes = cols / type.block_values * type.block_bytes;
    by_rows(num_rows, std::max<size_t>(1, kValuesPerTask / cols), [&](size_t first, size_t last) {
        dequantize(type, data + first * row_bytes, (last - first) * cols, weight.values + (first_row + first) * cols);
    });
}

void OctavoEngine::pack_part(const Weight& weight, size_t index, const StoredType& type, const uint8_t* data) {
    const Part& part = weight.parts[index];
    const StoredType& store = *weight.stores[index];
    const size_t cols = weight.cols, row_bytes = cols / type.block_values * type.block_bytes;
    const size_t groups_per_task = std::max<size_t>(1, kValuesPerTask / (cols * kChannels));
    std::vector<std::vector<float>> wide(pool_.num_threads(), std::vector<float>(cols));
    pool_.run((part.num_groups() + groups_per_task - 1) / groups_per_task, [&](size_t task, size_t thread) {
        const size_t last = std::min(part.num_groups(), (task + 1) * groups_per_task);
        for (size_t group = task * groups_per_task; group < last; ++group) {
            const size_t row = group * kChannels, rows = std::min(kChannels, part.channels - row);
            uint8_t* out = const_cast<uint8_t*>(part.data) + group * part.group_bytes;
            std::fill_n(out, part.group_bytes, uint8_t{0});
            pack_group(store, type, data + row * row_bytes, row_bytes, rows, cols, out, wide[thread].data());
        }
    });
}

void OctavoEngine::pack_int8(const Weight& weight, size_t index, const StoredType& type, const uint8_t* data) {
    const Part& part = weight.parts[index];
    const PackedKernels& kernels = *kernels_.int8;
    const size_t cols = weight.cols, row_bytes = cols / type.block_values * type.block_bytes;
    const size_t blocks = int8_blocks(cols), depth = blocks * kInt8Block;
    struct Scratch {
        std::vector<float> wide;
        std::vector<uint8_t> rounded;
    };
    const Scratch one = {std::vector<float>(kChannels * cols), std::vector<uint8_t>(kChannels * kernels.row_bytes(depth))};
    std::vector<Scratch> scratch(pool_.num_threads(), one);
    pool_.run(part.num_groups(), [&](size_t group, size_t thread) {
        auto& [wide, rounded] = scratch[thread];
        const size_t row = group * kChannels, rows = std::min(kChannels, part.channels - row);
        dequantize(type, data + row * row_bytes, rows * cols, wide.data());
        kernels.round_rows(wide.data(), rows, cols, depth, rounded.data());
        pack_int8_group(kernels, rounded.data(), rows, blocks, const_cast<uint8_t*>(part.data) + group * part.group_bytes);
    });
}
