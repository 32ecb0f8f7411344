// Linear over packed weights (stores.h) on AMX: 16 lines of a group are one B tile, rows of activations are A tiles.
//
// A tile of fewer rows gives the bits of the same rows in a full one, so few rows are just short tiles. Quantised
// lines are decoded to bf16 in the cache first: for up to 16 rows two blocks ahead of the tiles that use them, for
// more rows once for all of them.
#include "epilogue.h"
#include "level.h"
#include "lines.h"
#include "simd.h"
#include "tiles.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kSources = 4;      // groups whose sums short tiles hold together
constexpr size_t kChunkBlocks = 2;  // blocks decoded ahead
constexpr size_t kBlockBytes = kBlockLines * kLineBytes;
constexpr size_t kChunkBytes = kChunkBlocks * kBlockBytes;
static_assert(kLineBytes == kTileRowBytes && kBlockLines == kTileMaxRows);

using Sums = float[kTileMaxRows][kChannels];

struct Source {
    const Part* part;
    size_t group;
};

// Blocks [first, last) of a group as lines: decoded to `scratch`, or where they are. Groups so far `ahead` come next.
inline const uint8_t* lines_of(const Source& source, size_t first, size_t last, size_t ahead, uint8_t* scratch) {
    const Part& part = *source.part;
    if (kLayouts[part.layout].bits == 16) {
        const uint8_t* group = part.data + source.group * part.group_bytes;
        for (size_t block = first; block < last && last - first <= kChunkBlocks; ++block)
            fetch<kLayouts[0]>(group, block, ahead * part.group_bytes);
        return group + first * kBlockBytes;
    }
    kDecode[part.layout](part, source.group, first, last, ahead * part.group_bytes, scratch);
    return scratch;
}

// Tiles 0 to 3: sums. 4: activations. 5 to 7: weights.
void multiply_block(const uint8_t* const* lines, size_t count, size_t offset) {
    load_tile<5>(lines[0] + offset, kLineBytes);
    multiply_tiles<0, 4, 5>();
    if (count < 2) return;
    load_tile<6>(lines[1] + offset, kLineBytes);
    multiply_tiles<1, 4, 6>();
    if (count < 3) return;
    load_tile<7>(lines[2] + offset, kLineBytes);
    multiply_tiles<2, 4, 7>();
    if (count < 4) return;
    load_tile<5>(lines[3] + offset, kLineBytes);
    multiply_tiles<3, 4, 5>();
}

// sums[s] = up to 16 rows times the group sources[s]; tiles are configured. Groups so far `ahead` come next.
void short_tiles(const PackedArgs& a, const Source* sources, size_t count, size_t ahead, uint8_t* scratch,
                 Sums* sums) {
    const size_t chunks = (a.num_blocks + kChunkBlocks - 1) / kChunkBlocks;
    const uint8_t* lines[2][kSources];
    const auto fetch = [&](size_t chunk) {
        const size_t first = chunk * kChunkBlocks, end = first + kChunkBlocks;
        for (size_t s = 0; s < count; ++s)
            lines[chunk % 2][s] = lines_of(sources[s], first, end < a.num_blocks ? end : a.num_blocks, ahead,
                                           scratch + (chunk % 2 * kSources + s) * kChunkBytes);
    };
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    fetch(0);
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
        if (chunk + 1 < chunks) fetch(chunk + 1);
        for (size_t block = chunk * kChunkBlocks, i = 0; i < kChunkBlocks && block + i < a.num_blocks; ++i) {
            const Activation* x = static_cast<const Activation*>(a.x) + (block + i) * kBlockDepth;
            load_tile<4>(x, a.depth * sizeof(Activation));
            multiply_block(lines[chunk % 2], count, i * kBlockBytes);
        }
    }
    store_tile<0>(sums[0], kTileRowBytes);
    store_tile<1>(sums[1], kTileRowBytes);
    store_tile<2>(sums[2], kTileRowBytes);
    store_tile<3>(sums[3], kTileRowBytes);
}

void few_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t last_group, uint8_t* scratch) {
    TileConfig config;
    for (size_t tile = 0; tile < 5; ++tile) config.set(tile, a.num_rows);
    for (size_t tile = 5; tile < 8; ++tile) config.set(tile, kTileMaxRows);
    configure_tiles(config);
    alignas(64) Sums sums[kSources];
    const size_t together = up != nullptr ? kSources / 2 : kSources;
    for (; group < last_group; group += together) {
        const size_t count = last_group - group < together ? last_group - group : together;
        Source sources[kSources];
        for (size_t g = 0; g < count; ++g) {
            sources[g] = {&part, group + g};
            if (up != nullptr) sources[count + g] = {up, group + g};
        }
        short_tiles(a, sources, up != nullptr ? 2 * count : count, together, scratch, sums);
        for (size_t g = 0; g < count; ++g)
            for (size_t r = 0; r < a.num_rows; ++r)
                finish_group(a, part, group + g, r, sums[g][r], up != nullptr ? sums[count + g][r] : nullptr);
    }
}

