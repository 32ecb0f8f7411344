// Attention on AMX, for caches of bf16 whose heads are whole steps of 32.
//
// A unit of work is up to 16 rows against one range of kKVRange positions, where nothing is rescaled: scores of the
// whole range, their maximum, weights, and values, summed in tiles from the first position to the last. Ranges are
// merged in order. For one row this depends on positions alone: scores add over head_dim in the order of a tile;
// weights by lane of position, vectors of even and odd number apart; values over groups of 16 positions in the order of
// a tile. Rows of other requests, of the same tile or none, change nothing; positions that a row does not see weigh 0.
//
// Four units are under way: while the core weighs the scores of one and takes over the sums of the last but one, the
// tile unit multiplies the queries of the next with K and the weights of the one before with V. Units follow each other
// over row tiles, ranges and heads.
#include "attention.h"
#include "softmax_tiles.h"
#include "tiles.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kGroups = kKVRange / kGroup;
constexpr size_t kStages = 3;    // units whose buffers are in use
constexpr size_t kDims = 32;  // of a step along head_dim
constexpr size_t kStepBytes = kTileMaxRows * kTileRowBytes;
constexpr size_t kTileGroups = kKVTile / kGroup;
constexpr size_t kScoresStride = kKVTile * sizeof(float);
static_assert(kLanes == kGroup);

using Span = KVSpan<kGroups>;

// Where scores of a unit lie from a group on: [kKVRange / kKVTile][16][kKVTile]. Rows of all the range would be a kilobyte
// apart, and tiles of them are stored at a third of the speed. Weights take the place of the first half of a row.
inline size_t score_at(size_t group) {
    return group / kTileGroups * kTileMaxRows * kKVTile + group % kTileGroups * kGroup;
}
inline size_t weight_at(size_t group) {
    return group / kTileGroups * kTileMaxRows * 2 * kKVTile + group % kTileGroups * kGroup;
}

struct Scratch {
    Sums sums[kStages];           // of units
    Sums merged;                  // of all rows: of the ranges before
    float* scores[kStages];       // of units
    uint16_t* q;                  // [padded rows, key_dim]
    uint8_t* pieces[kStages];     // for spans: of blocks that are no whole groups
    uint8_t* cleared[kStages];    // for V of a group that is not whole
    uint8_t* end;

    Scratch(uint8_t* memory, size_t rows, const KVCache& c) {
        Cutter cutter{memory};
        const size_t padded = round_up(rows, kTileMaxRows);
        for (Sums& of_unit : sums) of_unit = Sums::in(cutter.take<float>(Sums::size(kTileMaxRows, c)), kTileMaxRows, c);
        merged = Sums::in(cutter.take<float>(Sums::size(padded, c)), padded, c);
        for (float*& of_unit : scores) of_unit = cutter.take<float>(kTileMaxRows * kKVRange);
        q = cutter.take<uint16_t>(padded * c.key_dim + sizeof(Halves) / 2);
        for (size_t i = 0; i < kStages; ++i) {
            pieces[i] = cutter.take(kGroups * c.piece_bytes);
            cleared[i] = cutter.take(kGroup * c.value_width * 2);
        }
        end = cutter.end;
    }
};

struct Unit {
    const Span* span;
    size_t head, row, num_rows;
    size_t first, last;  // groups that some row sees
    float* scores;
    Sums sums;
    bool fetches;              // nobody else reads the span: it is worth asking for the next
    bool starts, ends;         // of these rows and this head
};

// The units of a task, in order.
struct Walk {
    const AttentionArgs& a;
    const QueryTile& t;
    const size_t last_head, first_range, last_range, rows;
    float* const states;  // of the task's ranges, or null
    Scratch& s;
    Span spans[kStages];
    size_t head, range, row = 0, num_spans = 0, num_units = 0;

    Walk(const AttentionArgs& args, const QueryTile& tile, size_t end_head, size_t begin_range, size_t end_range,
         size_t num_rows, float* of_ranges, Scratch& scratch)
        : a(args),
          t(tile),
          last_head(end_head),
          first_range(begin_range),
          last_range(end_range),
          rows(num_rows),
          states(of_ranges),
          s(scratch),
          head(tile.kv_head),
          range(begin_range) {}

