// Linear over packed weights (stores.h) on AMX. The first pass of a pair of groups (tile_passes.h) decodes quantised
// lines a block ahead of the tiles that use them; what is decoded serves all later passes.
//
// Few rows do without tiles: multiply-adds in the order of a tile cost less than decoding to memory.
#include "level.h"
#include "lines.h"
#include "simd.h"
#include "tile_passes.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kFewRows = 3;
static_assert(kLineBytes == kTileRowBytes && kBlockLines == kTileMaxRows);
static_assert(kBlockDepth * sizeof(Activation) == kTileRowBytes);

// PackedKernels::round_rows. An A tile after another: [16 rows][block], each [row][32 k].
void round_to_tiles(const float* x, size_t rows, size_t width, size_t depth, void* out) {
    for (size_t row = 0; row < rows; ++row, x += width) {
        uint8_t* tile = static_cast<uint8_t*>(out) + row / kTileMaxRows * kTileMaxRows * depth * sizeof(Activation) +
                        row % kTileMaxRows * kTileRowBytes;
        for (size_t i = 0; i < depth; i += kLanes) {
            const size_t left = i < width ? width - i : 0;
            Activation* to = reinterpret_cast<Activation*>(tile + i / kBlockDepth * kTileBytes) + i % kBlockDepth;
            store_rounded(to, left >= kLanes ? load(x + i) : load_part(x + i, left));
        }
    }
}

// ---- few rows

// Adds the products of the block to sums[row], lane for lane: a chain over the even k of a channel and one over the odd
// ones in neighbouring lanes, from zero, then their sum, as a tile does. x: [row][32 * num_blocks].
template <Layout L, size_t ROWS, size_t GROUPS>
inline void add_block(const uint8_t* const* groups, size_t block, const float* table, const float* x, size_t depth,
                      Floats (*sums)[GROUPS][kVectors]) {
    Floats chains[ROWS][GROUPS][kVectors] = {};
#pragma GCC unroll 2
    for (size_t g = 0; g < GROUPS; ++g)
        each_values<L>(groups[g], block, table, [&](size_t line, Floats* values) OCTAVO_INLINE_LAMBDA {
            if constexpr (L.bits != 16)
                for (size_t v = 0; v < kVectors; ++v) values[v] = round_beside(values[v]);
            for (size_t r = 0; r < ROWS; ++r) {
                double pair;
                std::memcpy(&pair, x + r * depth + block * kBlockDepth + 2 * line, sizeof pair);
                const Floats both = (Floats)_mm512_set1_pd(pair);
                for (size_t v = 0; v < kVectors; ++v) chains[r][g][v] = fma(values[v], both, chains[r][g][v]);
            }
        });
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t g = 0; g < GROUPS; ++g)
            for (size_t v = 0; v < kVectors; ++v)
                sums[r][g][v] += chains[r][g][v] + (Floats)_mm512_permute_ps((__m512)chains[r][g][v], 0xb1);
}

// out[row][g]: sums of `count` <= 2 groups.
template <Layout L, size_t ROWS>
void few(const PackedArgs& a, const Part& part, size_t group, size_t count, const float* x, float (*out)[2][kChannels]) {
    constexpr size_t groups = L.bits == 16 ? 2 : 1;  // decoding takes longer than the chains; without, two hide them
    const __m512i every_other = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (size_t first = 0; first < count; first += groups) {
        const uint8_t* data[groups];
        for (size_t g = 0; g < groups; ++g)
            data[g] = part.data + (group + (first + g < count ? first + g : first)) * part.group_bytes;
        Floats sums[ROWS][groups][kVectors] = {};
        for (size_t block = 0; block < a.num_blocks; ++block) {
            for (size_t g = 0; g < groups; ++g) fetch<L>(data[g], block, groups * part.group_bytes);
            add_block<L, ROWS, groups>(data, block, part.table, x, a.depth, sums);
        }
        for (size_t r = 0; r < ROWS; ++r)
            for (size_t g = 0; g < groups && first + g < count; ++g)
                store(out[r][first + g],
                      (Floats)_mm512_permutex2var_ps((__m512)sums[r][g][0], every_other, (__m512)sums[r][g][1]));
    }
}

using Few = void (*)(const PackedArgs&, const Part&, size_t group, size_t count, const float* x,
                     float (*out)[2][kChannels]);

