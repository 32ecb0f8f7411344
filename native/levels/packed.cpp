// Linear over packed weights (stores.h): every line that is decoded serves all rows.
//
// Few rows: lines are used in the registers they are decoded in, and the packed bytes stream from memory once.
// Many rows: two groups are decoded into scratch, which stays in the cache for all rows. Both give an output the same
// sum: one chain per lane over the lines, in order (lines.h).
#include "epilogue.h"
#include "level.h"
#include "lines.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kTileRows = kLanes == 16 ? 8 : 6;  // rows of a tile: what the registers hold
constexpr size_t kFewRows = kLanes == 16 ? 4 : kLanes == 8 ? 1 : 0;  // rows whose sums fit beside the decoding
constexpr size_t kInterleaved = kLanes == 16 ? 2 : 1;  // groups whose lines take turns: a chain alone waits for itself
constexpr size_t kChunkBlocks = 4;                  // blocks that one tile of rows decodes at a time

// PackedKernels::round_rows.
void round_rows(const float* x, size_t rows, size_t width, size_t depth, void* out) {
    for (size_t row = 0; row < rows; ++row, x += width) {
        Activation* values = static_cast<Activation*>(out) + row * depth;
        for (size_t i = 0; i < depth; i += kLanes) {
            const size_t left = i < width ? width - i : 0;
            store_rounded(values + i, left >= kLanes ? load(x + i) : load_part(x + i, left));
        }
    }
}

// Calls use(g, line, strips) for the lines of a block of GROUPS groups; those of a group come in order, every four of
// them the groups take turns.
template <Layout L, size_t GROUPS, class Use>
OCTAVO_FORCED void take_turns(const uint8_t* const* groups, size_t block, const float* table, const Use& use) {
    constexpr size_t unit_lines = 4, units = kBlockLines / unit_lines, words = kVectors / 2;
    Scales scales[GROUPS];
    for (size_t unit = 0; unit < units; ++unit) {
        const size_t step = unit * L.steps() / units;
        for (size_t g = 0; g < GROUPS; ++g) {
            const uint8_t* payload = groups[g] + L.payload_at(block);
            if (unit % (units / L.steps()) == 0)
                scales[g] = load_scales<L>(groups[g] + L.header_at(block), groups[g] + L.scales_at(block), step);
            Words nibbles[words];
            if constexpr (L.bits == 4) std::memcpy(nibbles, payload + unit * 64, sizeof nibbles);
#pragma GCC unroll 4
            for (size_t i = 0; i < unit_lines; ++i) {
                const size_t line = unit * unit_lines + i;
                Floats values[kVectors];
                for (size_t v = 0; v < kVectors; ++v) {
                    if constexpr (L.bits == 4)
                        values[v] = unit_value<L>(nibbles, Table(table), i, v);
                    else
                        values[v] = load_codes(payload + line * 32 + v * kLanes);
                }
                scale_line<L>(scales[g], values);
                Strip strips[kStrips];
                to_strips(values, strips);
                use(g, line, strips);
            }
        }
    }
}

// Sums of one group or two: [rows][2][kChannels].
using Sums = float (*)[2][kChannels];