    bool next(Unit& unit) {
        for (; head < last_head; ++head, range = first_range) {
            for (; range < last_range; ++range, row = 0)
                for (; row < rows; row += kTileMaxRows)
                    if (see(unit)) return row += kTileMaxRows, true;
        }
        return false;
    }

private:
    // The unit that is next in turn, if its rows see anything of the range.
    bool see(Unit& unit) {
        const size_t share = a.num_heads / a.cache.num_kv_heads, start = range * kKVRange;
        unit.num_rows = rows - row < kTileMaxRows ? rows - row : kTileMaxRows;
        const size_t oldest = oldest_seen(a, t.first_position + row / share);
        const size_t end = t.first_position + (row + unit.num_rows - 1) / share + 1;
        if (row == 0) enter(start);
        unit.fetches = rows <= kTileMaxRows;
        if (end <= start || oldest >= start + kKVRange) return false;
        unit.span = &spans[(num_spans - 1) % kStages];
        unit.head = head, unit.row = row;
        unit.first = oldest > start ? (oldest - start) / kGroup : 0;
        unit.last = end - start < kKVRange ? (end - start + kGroup - 1) / kGroup : kGroups;
        const size_t first = oldest / kKVRange, last = (end - 1) / kKVRange;
        unit.starts = range == (first > first_range ? first : first_range);
        unit.ends = range == (last < last_range ? last : last_range - 1);
        unit.scores = s.scores[num_units % kStages];
        unit.sums = s.sums[num_units % kStages];
        if (states != nullptr)
            unit.sums = Sums::in(states + (range - first_range) * Sums::size(rows, a.cache), rows, a.cache).from(row, a.cache);
        ++num_units;
        return true;
    }

    // Another range, or another head: its span.
    void enter(size_t start) {
        const size_t slot = num_spans++ % kStages;
        if (range == first_range) round_queries(a, t, head, rows, round_up(rows, kTileMaxRows), s.q);
        const Seen of_range = positions_of(a, t, range);
        Span& span = spans[slot];
        span.start = start;
        span.locate(a, t, head, of_range.first, of_range.last, s.pieces[slot], s.cleared[slot]);
        locate_next(a, t, head, range, last_head, first_range, last_range, span);
    }
};

// Tiles 0 and 1: values. 2: weights of 16 positions, 3: their V. 4 and 5: scores of two groups. 6: queries, 7: K.
void configure(size_t rows) {
    TileConfig config;
    for (size_t tile = 0; tile < 7; ++tile) config.set(tile, rows);
    config.set(2, rows, kGroup * sizeof(uint16_t));
    config.set(3, kGroup / 2);
    config.set(7, kTileMaxRows);
    configure_tiles(config);
}

// Work of the tiles that goes on beside that of the core: `num_items` in as many turns as there are rows.
struct Turns {
    size_t num_items, num_turns, due = 0;

    // How many items this turn takes.
    size_t take() {
        size_t items = 0;
        for (due += num_items; due >= num_turns; due -= num_turns) ++items;
        return items;
    }
};

// Scores of a unit, two groups an item.
struct Scoring {
    const AttentionArgs& a;
    const Unit& u;
    const uint16_t* q;
    size_t group = u.first;

    size_t num_items() const { return (u.last - u.first + 1) / 2; }

    OCTAVO_FORCED void advance(size_t items) {
        for (; items > 0; --items, group += 2) {
            const bool two = group + 1 < u.last;
            if (u.fetches) {
                fetch(group);
                if (two) fetch(group + 1);
            }
            zero_tile<4>();
            zero_tile<5>();
            for (size_t step = 0; step < a.cache.key_dim / kDims; ++step) {
                load_tile<6>(q + step * kDims, a.cache.key_dim * sizeof(uint16_t));
                load_tile<7>(u.span->k[group] + step * kStepBytes, kTileRowBytes);
                multiply_tiles<4, 6, 7>();
                if (!two) continue;
                load_tile<7>(u.span->k[group + 1] + step * kStepBytes, kTileRowBytes);
                multiply_tiles<5, 6, 7>();
            }
            store_tile<4>(u.scores + score_at(group), kScoresStride);
            if (two) store_tile<5>(u.scores + score_at(group + 1), kScoresStride);
        }
    }
    OCTAVO_FORCED void fetch(size_t of) const {
        for (size_t part = 0; part < 4; ++part) fetch_part(u.span->next[of], a.cache.piece_bytes, part);
    }
};

// Values of a unit: an item is a group of positions for 32 columns.
struct Mixing {
    const AttentionArgs& a;
    const Unit& u;
    size_t group = u.first, column = 0;

    size_t num_items() const { return (u.last - u.first) * (a.cache.value_width / (2 * kGroup)); }

