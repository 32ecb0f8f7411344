// The C functions: each catches what its body throws.
#include "abi.h"

#include <memory>
#include <new>
#include <string>

#include "dequantize.h"
#include "engine.h"
#include "error.h"
#include "stores.h"

namespace {

thread_local std::string last_error;

template <class Body>
int32_t guarded(const Body& body) {
    try {
        body();
        return OCTAVO_OK;
    } catch (const octavo::Error& error) {
        last_error = error.message;
        return error.code;
    } catch (const std::bad_alloc&) {
        last_error = "out of memory";
        return OCTAVO_OUT_OF_MEMORY;
    } catch (const std::exception& error) {
        last_error = error.what();
        return OCTAVO_INTERNAL;
    } catch (...) {
        last_error = "unknown exception";
        return OCTAVO_INTERNAL;
    }
}

}  // namespace

int32_t octavo_abi_version() { return OCTAVO_ABI_VERSION; }

const char* octavo_level(const char* wanted) {
    const octavo::Kernels* kernels = octavo::find_kernels(wanted);
    return kernels == nullptr ? nullptr : kernels->name;
}

const char* octavo_error() { return last_error.c_str(); }

int32_t octavo_create(int32_t num_threads, const char* level, OctavoEngine** engine) {
    return guarded([&] {
        const octavo::Kernels* kernels = octavo::find_kernels(level);
        if (kernels == nullptr) octavo::refuse("this machine or this build has no level '%s'", level);
        if (num_threads < 1 || num_threads > 1024) octavo::refuse("%d threads; must be from 1 to 1024", num_threads);
        *engine = new OctavoEngine(static_cast<size_t>(num_threads), *kernels);
    });
}

void octavo_destroy(OctavoEngine* engine) { delete engine; }

int32_t octavo_add_weight(OctavoEngine* engine, int64_t rows, int64_t cols) {
    return guarded([&] { engine->add_weight(rows, cols); });
}

int32_t octavo_add_packed(OctavoEngine* engine, int64_t cols) {
    return guarded([&] { engine->add_packed(cols); });
}

int32_t octavo_add_part(OctavoEngine* engine, int32_t weight, int64_t rows, const char* store) {
    return guarded([&] { engine->add_part(weight, rows, store); });
}

int64_t octavo_part_bytes(const char* store, int64_t rows, int64_t cols) {
    return static_cast<int64_t>(octavo::part_bytes(store, rows, cols));
}

int32_t octavo_pack(OctavoEngine* engine, int32_t weight, int64_t first_row, int64_t num_rows, const char* type,
                    const void* data, int64_t num_bytes) {
    return guarded([&] { engine->pack(weight, first_row, num_rows, type, data, num_bytes); });
}

int64_t octavo_row_bytes(const char* type, int64_t cols) {
    const octavo::StoredType* stored = octavo::find_stored_type(type);
    if (stored == nullptr || cols <= 0 || cols % static_cast<int64_t>(stored->block_values) != 0) return 0;
    return cols / static_cast<int64_t>(stored->block_values) * static_cast<int64_t>(stored->block_bytes);
}

int32_t octavo_set_program(OctavoEngine* engine, const OctavoProgram* program) {
    return guarded([&] { engine->set_program(*program); });
}

int64_t octavo_kv_bytes(int32_t kv_type, int64_t num_kv_heads, int64_t head_dim) {
    const int64_t limit = octavo::kMaxHeadDim;
    if (kv_type < OCTAVO_KV_FLOAT32 || kv_type > OCTAVO_KV_INT8) return 0;
    if (num_kv_heads <= 0 || num_kv_heads > 65536 || head_dim <= 0 || head_dim > limit) return 0;
    const auto heads = static_cast<size_t>(num_kv_heads), dim = static_cast<size_t>(head_dim);
    return num_kv_heads * static_cast<int64_t>(octavo::kv_layout(kv_type, heads, dim).piece_bytes);
}

int32_t octavo_allocate_kv(OctavoEngine* engine, int64_t num_blocks, int64_t block_size, int32_t kv_type) {
    return guarded([&] { engine->allocate_kv(num_blocks, block_size, kv_type); });
}

int32_t octavo_copy_blocks(OctavoEngine* engine, const int64_t* pairs, int64_t num_pairs) {
    return guarded([&] { engine->copy_blocks(pairs, num_pairs); });
}

int32_t octavo_step(OctavoEngine* engine, const OctavoStep* step) {
    return guarded([&] { engine->step(*step); });
}

int32_t octavo_probe(OctavoEngine* engine, double* rates) {
    return guarded([&] { engine->probe(rates); });
}

const float* octavo_logits(OctavoEngine* engine) { return engine->logits(); }

const float* octavo_states(OctavoEngine* engine) { return engine->states(); }
