// Linear over packed weights (stores.h) on AMX: 16 lines of a group are one B tile, rows of activations are A tiles.
//
// Two groups that go together, neighbours or gate and up, are a pair. A pass multiplies one pair with up to 32 rows,
// or two pairs with up to 16; a tile of fewer rows gives the bits of the same rows in a full one. The first pass of a
// pair decodes quantised lines a block ahead of the tiles that use them; what is decoded serves all later passes. The
// tile unit works on its own while the core decodes, or finishes the sums of the pass before.
//
// Few rows do without tiles: multiply-adds in the order of a tile cost less than decoding to memory.
#include "epilogue.h"
#include "level.h"
#include "lines.h"
#include "simd.h"
#include "tiles.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kFewRows = 3;
constexpr size_t kSources = 4;  // groups of a pass at most
constexpr size_t kBlockBytes = kBlockLines * kLineBytes;
constexpr size_t kPassRows = 2 * kTileMaxRows;
static_assert(kLineBytes == kTileRowBytes && kBlockLines == kTileMaxRows);
static_assert(kBlockDepth * sizeof(Activation) == kTileRowBytes);

// PackedKernels::round_rows. An A tile after another: [16 rows][block], each [row][32 k].
void round_to_tiles(const float* x, size_t rows, size_t width, size_t depth, void* out) {
    for (size_t row = 0; row < rows; ++row, x += width) {
        uint8_t* tile = static_cast<uint8_t*>(out) + row / kTileMaxRows * kTileMaxRows * depth * sizeof(Activation) +
                        row % kTileMaxRows * kTileRowBytes;
        for (size_t i = 0; i < depth; i += kLanes) {
            const size_t left = i < width ? width - i : 0;
            Activation* to = reinterpret_cast<Activation*>(tile + i / kBlockDepth * kBlockBytes) + i % kBlockDepth;
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
                        few<kLayouts[8], ROWS>, few<kLayouts[9], ROWS>, few<kLayouts[10], ROWS>};

void few_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t last_group, float* x) {
    for (size_t r = 0; r < a.num_rows; ++r)
        for (size_t block = 0; block < a.num_blocks; ++block) {
            const uint8_t* row = static_cast<const uint8_t*>(a.x) + block * kBlockBytes + r * kTileRowBytes;
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

// The lines of a group: where they lie, or where they are decoded to.
struct Lines {
    const Part* part;
    size_t group;
    size_t ahead;     // bytes to the group whose turn comes next
    uint8_t* buffer;  // for blocks modulo `kept`; null: lines need no decoding
    size_t kept;

    const uint8_t* at(size_t block) const {
        if (buffer == nullptr) return part->data + group * part->group_bytes + block * kBlockBytes;
        return buffer + block % kept * kBlockBytes;
    }
    void prepare(size_t block) const {
        if (buffer != nullptr)
            kDecode[part->layout](*part, group, block, block + 1, ahead, buffer + block % kept * kBlockBytes);
        else
            fetch<kLayouts[0]>(part->data + group * part->group_bytes, block, ahead);
    }
};

// What a pass summed, [tile] as multiply() numbers them; the epilogue follows during the next pass.
struct Sums {
    alignas(64) float tiles[kSources][kTileMaxRows][kChannels];
    size_t group, row, num_rows, num_tiles, num_sources;
    size_t finished;  // rows
};

struct Work {
    const PackedArgs& a;
    const Part& part;
    const Part* up;

    // Channels of each sum: the sources are groups, or each two are gate and up.
    size_t groups(size_t sources) const { return up != nullptr ? sources / 2 : sources; }

    void finish(Sums& s, size_t end) const {
        for (; s.finished < end; ++s.finished) {
            const size_t at = s.finished % kTileMaxRows, half = s.finished / kTileMaxRows * 2;
            for (size_t g = 0; g < groups(s.num_sources); ++g) {
                const size_t source = up != nullptr ? 2 * g : g;
                finish_group(a, part, s.group + g, s.row + s.finished, s.tiles[half + source][at],
                             up != nullptr ? s.tiles[half + source + 1][at] : nullptr);
            }
        }
    }
    // Asks for the outputs of a row that a pass is about to finish.
    void fetch_out(size_t group, size_t row, size_t num_groups) const {
        const float* out = a.epilogue.out + row * a.epilogue.channels + part.first_channel + group * kChannels;
        for (size_t g = 0; g < num_groups; ++g) __builtin_prefetch(out + g * kChannels, 1);
    }
};

// Tiles 0 to 3: sums of sources 0 to 3, or of two sources for the first and for the second tile of rows. 4: rows,
// 5: the second tile of them. Weights: 5 to 7, or 6 and 7.
template <bool SECOND>
inline void multiply(size_t source, const uint8_t* lines) {
    if constexpr (SECOND) {
        if (source == 0) return load_tile<6>(lines, kLineBytes), multiply_tiles<0, 4, 6>(), multiply_tiles<2, 5, 6>();
        return load_tile<7>(lines, kLineBytes), multiply_tiles<1, 4, 7>(), multiply_tiles<3, 5, 7>();
    }
    switch (source) {
        case 0: return load_tile<5>(lines, kLineBytes), multiply_tiles<0, 4, 5>();
        case 1: return load_tile<6>(lines, kLineBytes), multiply_tiles<1, 4, 6>();
        case 2: return load_tile<7>(lines, kLineBytes), multiply_tiles<2, 4, 7>();
        default: return load_tile<5>(lines, kLineBytes), multiply_tiles<3, 4, 5>();
    }
}

void configure(size_t num_rows) {
    TileConfig config;
    const size_t first = num_rows < kTileMaxRows ? num_rows : kTileMaxRows, second = num_rows - first;
    for (size_t tile = 0; tile < 8; ++tile) config.set(tile, kTileMaxRows);
    config.set(0, first), config.set(1, first), config.set(4, first);
    config.set(2, second == 0 ? first : second), config.set(3, second == 0 ? first : second);
    if (second != 0) config.set(5, second);
    configure_tiles(config);
}

// s = the sums of its rows. `fresh`: lines are not prepared yet. The sums `before` are finished on the way.
template <bool SECOND>
void pass(const Work& w, const Lines* lines, bool fresh, Sums& s, Sums& before) {
    const PackedArgs& a = w.a;
    const size_t num_blocks = a.num_blocks, tile_bytes = num_blocks * kBlockBytes;
    const uint8_t* x = static_cast<const uint8_t*>(a.x) + s.row / kTileMaxRows * tile_bytes;
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (size_t i = 0; fresh && i < s.num_sources; ++i) lines[i].prepare(0);
    size_t asked = 0;
    for (size_t block = 0; block < num_blocks; ++block) {
        load_tile_once<4>(x + block * kBlockBytes, kTileRowBytes);
        if constexpr (SECOND) load_tile_once<5>(x + tile_bytes + block * kBlockBytes, kTileRowBytes);
        for (size_t i = 0; i < s.num_sources; ++i) {
            if (fresh && block + 1 < num_blocks) lines[i].prepare(block + 1);
            multiply<SECOND>(i, lines[i].at(block));
        }
        for (; asked * num_blocks < (block + 1) * s.num_rows; ++asked)
            w.fetch_out(s.group, s.row + asked, w.groups(s.num_sources));
        w.finish(before, (block + 1) * before.num_rows / num_blocks);
    }
    w.finish(before, before.num_rows);
    store_tile<0>(s.tiles[0], kTileRowBytes);
    store_tile<1>(s.tiles[1], kTileRowBytes);
    store_tile<2>(s.tiles[2], kTileRowBytes);
    store_tile<3>(s.tiles[3], kTileRowBytes);
}

void many_rows(const Work& w, size_t group, size_t last_group, uint8_t* scratch) {
    const size_t num_rows = w.a.num_rows, most = num_rows <= kTileMaxRows ? kSources : kSources / 2;
    const size_t together = w.groups(most);
    Sums sums[2];
    sums[1].num_rows = sums[1].finished = 0;
    size_t turn = 0, configured = 0;
    for (; group < last_group; group += together) {
        const size_t groups = last_group - group < together ? last_group - group : together;
        const size_t num_sources = w.up != nullptr ? 2 * groups : groups;
        const size_t kept = num_rows <= kPassRows ? 2 : w.a.num_blocks;
        Lines lines[kSources];
        for (size_t i = 0; i < num_sources; ++i) {
            const Part* part = w.up != nullptr && i % 2 == 1 ? w.up : &w.part;
            const bool plain = kLayouts[part->layout].bits == 16;
            lines[i] = {part, group + (w.up != nullptr ? i / 2 : i), together * part->group_bytes,
                        plain ? nullptr : scratch + i * kept * kBlockBytes, kept};
        }
        for (size_t row = 0; row < num_rows; row += kPassRows, turn ^= 1) {
            const size_t rows = num_rows - row < kPassRows ? num_rows - row : kPassRows;
            Sums& s = sums[turn];
            s.group = group, s.row = row, s.num_rows = rows, s.num_sources = num_sources, s.finished = 0;
            if (rows != configured) configure(configured = rows);
            if (rows > kTileMaxRows)
                pass<true>(w, lines, row == 0, s, sums[turn ^ 1]);
            else
                pass<false>(w, lines, row == 0, s, sums[turn ^ 1]);
        }
    }
    w.finish(sums[turn ^ 1], sums[turn ^ 1].num_rows);
    release_tiles();
}

void packed_linear(const PackedArgs& a, size_t index, size_t first_group, size_t last_group, void* scratch) {
    const Work work = {a, a.parts[index], a.ups != nullptr ? a.ups + index : nullptr};
    if (a.num_rows <= kFewRows)
        few_rows(a, work.part, work.up, first_group, last_group, static_cast<float*>(scratch));
    else
        many_rows(work, first_group, last_group, static_cast<uint8_t*>(scratch));
}

// A pair's panel, two blocks of each source, or few rows as floats.
size_t packed_scratch(size_t depth) {
    const size_t panel = 2 * depth / kBlockDepth * kBlockBytes, ring = 2 * kSources * kBlockBytes;
    const size_t most = panel > ring ? panel : ring, floats = kFewRows * depth * sizeof(float);
    return most > floats ? most : floats;
}

}  // namespace

const PackedKernels packed = {sizeof(Activation), round_to_tiles, packed_linear, packed_scratch};

}  // namespace octavo::OCTAVO_LEVEL