// `count` <= GROUPS groups that follow each other; what would lie past them is computed again and dropped.
// out: [GROUPS / 2][rows][2][kChannels]. Row r reads x row min(r, last_row).
template <Layout L, size_t ROWS, size_t GROUPS>
void few(const Part& part, size_t group, size_t count, const PackedArgs& a, Sums out) {
    const Activation* x[ROWS];
    for (size_t r = 0; r < ROWS; ++r)
        x[r] = static_cast<const Activation*>(a.x) + (r < a.num_rows ? r : a.num_rows - 1) * a.depth;
    const uint8_t* data[GROUPS];
    for (size_t g = 0; g < GROUPS; ++g) data[g] = part.data + (group + (g < count ? g : count - 1)) * part.group_bytes;
    const size_t ahead = GROUPS * part.group_bytes;  // the same block of the groups to come
    Floats totals[ROWS][GROUPS][kStrips] = {};
    for (size_t block = 0; block < a.num_blocks; ++block) {
        const size_t at = block * kBlockDepth;
#pragma GCC unroll 4
        for (size_t pair = 0; pair < GROUPS; pair += kInterleaved) {
            for (size_t g = pair; g < pair + kInterleaved; ++g)
                kInterleaved == 1 ? fetch<L>(data[g], block, ahead) : fetch_scales<L>(data[g], block, ahead);
            for (size_t r = 0; r < ROWS; ++r) asm("" : "+r"(x[r]));  // or pairs are kept for the next group, and spilt
            const auto add = [&](size_t g, size_t line, const Strip* strips) OCTAVO_INLINE_LAMBDA {
                if constexpr (kInterleaved > 1) fetch_line<L>(data[pair + g], block, line, ahead);
                for (size_t r = 0; r < ROWS; ++r) {
                    const Strip x_pair = load_pair(x[r] + at + 2 * line);
                    for (size_t s = 0; s < kStrips; ++s)
                        totals[r][pair + g][s] = multiply_add(strips[s], x_pair, totals[r][pair + g][s]);
                }
            };
            if constexpr (L.bits == 16 || kInterleaved == 1) {
                for (size_t g = 0; g < kInterleaved; ++g)
                    each_line<L>(data[pair + g], block, part.table,
                                 [&](size_t line, const Strip* strips) OCTAVO_INLINE_LAMBDA { add(g, line, strips); });
            } else {
                take_turns<L, kInterleaved>(data + pair, block, part.table, add);
            }
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t g = 0; g < GROUPS; ++g) channel_sums(totals[r][g], out[g / 2 * ROWS + r][g % 2]);
}

using Few = void (*)(const Part& part, size_t group, size_t count, const PackedArgs& a, Sums out);

template <Layout L>
constexpr Few pick_few(size_t rows, size_t groups) {
    if constexpr (kFewRows > 1) {
        if (rows == 2) return few<L, 2, 2>;
        if (rows == 4) return few<L, 4, 2>;
    }
    return groups == 4 ? few<L, 1, 4> : few<L, 1, 2>;
}

Few find_few(size_t layout, size_t rows, size_t groups) {
    switch (layout) {
        case 0: return pick_few<kLayouts[0]>(rows, groups);
        case 1: return pick_few<kLayouts[1]>(rows, groups);
        case 2: return pick_few<kLayouts[2]>(rows, groups);
        case 3: return pick_few<kLayouts[3]>(rows, groups);
        case 4: return pick_few<kLayouts[4]>(rows, groups);
        case 5: return pick_few<kLayouts[5]>(rows, groups);
        case 6: return pick_few<kLayouts[6]>(rows, groups);
        case 7: return pick_few<kLayouts[7]>(rows, groups);
        case 8: return pick_few<kLayouts[8]>(rows, groups);
        case 9: return pick_few<kLayouts[9]>(rows, groups);
        case 10: return pick_few<kLayouts[10]>(rows, groups);
        default: return pick_few<kLayouts[11]>(rows, groups);
    }
}

// Two strips of lines that follow each other: where they begin, and the bytes to the next line.
struct Strips {
    const uint8_t *first, *second;
    size_t line_bytes, ahead;  // ahead: where strips that come next begin, relative to these; 0 for none
};

// Sums of a tile, before even and odd k are added.
struct Totals {
    Floats v[kTileRows][2 * kStrips];
};

// Adds the products of both strips with rows x, x + depth, ... to totals.v[r][at] and [at + 1].
template <size_t ROWS>
inline void dot(const Strips& w, const Activation* x, size_t depth, size_t lines, Totals& totals, size_t at) {
    Floats total[ROWS][2];
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t s = 0; s < 2; ++s) total[r][s] = totals.v[r][at + s];
    for (size_t line = 0; line < lines; ++line) {
        const uint8_t *first_at = w.first + line * w.line_bytes, *second_at = w.second + line * w.line_bytes;
        const Strip first = load_strip(first_at), second = load_strip(second_at);
        if constexpr (kStrips == 1) {  // decoded panels are in the cache
            __builtin_prefetch(first_at + w.ahead, 0, kFetchTo);
            __builtin_prefetch(second_at + w.ahead, 0, kFetchTo);
        }
#pragma GCC unroll 8
        for (size_t r = 0; r < ROWS; ++r) {
            const Strip pair = load_pair(x + r * depth + 2 * line);
            total[r][0] = multiply_add(first, pair, total[r][0]);
            total[r][1] = multiply_add(second, pair, total[r][1]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t s = 0; s < 2; ++s) totals.v[r][at + s] = total[r][s];
}

inline void dot_rows(size_t rows, const Strips& w, const Activation* x, size_t depth, size_t lines, Totals& totals,
                     size_t at) {
    switch (rows) {
        case 1: return dot<1>(w, x, depth, lines, totals, at);
        case 2: return dot<2>(w, x, depth, lines, totals, at);
        case 3: return dot<3>(w, x, depth, lines, totals, at);
        case 4: return dot<4>(w, x, depth, lines, totals, at);
        case 5: return dot<5>(w, x, depth, lines, totals, at);
        case 6: return dot<6>(w, x, depth, lines, totals, at);
        case 7: return dot<kTileRows < 7 ? 1 : 7>(w, x, depth, lines, totals, at);
        case 8: return dot<kTileRows < 8 ? 1 : 8>(w, x, depth, lines, totals, at);
    }
}

// Lines of two groups (of one twice at the end of a part).
struct Panel {
    const uint8_t *first, *second;
    size_t ahead;
};

// Blocks [first, last) of two groups: decoded, but for bf16 lines, which are used where they are.
Panel decode_pair(const Part& part, size_t group, size_t count, size_t first, size_t last, uint8_t* scratch) {
    const size_t other = count == 2 ? group + 1 : group, ahead = 2 * part.group_bytes;
    if (kStrips == 1 && kLayouts[part.layout].bits == 16) {
        const uint8_t* lines = part.data + first * kBlockLines * kLineBytes;
        return {lines + group * part.group_bytes, lines + other * part.group_bytes, ahead};
    }
    uint8_t* second = count == 2 ? scratch + (last - first) * kBlockLines * kLineBytes : scratch;
    kDecode[part.layout](part, group, first, last, ahead, scratch);
    if (count == 2) kDecode[part.layout](part, other, first, last, ahead, second);
    return {scratch, second, 0};
}

// Adds the products of a panel with a tile of rows.
inline void multiply(const Panel& panel, const Activation* x, size_t rows, size_t depth, size_t lines, Totals& totals) {
    if constexpr (kStrips == 1)
        return dot_rows(rows, {panel.first, panel.second, kLineBytes, panel.ahead}, x, depth, lines, totals, 0);
    for (size_t s = 0; s < 2 * kStrips; s += 2) {
        const uint8_t* at = (s < kStrips ? panel.first : panel.second) + s % kStrips * kStripBytes;
        dot_rows(rows, {at, at + kStripBytes, kLineBytes, 0}, x, depth, lines, totals, s);
    }
}

void few_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t last_group) {
    const size_t rows = a.num_rows == 3 ? 4 : a.num_rows;
    float sums[2 * kFewRows][2][kChannels], ups[2 * kFewRows][2][kChannels];
    while (group < last_group) {
        const size_t left = last_group - group, groups = rows == 1 && left > 2 ? 4 : 2;
        const size_t count = left < groups ? left : groups;
        find_few(part.layout, rows, groups)(part, group, count, a, sums);
        if (up != nullptr) find_few(up->layout, rows, groups)(*up, group, count, a, ups);
        for (size_t g = 0; g < count; ++g)
            for (size_t r = 0; r < a.num_rows; ++r) {
                const size_t at = g / 2 * rows + r;
                finish_group(a, part, group + g, r, sums[at][g % 2], up != nullptr ? ups[at][g % 2] : nullptr);
            }
        group += count;
    }
}

// A tile of rows: tiles are of even height, because a last one of one row would cost as much as one of four.
struct Tile {
    size_t row, rows;
    Totals gate{}, up{};

    Tile(const PackedArgs& a, size_t index, size_t tiles)
        : row(a.num_rows * index / tiles), rows(a.num_rows * (index + 1) / tiles - row) {}
};

// Two groups for all rows. Few tiles keep their sums while blocks pass through the first cache; many tiles take turns
// at a panel of the whole depth.
void many_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t count, uint8_t* scratch) {
    const size_t tiles = (a.num_rows + kTileRows - 1) / kTileRows;
    const size_t chunk = tiles == 1 && kChunkBlocks < a.num_blocks ? kChunkBlocks : a.num_blocks;
    uint8_t* up_scratch = scratch + 2 * chunk * kBlockLines * kLineBytes;
    const auto panels = [&](size_t first, size_t last, Panel& panel, Panel& up_panel) {
        panel = decode_pair(part, group, count, first, last, scratch);
        if (up != nullptr) up_panel = decode_pair(*up, group, count, first, last, up_scratch);
    };
    const Outputs outputs(a, part, up, group, count);
    Panel panel, up_panel;
    if (chunk == a.num_blocks) panels(0, chunk, panel, up_panel);
    for (size_t i = 0; i < tiles; ++i) {
        Tile tile(a, i, tiles);
        outputs.fetch(tile.row, tile.rows);
        const Activation* x = static_cast<const Activation*>(a.x) + tile.row * a.depth;
        for (size_t first = 0; first < a.num_blocks; first += chunk) {
            const size_t last = first + chunk < a.num_blocks ? first + chunk : a.num_blocks;
            if (chunk < a.num_blocks) panels(first, last, panel, up_panel);
            const size_t lines = (last - first) * kBlockLines;
            multiply(panel, x + first * kBlockDepth, tile.rows, a.depth, lines, tile.gate);
            if (up != nullptr) multiply(up_panel, x + first * kBlockDepth, tile.rows, a.depth, lines, tile.up);
        }
        for (size_t r = 0; r < tile.rows; ++r)
            for (size_t g = 0; g < count; ++g) {
                float sums[kChannels], ups[kChannels];
                channel_sums(tile.gate.v[r] + g * kStrips, sums);
                if (up != nullptr) channel_sums(tile.up.v[r] + g * kStrips, ups);
                outputs.finish(tile.row + r, g, sums, ups);
            }
    }
}

void packed_linear(const PackedArgs& a, size_t index, size_t first_group, size_t last_group, void* scratch) {
    const Part& part = a.parts[index];
    const Part* up = a.ups != nullptr ? a.ups + index : nullptr;
    if constexpr (kFewRows > 0)
        if (a.num_rows <= kFewRows) return few_rows(a, part, up, first_group, last_group);
    for (size_t group = first_group; group < last_group; group += 2)
        many_rows(a, part, up, group, last_group - group < 2 ? 1 : 2, static_cast<uint8_t*>(scratch));
}

// Panels of gate and up.
size_t packed_scratch(size_t depth) { return 2 * 2 * depth / 2 * kLineBytes; }

}  // namespace

const PackedKernels packed = {sizeof(Activation), round_rows, packed_linear, packed_scratch};

}  // namespace octavo::OCTAVO_LEVEL
