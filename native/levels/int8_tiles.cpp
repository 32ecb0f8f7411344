// The int8 Linear (int8.h) on AMX: a block of a group is a B tile of unsigned bytes, 64 codes of 16 rows are an A tile of
// signed ones, as they lie. Sums are exact, so that all that differs from the byte dot products of avx512bf16 is time;
// few rows, which only wait for weights, are left to those.
#include "../int8.h"

#include "tile_passes.h"

namespace octavo::avx512bf16 {
extern const PackedKernels int8;
}

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kFewRows = 4;
static_assert(kInt8BlockBytes == kTileBytes && kInt8Block == kTileRowBytes);

struct Int8Tiles {
    using Sum = int32_t;
    const uint8_t* x;
    size_t depth, row_bytes;

    template <int C, int A, int B>
    static OCTAVO_FORCED void multiply() {
        multiply_byte_tiles<C, A, B>();
    }

    struct Lines {
        const uint8_t* data;
        size_t ahead;

        const uint8_t* at(size_t block) const { return data + block * kInt8BlockBytes; }
        OCTAVO_FORCED void prepare(size_t block) const {
            const uint8_t* next = at(block) + ahead;
#pragma GCC unroll 1
            for (size_t i = 0; i < kInt8BlockBytes; i += kInt8LineBytes) __builtin_prefetch(next + i, 0, 2);
        }
    };

    RowTiles rows(const PackedArgs&) const { return {x, row_bytes, kInt8Block, kTileMaxRows * row_bytes}; }
    Lines lines(const Part& part, size_t group, size_t ahead, size_t, size_t) const {
        return {part.data + group * part.group_bytes, ahead};
    }
    struct Values {
        Floats scales;
        const uint8_t* tail;
        size_t row_bytes;

        OCTAVO_FORCED Values(const Int8Tiles& kind, const Part& part, size_t group, size_t row)
            : tail(kind.x + row * kind.row_bytes + kind.depth), row_bytes(kind.row_bytes) {
            const uint8_t* end = part.data + group * part.group_bytes + int8_scales_at(kind.depth / kInt8Block);
            scales = load(reinterpret_cast<const float*>(end));
        }
        OCTAVO_FORCED Floats of(size_t n, const int32_t* sums) const {
            float scale;  // by itself: both at once would be taken apart by way of other registers
            int32_t correction;
            std::memcpy(&scale, tail + n * row_bytes + offsetof(Int8Tail, scale), sizeof scale);
            std::memcpy(&correction, tail + n * row_bytes + offsetof(Int8Tail, correction), sizeof correction);
            Ints total;
            std::memcpy(&total, sums, sizeof total);
            return __builtin_convertvector(total + correction, Floats) * (scale * scales);
        }
    };
};

void int8_linear(const PackedArgs& a, size_t index, size_t first_group, size_t last_group, void* scratch) {
    const PackedKernels& dots = avx512bf16::int8;
    if (a.num_rows <= kFewRows) return dots.linear(a, index, first_group, last_group, scratch);
    const Part &part = a.parts[index], *up = a.ups != nullptr ? a.ups + index : nullptr;
    const Int8Tiles kind = {static_cast<const uint8_t*>(a.x), a.depth, dots.row_bytes(a.depth)};
    run_passes(Work<Int8Tiles>{kind, a, part, up, finish_of(a.epilogue)}, first_group, last_group);
}

}  // namespace

// `dots` of avx512bf16 with the Linear of this level.
PackedKernels int8_on_tiles(PackedKernels dots) {
    dots.linear = int8_linear;
#if !defined(OCTAVO_EMULATE_TILES)
    dots.multiply_adds = byte_tile_multiply_adds;
#endif
    return dots;
}

}  // namespace octavo::OCTAVO_LEVEL