// Tiles 0 to 3: sums, two groups x two tiles of rows. 4 and 5: activations. 6 and 7: weights.
void configure_pairs(size_t first_rows, size_t second_rows) {
    TileConfig config;
    constexpr size_t first[] = {0, 1, 4}, second[] = {2, 3, 5}, weights[] = {6, 7};
    for (const size_t tile : first) config.set(tile, first_rows);
    for (const size_t tile : second) config.set(tile, second_rows);
    for (const size_t tile : weights) config.set(tile, kTileMaxRows);
    configure_tiles(config);
}

// sums[2 * h + g] = rows of half h times group g, whose lines are at lines[g].
void pair_tiles(const PackedArgs& a, const uint8_t* const* lines, size_t row, bool second, Sums* sums) {
    const size_t stride = a.depth * sizeof(Activation);
    const Activation* x = static_cast<const Activation*>(a.x) + row * a.depth;
    zero_tile<0>();
    zero_tile<1>();
    if (second) {
        zero_tile<2>();
        zero_tile<3>();
    }
    for (size_t block = 0; block < a.num_blocks; ++block) {
        load_tile<4>(x + block * kBlockDepth, stride);
        load_tile<6>(lines[0] + block * kBlockBytes, kLineBytes);
        load_tile<7>(lines[1] + block * kBlockBytes, kLineBytes);
        multiply_tiles<0, 4, 6>();
        multiply_tiles<1, 4, 7>();
        if (second) {
            load_tile<5>(x + kTileMaxRows * a.depth + block * kBlockDepth, stride);
            multiply_tiles<2, 5, 6>();
            multiply_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(sums[0], kTileRowBytes);
    store_tile<1>(sums[1], kTileRowBytes);
    if (!second) return;
    store_tile<2>(sums[2], kTileRowBytes);
    store_tile<3>(sums[3], kTileRowBytes);
}

// Lines of two groups (of one twice at the end), decoded into scratch.
void pair_lines(const PackedArgs& a, const Part& part, size_t group, size_t count, uint8_t* scratch,
                const uint8_t** lines) {
    for (size_t g = 0; g < 2; ++g)
        lines[g] = g < count ? lines_of({&part, group + g}, 0, a.num_blocks, 2, scratch + g * a.num_blocks * kBlockBytes)
                             : lines[0];
}

void many_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t count, uint8_t* scratch) {
    const uint8_t *lines[2], *up_lines[2];
    pair_lines(a, part, group, count, scratch, lines);
    if (up != nullptr) pair_lines(a, *up, group, count, scratch + 2 * a.num_blocks * kBlockBytes, up_lines);
    alignas(64) Sums sums[4], ups[4];
    for (size_t row = 0; row < a.num_rows; row += 2 * kTileMaxRows) {
        const size_t rows = a.num_rows - row < 2 * kTileMaxRows ? a.num_rows - row : 2 * kTileMaxRows;
        const bool second = rows > kTileMaxRows;
        if (row == 0 || rows < 2 * kTileMaxRows)
            configure_pairs(second ? kTileMaxRows : rows, second ? rows - kTileMaxRows : 0);
        pair_tiles(a, lines, row, second, sums);
        if (up != nullptr) pair_tiles(a, up_lines, row, second, ups);
        for (size_t g = 0; g < count; ++g)
            for (size_t r = 0; r < rows; ++r) {
                const size_t tile = r / kTileMaxRows * 2 + g, at = r % kTileMaxRows;
                finish_group(a, part, group + g, row + r, sums[tile][at], up != nullptr ? ups[tile][at] : nullptr);
            }
    }
}

void packed_linear(const PackedArgs& a, size_t index, size_t first_group, size_t last_group, void* scratch) {
    const Part& part = a.parts[index];
    const Part* up = a.ups != nullptr ? a.ups + index : nullptr;
    uint8_t* memory = static_cast<uint8_t*>(scratch);
    if (a.num_rows <= kTileMaxRows)
        few_rows(a, part, up, first_group, last_group, memory);
    else
        for (size_t group = first_group; group < last_group; group += 2)
            many_rows(a, part, up, group, last_group - group < 2 ? 1 : 2, memory);
    release_tiles();
}

// Two chunks of each source, or panels of gate and up.
size_t packed_scratch(size_t depth) {
    const size_t panels = 2 * 2 * depth / kBlockDepth * kBlockBytes, chunks = 2 * kSources * kChunkBytes;
    return panels > chunks ? panels : chunks;
}

}  // namespace

const PackedKernels packed = {sizeof(Activation), round_rows, packed_linear, packed_scratch};

}  // namespace octavo::OCTAVO_LEVEL