    OCTAVO_FORCED void advance(size_t items) {
        const size_t width = a.cache.value_width;
        for (; items > 0; --items) {
            if (group == u.first) {
                zero_tile<0>();
                zero_tile<1>();
            }
            const uint8_t* v = u.span->v[group] + column * 4;
            load_tile<2>(reinterpret_cast<const uint16_t*>(u.scores) + weight_at(group), kScoresStride);
            load_tile<3>(v, a.cache.value_width * 4);
            multiply_tiles<0, 2, 3>();
            load_tile<3>(v + kTileRowBytes, a.cache.value_width * 4);
            multiply_tiles<1, 2, 3>();
            if (u.fetches)
                for (size_t part = 4 + 4 * column / width; part < 4 + 4 * (column + 2 * kGroup) / width; ++part)
                    fetch_part(u.span->next[group], a.cache.piece_bytes, part);
            if (++group < u.last) continue;
            store_tile<0>(u.sums.rows + column, state_width(a.cache) * sizeof(float));
            store_tile<1>(u.sums.rows + column + kGroup, state_width(a.cache) * sizeof(float));
            group = u.first, column += 2 * kGroup;
        }
    }
};

inline __m512 at(const float* values, size_t group) { return _mm512_loadu_ps(values + score_at(group)); }

// Turns the scores of row `row` into weights of bfloat16 in their place; positions outside [first, last) of the range weigh 0.
void weigh(const AttentionArgs& a, const Unit& u, size_t first, size_t last, size_t row) {
    float* const scores = u.scores + row * kKVTile;
    for (size_t g = u.first; a.softcap != 0.0f && g < u.last; ++g)
        store(scores + score_at(g), a.softcap * tanh((Floats)at(scores, g) * a.scale / a.softcap));
    // Vectors [whole, whole_end) are seen whole. Two go together; even and odd ones have sums of their own.
    const size_t begin = u.first / 2 * 2, end = (u.last + 1) / 2 * 2;
    const size_t whole = min(((first + kLanes - 1) / kLanes + 1) / 2 * 2, end);
    const size_t whole_end = max(last / kLanes / 2 * 2, whole);
    __m512 even_top = _mm512_set1_ps(kNever), odd_top = even_top;
    const auto top_at_edge = [&](size_t v) OCTAVO_INLINE_LAMBDA {
        even_top = _mm512_mask_max_ps(even_top, lanes_in(v * kLanes, first, last), even_top, at(scores, v));
        odd_top = _mm512_mask_max_ps(odd_top, lanes_in((v + 1) * kLanes, first, last), odd_top, at(scores, v + 1));
    };
    for (size_t v = begin; v < whole; v += 2) top_at_edge(v);
    for (size_t v = whole; v < whole_end; v += 2) {
        even_top = _mm512_max_ps(even_top, at(scores, v));
        odd_top = _mm512_max_ps(odd_top, at(scores, v + 1));
    }
    for (size_t v = whole_end; v < end; v += 2) top_at_edge(v);
    const float unit = score_unit(a), top = _mm512_reduce_max_ps(_mm512_max_ps(even_top, odd_top)) * unit;
    const Floats by = splat(unit), shift = splat(-top);
    uint16_t* const weights = reinterpret_cast<uint16_t*>(scores);
    Floats even_sum{}, odd_sum{};
    const auto weigh_pair = [&](size_t v, __mmask16 even_seen, __mmask16 odd_seen) OCTAVO_INLINE_LAMBDA {
        const __m512 even = _mm512_maskz_mov_ps(even_seen, (__m512)exp2(fma((Floats)at(scores, v), by, shift)));
        const __m512 odd = _mm512_maskz_mov_ps(odd_seen, (__m512)exp2(fma((Floats)at(scores, v + 1), by, shift)));
        even_sum += (Floats)even;
        odd_sum += (Floats)odd;
        const __m512bh rounded = _mm512_cvtne2ps_pbh(odd, even);
        std::memcpy(weights + weight_at(v), &rounded, sizeof rounded);
    };
    const auto weigh_edge = [&](size_t v) OCTAVO_INLINE_LAMBDA {
        weigh_pair(v, lanes_in(v * kLanes, first, last), lanes_in((v + 1) * kLanes, first, last));
    };
    for (size_t v = begin; v < whole; v += 2) weigh_edge(v);
    for (size_t v = whole; v < whole_end; v += 2) weigh_pair(v, 0xffff, 0xffff);
    for (size_t v = whole_end; v < end; v += 2) weigh_edge(v);
    store(u.sums.rows + row * state_width(a.cache) + a.cache.value_width, even_sum + odd_sum);
    u.sums.tops[row] = top;
}

