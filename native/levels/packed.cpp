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

// Sums of one group or two: [rows][2][kChannels].
using Sums = float (*)[2][kChannels];

inline void prefetch(const uint8_t* at, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

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
        for (size_t g = 0; g < GROUPS; ++g) {
            if (block % L.period() == 0) prefetch(data[g] + L.header_at(block) + ahead, L.header_bytes());
            prefetch(data[g] + L.payload_at(block) + ahead, L.payload_bytes());
            each_line<L>(data[g], block, part.table, [&](size_t line, const Strip* strips) {
                for (size_t r = 0; r < ROWS; ++r) {
                    const Strip pair = load_pair(x[r] + at + 2 * line);
                    for (size_t s = 0; s < kStrips; ++s)
                        totals[r][g][s] = multiply_add(strips[s], pair, totals[r][g][s]);
                }
            });
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
        default: return pick_few<kLayouts[10]>(rows, groups);
    }
}

// Two strips of decoded groups: where their first lines begin, and the bytes from one line to the next.
struct Strips {
    const uint8_t* first;
    const uint8_t* second;
    size_t line_bytes;
};

// totals[r] = both strips times rows x, x + depth, ...
template <size_t ROWS>
inline void dot(const Strips& w, const Activation* x, size_t depth, Floats (*totals)[2]) {
    Floats total[ROWS][2] = {};
    for (size_t line = 0; line < depth / 2; ++line) {
        const Strip first = load_strip(w.first + line * w.line_bytes);
        const Strip second = load_strip(w.second + line * w.line_bytes);
#pragma GCC unroll 8
        for (size_t r = 0; r < ROWS; ++r) {
            const Strip pair = load_pair(x + r * depth + 2 * line);
            total[r][0] = multiply_add(first, pair, total[r][0]);
            total[r][1] = multiply_add(second, pair, total[r][1]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t s = 0; s < 2; ++s) totals[r][s] = total[r][s];
}

inline void dot_rows(size_t rows, const Strips& w, const Activation* x, size_t depth, Floats (*totals)[2]) {
    switch (rows) {
        case 1: return dot<1>(w, x, depth, totals);
        case 2: return dot<2>(w, x, depth, totals);
        case 3: return dot<3>(w, x, depth, totals);
        case 4: return dot<4>(w, x, depth, totals);
        case 5: return dot<5>(w, x, depth, totals);
        case 6: return dot<6>(w, x, depth, totals);
        case 7: return dot<kTileRows < 7 ? 1 : 7>(w, x, depth, totals);
        case 8: return dot<kTileRows < 8 ? 1 : 8>(w, x, depth, totals);
    }
}

// Sums of a tile of rows over a panel: two decoded groups, `stride` bytes apart.
inline void tile(const uint8_t* panel, size_t stride, const Activation* x, size_t rows, size_t depth, Sums out) {
    Floats totals[kTileRows][2];
    if constexpr (kStrips == 1) {
        dot_rows(rows, {panel, panel + stride, kLineBytes}, x, depth, totals);
        for (size_t r = 0; r < rows; ++r)
            for (size_t g = 0; g < 2; ++g) channel_sums(&totals[r][g], out[r][g]);
        return;
    }
    for (size_t g = 0; g < 2; ++g) {
        Floats lines[kTileRows][kStrips];
        for (size_t s = 0; s < kStrips; s += 2) {
            const uint8_t* first = panel + g * stride + s * kStripBytes;
            dot_rows(rows, {first, first + kStripBytes, kLineBytes}, x, depth, totals);
            for (size_t r = 0; r < rows; ++r) std::memcpy(&lines[r][s], totals[r], sizeof totals[r]);
        }
        for (size_t r = 0; r < rows; ++r) channel_sums(lines[r], out[r][g]);
    }
}

struct Panel {
    const uint8_t* lines;
    size_t stride;  // bytes from one group to the next
};

// Two groups decoded (the last twice where there is only one). bf16 lines are used where they are.
Panel decode_pair(const Part& part, size_t group, size_t count, const PackedArgs& a, uint8_t* scratch) {
    if (kStrips == 1 && kLayouts[part.layout].bits == 16)
        return {part.data + group * part.group_bytes, count == 2 ? part.group_bytes : 0};
    const size_t stride = a.num_blocks * kBlockLines * kLineBytes;
    for (size_t g = 0; g < count; ++g) kDecode[part.layout](part, group + g, 0, a.num_blocks, scratch + g * stride);
    return {scratch, count == 2 ? stride : 0};
}

void finish_pair(const PackedArgs& a, const Part& part, size_t group, size_t count, size_t row, size_t rows, Sums sums,
                 Sums ups) {
    for (size_t g = 0; g < count; ++g)
        for (size_t r = 0; r < rows; ++r)
            finish_group(a, part, group + g, row + r, sums[r][g], ups != nullptr ? ups[r][g] : nullptr);
}

void few_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t last_group) {
    const size_t rows = a.num_rows == 3 ? 4 : a.num_rows;
    float sums[2 * kFewRows][2][kChannels], ups[2 * kFewRows][2][kChannels];
    while (group < last_group) {
        const size_t left = last_group - group, groups = rows == 1 && left > 2 ? 4 : 2;
        const size_t count = left < groups ? left : groups;
        find_few(part.layout, rows, groups)(part, group, count, a, sums);
        if (up != nullptr) find_few(up->layout, rows, groups)(*up, group, count, a, ups);
        for (size_t g = 0; g < count; g += 2)
            finish_pair(a, part, group + g, count - g < 2 ? 1 : 2, 0, a.num_rows, sums + g / 2 * rows,
                        up != nullptr ? ups + g / 2 * rows : nullptr);
        group += count;
    }
}

void many_rows(const PackedArgs& a, const Part& part, const Part* up, size_t group, size_t count, uint8_t* scratch) {
    const Panel panel = decode_pair(part, group, count, a, scratch);
    Panel up_panel{};
    if (up != nullptr)
        up_panel = decode_pair(*up, group, count, a, scratch + 2 * a.num_blocks * kBlockLines * kLineBytes);
    const size_t tiles = (a.num_rows + kTileRows - 1) / kTileRows;
    float sums[kTileRows][2][kChannels], ups[kTileRows][2][kChannels];
    for (size_t i = 0; i < tiles; ++i) {  // tiles of even height: a last one of one row would cost as much as of four
        const size_t row = a.num_rows * i / tiles, rows = a.num_rows * (i + 1) / tiles - row;
        const Activation* x = static_cast<const Activation*>(a.x) + row * a.depth;
        tile(panel.lines, panel.stride, x, rows, a.depth, sums);
        if (up != nullptr) tile(up_panel.lines, up_panel.stride, x, rows, a.depth, ups);
        finish_pair(a, part, group, count, row, rows, sums, up != nullptr ? ups : nullptr);
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
