// The Linear on AMX tiles, whatever the type: which tiles meet, and when their sums are finished.
//
// 16 lines of a group are one B tile, rows of activations are A tiles. Two groups that go together, neighbours or gate
// and up, are a pair. A pass multiplies one pair with up to 32 rows, or two pairs with up to 16; a tile of fewer rows
// gives the bits of the same rows in a full one. The tile unit works on its own while the core prepares lines, or
// finishes the sums of the pass before.
//
// `Kind` says what is multiplied:
//   Sum, multiply<C, A, B>()   numbers of a sum tile, and the instruction
//   Lines                      the lines of a group: at(block) for the tiles, prepare(block) before them
//   rows(args)                 where the A tiles lie
//   lines(part, group, ahead, slot, kept)
//   Values(kind, part, group, row)   the outputs of a group from a row on, before the epilogue: of(n, sums)
#pragma once

#include "epilogue.h"
#include "level.h"
#include "simd.h"
#include "tiles.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kSources = 4;  // groups of a pass at most
constexpr size_t kPassRows = 2 * kTileMaxRows;
constexpr size_t kRowsAtOnce = 4;  // finished together, at least
constexpr size_t kRowsAhead = 8;
constexpr size_t kTileBytes = kTileMaxRows * kTileRowBytes;
static_assert(kChannels == kTileMaxRows && kChannels == kLanes);

// A tiles: `stride` bytes from row to row, `block` and `tile` bytes from one to the next along depth and rows.
struct RowTiles {
    const uint8_t* first;
    size_t stride, block, tile;
};

// What a pass summed, [tile] as multiply_source() numbers them; the epilogue follows during the next pass, which is done
// with it before it stores its own: all passes share one buffer, or it and the weights would not fit into the first cache.
template <class Kind>
struct Sums {
    using Tiles = typename Kind::Sum[kSources][kTileMaxRows][kChannels];
    Tiles& tiles;
    size_t group, row, num_rows, num_sources;
    size_t finished;  // rows
};

template <class Kind>
struct Work {
    const Kind& kind;
    const PackedArgs& a;
    const Part& part;
    const Part* up;
    Finish how;

    // Of channels: the sources are groups, or each two are gate and up.
    size_t groups(size_t sources) const { return up != nullptr ? sources / 2 : sources; }

    // The next N rows of `s`. The outputs of rows a little later are asked for: written without, each line waits for the
    // one before.
    template <Finish HOW, size_t N>
    OCTAVO_FORCED void finish_rows(Sums<Kind>& s) const {
        if constexpr (HOW == Finish::kAny) {
            finish_any(s, s.finished + N);
        } else {
            constexpr bool gated = HOW == Finish::kSiluMul;
            constexpr size_t sources = gated ? 2 : 1;
            const size_t half = s.finished / kTileMaxRows * 2, at = s.finished % kTileMaxRows;
            const size_t row = s.row + s.finished, stride = a.epilogue.channels;
            for (size_t g = 0; g < s.num_sources / sources; ++g) {
                const typename Kind::Values sums(kind, part, s.group + g, row), ups(kind, gated ? *up : part, s.group + g, row);
                const auto* from = s.tiles[half + g * sources][at];
                float* out = out_of(s, g) + s.finished * stride;
                Floats v[N];
#pragma GCC unroll 8
                for (size_t i = 0; i < N; ++i) {
                    __builtin_prefetch(out + (kRowsAhead + i) * stride, 1);
                    v[i] = sums.of(i, from + i * kChannels);
                }
                if constexpr (gated) silu_each<N>(v);
#pragma GCC unroll 8
                for (size_t i = 0; i < N; ++i) {
                    if constexpr (gated) v[i] *= ups.of(i, from + (kTileMaxRows + i) * kChannels);
                    store(out + i * stride, v[i]);
                }
            }
            s.finished += N;
        }
    }
    void finish_any(Sums<Kind>& s, size_t end) const {
        const size_t sources = up != nullptr ? 2 : 1;
        for (; s.finished < end; ++s.finished) {
            const size_t at = s.finished % kTileMaxRows, half = s.finished / kTileMaxRows * 2, row = s.row + s.finished;
            for (size_t g = 0; g < s.num_sources / sources; ++g) {
                const auto* from = s.tiles[half + g * sources][at];
                float sums[kChannels], ups[kChannels];
                store(sums, typename Kind::Values(kind, part, s.group + g, row).of(0, from));
                if (up != nullptr)
                    store(ups, typename Kind::Values(kind, *up, s.group + g, row).of(0, from + kTileMaxRows * kChannels));
                finish_group(a, part, s.group + g, row, sums, up != nullptr ? ups : nullptr);
            }
        }
    }
    // body<HOW>(), HOW being how `s` is finished: a call for each few rows would take as many instructions as they do.
    template <class Body>
    OCTAVO_FORCED void decided(const Sums<Kind>& s, const Body& body) const {
        const bool whole = part.channels / kChannels >= s.group + groups(s.num_sources);
        if (!whole || how == Finish::kAny) return body.template operator()<Finish::kAny>();
        if (how == Finish::kPlain) return body.template operator()<Finish::kPlain>();
        body.template operator()<Finish::kSiluMul>();
    }
    // What is left.
    template <Finish HOW>
    void finish(Sums<Kind>& s) const {
        while (s.finished + kRowsAtOnce <= s.num_rows) finish_rows<HOW, kRowsAtOnce>(s);
        while (s.finished < s.num_rows) finish_rows<HOW, 1>(s);
    }
    // Asks for the outputs of the first rows.
    void fetch_first(const Sums<Kind>& s) const {
        for (size_t g = 0; g < groups(s.num_sources); ++g)
            for (size_t r = 0; r < kRowsAhead; ++r) __builtin_prefetch(out_of(s, g) + r * a.epilogue.channels, 1);
    }
    float* out_of(const Sums<Kind>& s, size_t g) const {
        return a.epilogue.out + s.row * a.epilogue.channels + part.first_channel + (s.group + g) * kChannels;
    }
};