// A row that sees nothing of a range.
void see_nothing(const KVCache& c, const Unit& u, size_t row) {
    for (size_t g = u.first; g < u.last; ++g)
        std::memset(reinterpret_cast<uint16_t*>(u.scores + row * kKVTile) + weight_at(g), 0, kGroup * sizeof(uint16_t));
    store(u.sums.rows + row * state_width(c) + c.value_width, Floats{});
    u.sums.tops[row] = kNever;
}

// Takes over what a unit summed.
void finish(const AttentionArgs& a, const QueryTile& t, const Unit& u, const Sums& of_all) {
    take_over(a, t, u.head, u.row, u.num_rows, u.starts, u.ends, u.sums, of_all.from(u.row, a.cache));
}

// Weighs the scores of `u`; the tiles work for the units after and before it, and what was summed before that is taken
// over, if there are any.
void weigh_rows(const AttentionArgs& a, const QueryTile& t, const Unit& u, Scoring* after, Mixing* before,
                const Unit* done, const Sums& merged) {
    const size_t share = a.num_heads / a.cache.num_kv_heads, start = u.span->start;
    size_t newest = t.first_position + u.row / share, head = u.row % share;
    if (done != nullptr) finish(a, t, *done, merged);
    Turns scoring = {after != nullptr ? after->num_items() : 0, u.num_rows};
    Turns mixing = {before != nullptr ? before->num_items() : 0, u.num_rows};
    for (size_t r = 0; r < u.num_rows; ++r, ++head) {
        if (head == share) head = 0, ++newest;
        if (after != nullptr) after->advance(scoring.take());
        if (before != nullptr) before->advance(mixing.take());
        const size_t oldest = oldest_seen(a, newest);
        const size_t first = oldest > start ? oldest - start : 0;
        const size_t last = newest < start ? 0 : newest + 1 - start < kKVRange ? newest + 1 - start : kKVRange;
        if (first < last)
            weigh(a, u, first, last, r);
        else
            see_nothing(a.cache, u, r);
    }
}

}  // namespace

bool has_tiled_attention(const KVCache& c) { return c.type == OCTAVO_KV_BFLOAT16 && c.head_dim % kDims == 0; }

size_t tiled_attention_scratch(size_t rows, const KVCache& cache) {
    uint8_t* const start = nullptr;
    return static_cast<size_t>(Scratch(start, rows, cache).end - start);
}

void tiled_attention(const AttentionArgs& a, const QueryTile& t, size_t last_head, size_t first_range,
                     size_t last_range, uint8_t* scratch, float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads);
    Scratch s(scratch, rows, a.cache);
    for (size_t range = first_range; states != nullptr && range < last_range; ++range)
        Sums::in(states + (range - first_range) * Sums::size(rows, a.cache), rows, a.cache).clear(rows, a.cache);
    configure(rows < kTileMaxRows ? rows : kTileMaxRows);
    Walk walk(a, t, last_head, first_range, last_range, rows, states, s);
    Unit units[kStages + 1] = {};  // of a turn: weighed, next, done, multiplied with V
    const auto unit_at = [&](size_t n) -> Unit& { return units[n % (kStages + 1)]; };
    const auto queries = [&](const Unit& u) { return s.q + u.row * a.cache.key_dim; };
    size_t known = 0;  // units so far
    if (walk.next(units[0])) {
        Scoring first = {a, units[0], queries(units[0])};
        first.advance(first.num_items());
        known = 1;
    }
    size_t turn = 0;
    for (; turn < known; ++turn) {
        Unit& u = unit_at(turn);
        const bool more = walk.next(unit_at(turn + 1));
        if (more) known = turn + 2;
        Scoring scoring = {a, unit_at(turn + 1), more ? queries(unit_at(turn + 1)) : nullptr};
        Mixing mixing = {a, unit_at(turn + kStages)};
        const Unit* done = turn >= 2 && states == nullptr ? &unit_at(turn + 2) : nullptr;
        weigh_rows(a, t, u, more ? &scoring : nullptr, turn >= 1 ? &mixing : nullptr, done, s.merged);
    }
    if (known > 0) {
        Mixing mixing = {a, unit_at(known - 1)};
        mixing.advance(mixing.num_items());
    }
    for (size_t n = known < 2 ? 0 : known - 2; states == nullptr && n < known; ++n) finish(a, t, unit_at(n), s.merged);
    release_tiles();
}

}  // namespace octavo::OCTAVO_LEVEL