template <size_t ROWS>
constexpr Few kFew[] = {few<kLayouts[0], ROWS>, few<kLayouts[1], ROWS>, few<kLayouts[2], ROWS>, few<kLayouts[3], ROWS>,
                        few<kLayouts[4], ROWS>, few<kLayouts[5], ROWS>, few<kLayouts[6], ROWS>, few<kLayouts[7], ROWS>,
                        few<kLayouts[8], ROWS>, few<kLayouts[9], ROWS>, few<kLayouts[10], ROWS>,
                        few<kLayouts[11], ROWS>};

void few_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t last_group, float* x) {
    for (size_t r = 0; r < a.num_rows; ++r)
        for (size_t block = 0; block < a.num_blocks; ++block) {
            const uint8_t* row = static_cast<const uint8_t*>(a.x) + block * kTileBytes + r * kTileRowBytes;
            for (size_t i = 0; i < kBlockDepth; i += kLanes)
                store(x + r * a.depth + block * kBlockDepth + i, load(reinterpret_cast<const Activation*>(row) + i));
        }
    const Few* kernels = a.num_rows == 1 ? kFew<1> : a.num_rows == 2 ? kFew<2> : kFew<3>;
    float sums[kFewRows][2][kChannels], ups[kFewRows][2][kChannels];
    for (; group < last_group; group += 2) {
        const size_t count = last_group - group < 2 ? 1 : 2;
        kernels[part.layout](a, part, group, count, x, sums);
        if (up != nullptr) kernels[up->layout](a, *up, group, count, x, ups);
        for (size_t r = 0; r < a.num_rows; ++r)
            for (size_t g = 0; g < count; ++g)
                finish_group(a, part, group + g, r, sums[r][g], up != nullptr ? ups[r][g] : nullptr);
    }
}

// ---- tiles

struct BFloat16Tiles {
    using Sum = float;
    uint8_t* scratch;

    template <int C, int A, int B>
    static OCTAVO_FORCED void multiply() {
        multiply_tiles<C, A, B>();
    }

    // Where they lie, or where they are decoded to.
    struct Lines {
        const Part* part;
        size_t group;
        size_t ahead;     // bytes to the group whose turn comes next
        uint8_t* buffer;  // for blocks modulo `kept`; null: lines need no decoding
        size_t kept;

        const uint8_t* at(size_t block) const {
            if (buffer == nullptr) return part->data + group * part->group_bytes + block * kTileBytes;
            return buffer + block % kept * kTileBytes;
        }
        void prepare(size_t block) const {
            if (buffer != nullptr)
                kDecode[part->layout](*part, group, block, block + 1, ahead, buffer + block % kept * kTileBytes);
            else
                fetch<kLayouts[0]>(part->data + group * part->group_bytes, block, ahead);
        }
    };

    RowTiles rows(const PackedArgs& a) const {
        return {static_cast<const uint8_t*>(a.x), kTileRowBytes, kTileBytes, a.num_blocks * kTileBytes};
    }
    Lines lines(const Part& part, size_t group, size_t ahead, size_t slot, size_t kept) const {
        const bool plain = kLayouts[part.layout].bits == 16;
        return {&part, group, ahead, plain ? nullptr : scratch + slot * kept * kTileBytes, kept};
    }
    struct Values {
        Values(const BFloat16Tiles&, const Part&, size_t, size_t) {}
        Floats of(size_t, const float* sums) const { return load(sums); }
    };
};

void packed_linear(const PackedArgs& a, size_t index, size_t first_group, size_t last_group, void* scratch) {
    const Part &part = a.parts[index], *up = a.ups != nullptr ? a.ups + index : nullptr;
    if (a.num_rows <= kFewRows)
        return few_rows(a, part, up, first_group, last_group, static_cast<float*>(scratch));
    const BFloat16Tiles kind = {static_cast<uint8_t*>(scratch)};
    run_passes(Work<BFloat16Tiles>{kind, a, part, up, finish_of(a.epilogue)}, first_group, last_group);
}

// A pair's panel, two blocks of each source, or few rows as floats.
size_t packed_scratch(size_t depth) {
    const size_t panel = 2 * depth / kBlockDepth * kTileBytes, ring = 2 * kSources * kTileBytes;
    const size_t most = panel > ring ? panel : ring, floats = kFewRows * depth * sizeof(float);
    return most > floats ? most : floats;
}

}  // namespace

const PackedKernels packed = {sizeof(Activation), round_to_tiles, packed_linear, packed_scratch};

}  // namespace octavo::OCTAVO_LEVEL