// Tiles 0 to 3: sums of sources 0 to 3, or of two sources for the first and for the second tile of rows. 4: rows,
// 5: the second tile of them. Weights: 5 to 7, or 6 and 7.
template <class Kind, bool SECOND>
OCTAVO_FORCED void multiply_source(size_t source, const uint8_t* lines) {
    constexpr size_t stride = kTileRowBytes;
    if constexpr (SECOND) {
        if (source == 0) {
            load_tile<6>(lines, stride);
            Kind::template multiply<0, 4, 6>();
            return Kind::template multiply<2, 5, 6>();
        }
        load_tile<7>(lines, stride);
        Kind::template multiply<1, 4, 7>();
        return Kind::template multiply<3, 5, 7>();
    }
    switch (source) {
        case 0: return load_tile<5>(lines, stride), Kind::template multiply<0, 4, 5>();
        case 1: return load_tile<6>(lines, stride), Kind::template multiply<1, 4, 6>();
        case 2: return load_tile<7>(lines, stride), Kind::template multiply<2, 4, 7>();
        default: return load_tile<5>(lines, stride), Kind::template multiply<3, 4, 5>();
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
template <class Kind, bool SECOND, Finish HOW>
void pass(const Work<Kind>& w, const typename Kind::Lines* lines, bool fresh, Sums<Kind>& s, Sums<Kind>& before) {
    const size_t num_blocks = w.a.num_blocks;
    const RowTiles rows = w.kind.rows(w.a);
    const uint8_t* x = rows.first + s.row / kTileMaxRows * rows.tile;
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (size_t i = 0; fresh && i < s.num_sources; ++i) lines[i].prepare(0);
    size_t due = 0, shares = 0;  // rows to finish so far, evenly over the blocks
    for (size_t block = 0; block < num_blocks; ++block, x += rows.block) {
        load_tile_once<4>(x, rows.stride);
        if constexpr (SECOND) load_tile_once<5>(x + rows.tile, rows.stride);
        for (size_t i = 0; i < s.num_sources; ++i) {
            if (fresh && block + 1 < num_blocks) lines[i].prepare(block + 1);
            multiply_source<Kind, SECOND>(i, lines[i].at(block));
        }
        for (shares += before.num_rows; shares >= num_blocks; shares -= num_blocks) ++due;
        while (due >= before.finished + kRowsAtOnce) w.template finish_rows<HOW, kRowsAtOnce>(before);
    }
    w.template finish<HOW>(before);
    w.fetch_first(s);
    store_tile<0>(s.tiles[0], kTileRowBytes);
    store_tile<1>(s.tiles[1], kTileRowBytes);
    store_tile<2>(s.tiles[2], kTileRowBytes);
    store_tile<3>(s.tiles[3], kTileRowBytes);
}

// Groups [group, last_group) for all rows. What a pass prepares serves the later ones, where there are any.
template <class Kind>
void run_passes(const Work<Kind>& w, size_t group, size_t last_group) {
    const size_t num_rows = w.a.num_rows, most = num_rows <= kTileMaxRows ? kSources : kSources / 2;
    const size_t together = w.groups(most), kept = num_rows <= kPassRows ? 2 : w.a.num_blocks;
    alignas(64) typename Sums<Kind>::Tiles tiles;
    Sums<Kind> sums[2] = {{tiles, 0, 0, 0, 0, 0}, {tiles, 0, 0, 0, 0, 0}};
    size_t turn = 0, configured = 0;
    for (; group < last_group; group += together) {
        const size_t groups = last_group - group < together ? last_group - group : together;
        const size_t num_sources = w.up != nullptr ? 2 * groups : groups;
        typename Kind::Lines lines[kSources];
        for (size_t i = 0; i < num_sources; ++i) {
            const Part& part = w.up != nullptr && i % 2 == 1 ? *w.up : w.part;
            lines[i] = w.kind.lines(part, group + (w.up != nullptr ? i / 2 : i), together * part.group_bytes, i, kept);
        }
        for (size_t row = 0; row < num_rows; row += kPassRows, turn ^= 1) {
            const size_t rows = num_rows - row < kPassRows ? num_rows - row : kPassRows;
            Sums<Kind>&s = sums[turn], &before = sums[turn ^ 1];
            s.group = group, s.row = row, s.num_rows = rows, s.num_sources = num_sources, s.finished = 0;
            if (rows != configured) configure(configured = rows);
            w.decided(before, [&]<Finish HOW>() {
                if (rows > kTileMaxRows)
                    pass<Kind, true, HOW>(w, lines, row == 0, s, before);
                else
                    pass<Kind, false, HOW>(w, lines, row == 0, s, before);
            });
        }
    }
    Sums<Kind>& last = sums[turn ^ 1];
    w.decided(last, [&]<Finish HOW>() { w.template finish<HOW>(last); });
    release_tiles();
}

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
