// Attention of a tile of queries over the paged cache: online softmax over KV tiles at absolute positions.
//
// The rows of a task are (token, query head) pairs that share a KV head, token-major. For one row the order of all
// sums is fixed by position alone: scores add over head_dim in order; weights add by lane of position, halving at the
// end of a range; values add over positions in order; what weights are against moves at multiples of kKVTile; the results
// of ranges of kKVRange positions are merged in order. A chunk of a prompt therefore gives the bits of the whole
// prompt, and ranges computed by several threads those of one. Masked positions weigh exactly 0 and their K may be
// anything.
#include <cmath>
#include <type_traits>

#include "attention.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kRowBlock = 4;                     // rows in registers
constexpr size_t kTogether = 16;                    // all scores first, then all weights: neither waits for its own latency
constexpr size_t kVectors = kLanes == 16 ? 4 : 2;   // vectors of positions or values in registers
constexpr size_t kTileVectors = kKVTile / kLanes;
constexpr size_t kGroupVectors = kGroup / kLanes;
constexpr size_t kTileGroups = kKVTile / kGroup;
constexpr size_t kMaxRowsInt8 = 2 * kRowBlock;  // more rows than this widen a tile of int8 once for all
using KVTile = KVSpan<kTileGroups>;

struct Scratch {
    Sums range;         // of the current range
    Sums merged;        // of the ranges before
    float* scores;      // [kTogether, kKVTile]
    Rounded* weights;   // [kTogether, kKVTile], rounded to bfloat16
    Rounded* q;         // [rows, key_dim]: queries rounded to bfloat16
    uint8_t* pieces;    // kTileGroups pieces of the cache: for blocks that are no multiple of kGroup
    uint8_t* wide;      // the same in bfloat16: widened from int8
    uint8_t* end;

    Scratch(uint8_t* memory, size_t rows, const KVCache& c) {
        Cutter cutter{memory};
        range = Sums::in(cutter.take<float>(Sums::size(rows, c)), rows, c);
        merged = Sums::in(cutter.take<float>(Sums::size(rows, c)), rows, c);
        scores = cutter.take<float>(kTogether * kKVTile);
        weights = cutter.take<Rounded>(kTogether * kKVTile);
        q = cutter.take<Rounded>(rows * c.key_dim);
        pieces = cutter.take(kTileGroups * c.piece_bytes);
        wide = cutter.take(kTileGroups * kGroup * (c.key_dim + c.value_width) * 2);
        end = cutter.end;
    }
};

template <class KV, size_t ROWS>
OCTAVO_FORCED void score(const typename KV::Element* const* q, const KVTile& tile, size_t vector, size_t num_steps,
                  float* scores, Floats* tops) {
    Floats total[ROWS][kVectors] = {};
    for (size_t step = 0; step < num_steps; step += KV::kSteps) {
        typename KV::Operand keys[kVectors][KV::kSteps];
        for (size_t v = 0; v < kVectors; ++v) {
            const size_t group = (vector + v) / kGroupVectors;
            const size_t offset = operand_offset<KV>(kGroup, step, (vector + v) % kGroupVectors * kLanes);
            KV::load(tile.k[group] + offset, keys[v]);
            __builtin_prefetch(tile.next[group] + offset);
        }
        for (size_t n = 0; n < KV::kSteps; ++n)
            for (size_t r = 0; r < ROWS; ++r) {
                const typename KV::Operand value = KV::factor(q[r], step + n);
                for (size_t v = 0; v < kVectors; ++v) total[r][v] = KV::add(value, keys[v][n], total[r][v]);
            }
    }
    for (size_t r = 0; r < ROWS; ++r) {
        Floats top = vector == 0 ? total[r][0] : max(total[r][0], tops[r]);
        for (size_t v = 1; v < kVectors; ++v) top = max(total[r][v], top);
        tops[r] = top;
        for (size_t v = 0; v < kVectors; ++v) store(scores + r * kKVTile + (vector + v) * kLanes, total[r][v]);
    }
}

// total[r][d] += sum over positions [first, last) of the tile of weights[r][j] * v[j][d]. Positions that are loaded
// together with these weigh 0.
template <class KV, size_t ROWS, size_t VECTORS>
OCTAVO_FORCED void mix(const typename KV::Element* weights, const KVTile& tile, size_t first, size_t last, size_t column,
                const KVCache& cache, float* total) {
    constexpr size_t group_steps = kGroup / KV::kDepth, depth = KV::kDepth * KV::kSteps;
    const size_t width = cache.value_width, stride = state_width(cache);
    Floats sums[ROWS][VECTORS];
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t v = 0; v < VECTORS; ++v) sums[r][v] = load(total + r * stride + column + v * kLanes);
    for (size_t at = first / depth * depth; at < last; at += depth) {
        const size_t step = at / KV::kDepth, group = step / group_steps;
        typename KV::Operand values[VECTORS][KV::kSteps];
        for (size_t v = 0; v < VECTORS; ++v) {
            const size_t offset = operand_offset<KV>(width, step % group_steps, column + v * kLanes);
            KV::load(tile.v[group] + offset, values[v]);
            __builtin_prefetch(tile.next[group] + cache.v_offset + offset);
        }
        for (size_t n = 0; n < KV::kSteps; ++n)
            for (size_t r = 0; r < ROWS; ++r) {
                const typename KV::Operand weight = KV::factor(weights + r * kKVTile, step + n);
                for (size_t v = 0; v < VECTORS; ++v) sums[r][v] = KV::add(weight, values[v][n], sums[r][v]);
            }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t v = 0; v < VECTORS; ++v) store(total + r * stride + column + v * kLanes, sums[r][v]);
}

// Scores of a row that cannot be taken as they are: scales or caps them and hides the positions that it does not see;
// returns the largest, lane by lane.
template <bool SCALED>
inline Floats finish_scores(const AttentionArgs& a, const KVTile& tile, size_t oldest, size_t newest, float* scores) {
    const bool all_visible = oldest <= tile.start && newest + 1 >= tile.start + kKVTile;
    Floats top = splat(kNever);
    for (size_t v = 0; v < kTileVectors; ++v) {
        Floats score = load(scores + v * kLanes);
        if constexpr (SCALED) score *= load(tile.scales[v / kGroupVectors] + v % kGroupVectors * kLanes);
        if (a.softcap != 0.0f) score = a.softcap * tanh(score * a.scale / a.softcap);
        if (!all_visible) {
            Ints position;
            for (size_t l = 0; l < kLanes; ++l) position[l] = static_cast<int32_t>(l);
            position += static_cast<int32_t>(tile.start + v * kLanes);
            const Ints visible =
                (position <= static_cast<int32_t>(newest)) & (position >= static_cast<int32_t>(oldest));
            score = visible ? score : splat(kNever);
        }
        store(scores + v * kLanes, score);
        top = max(score, top);
    }
    return top;
}

// Turns the scores of `count` rows that follow each other into weights against their new maxima; hidden positions weigh 0.
template <class KV, bool SCALED>
void soften(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, size_t count, const Scratch& s,
            Floats* tops, typename KV::Element* out) {
    const size_t share = a.num_heads / a.cache.num_kv_heads, stride = state_width(a.cache);
    size_t newest = t.first_position + row / share, head = row % share;
    const size_t oldest = oldest_seen(a, t.first_position + (row + count - 1) / share);
    const bool as_they_are =
        !SCALED && a.softcap == 0.0f && oldest <= tile.start && newest + 1 >= tile.start + kKVTile;
    const float unit = score_unit(a);
    float largest[kTogether];
    for (size_t r = 0; r < count && !as_they_are; ++r, ++head) {
        if (head == share) head = 0, ++newest;
        tops[r] = finish_scores<SCALED>(a, tile, oldest_seen(a, newest), newest, s.scores + r * kKVTile);
    }
    size_t some = 0;
    for (; some + 4 <= count; some += 4) max_each<4>(tops + some, largest + some);
    for (; some < count; ++some) max_each<1>(tops + some, largest + some);
    float* const before = s.range.tops + row;
    bool moved = false;
    for (size_t r = 0; r < count; ++r) {
        largest[r] = largest[r] * unit > before[r] + kSlack ? largest[r] * unit : before[r];
        moved |= largest[r] != before[r];
    }
    if (moved) {  // one question for all rows: where nothing moves any more, it is answered ahead
        for (size_t r = 0; r < count; ++r) {
            const float old = before[r];
            before[r] = largest[r];
            if (largest[r] == old || old == kNever) continue;  // nothing is there that could shrink
            const Floats shrink = power_of_two(splat(old) - largest[r]);
            float* state = s.range.rows + (row + r) * stride;
            for (size_t c = 0; c < a.cache.value_width + kLanes; c += kLanes) store(state + c, load(state + c) * shrink);
        }
    }
    for (size_t r = 0; r < count; ++r) {
        const float top = largest[r] == kNever ? 0.0f : largest[r];  // nothing seen so far: all weigh 0
        const float* scores = s.scores + r * kKVTile;
        float* const weights = s.range.rows + (row + r) * stride + a.cache.value_width;
        Floats sums = load(weights), part[kTileVectors];
        for (size_t v = 0; v < kTileVectors; ++v) {
            const Floats score = load(scores + v * kLanes);
            part[v] = power_of_two(fma(score, splat(unit), splat(-top)));
            sums += part[v];
            if constexpr (SCALED) {  // the scale of a position that is not visible may be anything
                part[v] *= load(tile.scales[v / kGroupVectors] + kGroup + v % kGroupVectors * kLanes);
                part[v] = score > splat(kNever) ? part[v] : Floats{};
            }
        }
        store(weights, sums);
        for (size_t v = 0; v < kTileVectors; ++v) {
            if constexpr (KV::kRounded)
                store_rounded(out + r * kKVTile + v * kLanes, part[v]);
            else
                store(out + r * kKVTile + v * kLanes, part[v]);
        }
    }
}

// Positions [first, last) of the KV tile, relative to its start, that some of the rows see.
struct Seen {
    size_t first, last;
};

inline Seen seen_by(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, size_t num_rows) {
    const size_t share = a.num_heads / a.cache.num_kv_heads;
    const size_t first_position = t.first_position + row / share;
    const size_t last_position = t.first_position + (row + num_rows - 1) / share;
    const size_t oldest = oldest_seen(a, first_position);
    if (last_position < tile.start || oldest >= tile.start + kKVTile) return {0, 0};
    const size_t last = last_position + 1 - tile.start;
    return {oldest > tile.start ? oldest - tile.start : 0, last < kKVTile ? last : kKVTile};
}

template <class KV, size_t ROWS>
void score_rows(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, const Scratch& s, float* scores,
                Floats* tops) {
    const typename KV::Element* q[ROWS];
    Rows rows(a, t, t.kv_head, row);
    for (size_t r = 0; r < ROWS; ++r)
        if constexpr (KV::kRounded)
            q[r] = s.q + (row + r) * a.cache.key_dim;
        else
            q[r] = a.q + rows.next();
    for (size_t vector = 0; vector < tile.last * kGroupVectors; vector += kVectors)
        score<KV, ROWS>(q, tile, vector, a.cache.key_dim / KV::kDepth, scores, tops);
}

template <class KV, size_t ROWS>
void mix_rows(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, const Scratch& s,
              const typename KV::Element* weights) {
    const Seen seen = seen_by(a, t, tile, row, ROWS);
    const size_t width = a.cache.value_width;
    float* total = s.range.rows + row * state_width(a.cache);
    size_t column = 0;
    for (; column + kVectors * kLanes <= width; column += kVectors * kLanes)
        mix<KV, ROWS, kVectors>(weights, tile, seen.first, seen.last, column, a.cache, total);
    for (; column < width; column += kLanes)
        mix<KV, ROWS, 1>(weights, tile, seen.first, seen.last, column, a.cache, total);
}

// step(rows of a block, its first row), for `count` rows.
template <class Step>
OCTAVO_FORCED void by_blocks(size_t count, const Step& step) {
    size_t row = 0;
    for (; row + kRowBlock <= count; row += kRowBlock) step(std::integral_constant<size_t, kRowBlock>(), row);
    switch (count - row) {
        case 1: return step(std::integral_constant<size_t, 1>(), row);
        case 2: return step(std::integral_constant<size_t, 2>(), row);
        case 3: return step(std::integral_constant<size_t, 3>(), row);
    }
}

template <class KV, bool SCALED>
void visit_rows(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t rows, const Scratch& s) {
    typename KV::Element* weights;
    if constexpr (KV::kRounded)
        weights = s.weights;
    else
        weights = s.scores;
    for (size_t row = 0; row < rows; row += kTogether) {
        const size_t count = rows - row < kTogether ? rows - row : kTogether;
        if (seen_by(a, t, tile, row, count).last == 0) continue;
        Floats tops[kTogether];
        by_blocks(count, [&](auto num, size_t at) {
            score_rows<KV, num()>(a, t, tile, row + at, s, s.scores + at * kKVTile, tops + at);
        });
        soften<KV, SCALED>(a, t, tile, row, count, s, tops, weights);
        by_blocks(count, [&](auto num, size_t at) {
            mix_rows<KV, num()>(a, t, tile, row + at, s, weights + at * kKVTile);
        });
    }
}

void visit_tile(const AttentionArgs& a, const QueryTile& t, KVTile& tile, size_t rows, const Scratch& s) {
    switch (a.cache.type) {
        case OCTAVO_KV_FLOAT32: return visit_rows<FloatKV, false>(a, t, tile, rows, s);
        case OCTAVO_KV_BFLOAT16: return visit_rows<BFloat16KV, false>(a, t, tile, rows, s);
        default:
            if (rows <= kMaxRowsInt8) return visit_rows<Int8KV, true>(a, t, tile, rows, s);
            widen(a.cache, s.wide, s.wide + kKVTile * a.cache.key_dim * 2, tile);
            return visit_rows<BFloat16KV, true>(a, t, tile, rows, s);
    }
}

// Sums the KV tiles of positions [begin, end) for all rows of the query tile into s.range. Then come the positions from
// `next` on, of `next_head`.
void visit_range(const AttentionArgs& a, const QueryTile& t, size_t begin, size_t end, size_t next, size_t next_head,
                 size_t rows, const Scratch& s) {
    const size_t newest = t.first_position + t.num_tokens;
    s.range.clear(rows, a.cache);
    KVTile tile;
    for (size_t start = begin; start < end; start += kKVTile) {
        const bool last = start + kKVTile >= end;
        tile.start = start;
        tile.locate(a, t, t.kv_head, start, last ? end : start + kKVTile, s.pieces, s.wide);
        tile.locate_next(a, t, last ? next_head : t.kv_head, last ? next : start + kKVTile, newest);
        for (size_t g = tile.last; g < kTileGroups; ++g) {  // scored with the others, and masked
            tile.k[g] = tile.k[g - 1], tile.v[g] = tile.v[g - 1];
            tile.scales[g] = tile.scales[g - 1], tile.next[g] = tile.next[g - 1];
        }
        visit_tile(a, t, tile, rows, s);
    }
}

// Of one KV head; `next_follows`: the thread goes on with the next one.
void attend(const AttentionArgs& a, const QueryTile& t, bool next_follows, size_t first_range, size_t last_range,
            uint8_t* scratch, float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads);
    Scratch s(scratch, rows, a.cache);
    const Sums of_range = s.range;
    if (a.cache.type != OCTAVO_KV_FLOAT32) round_queries(a, t, t.kv_head, rows, rows, s.q);
    const size_t newest = t.first_position + t.num_tokens, oldest = oldest_seen(a, t.first_position);
    const size_t first = (first_range * kKVRange > oldest ? first_range * kKVRange : oldest) / kKVTile * kKVTile;
    for (size_t range = first_range; range < last_range; ++range) {
        const bool begins = range == first_range, more = range + 1 < last_range;
        if (states != nullptr)
            s.range = Sums::in(states + (range - first_range) * Sums::size(rows, a.cache), rows, a.cache);
        else
            s.range = begins ? s.merged : of_range;
        const size_t range_end = (range + 1) * kKVRange, end = range_end < newest ? range_end : newest;
        visit_range(a, t, begins ? first : range * kKVRange, end, more ? end : next_follows ? first : newest,
                    t.kv_head + (!more && next_follows), rows, s);
        if (states == nullptr && !begins) merge(a.cache, s.range, s.merged, rows);
    }
    if (states == nullptr) write_out(a, t, t.kv_head, 0, s.merged, rows);
}

}  // namespace

#if defined(__AMX_BF16__)
constexpr size_t kTaskRows = 96;  // whole units of tiles
#else
constexpr size_t kTaskRows = 48;  // whole kRowBlock of 1, 2, 3, 4, 6 or 8 query heads
#endif

const KVKernels kv = {rope_kv_write,   copy_slot, attention, attention_merge, attention_scratch,
                      attention_state, kTaskRows};

size_t attention_state(size_t rows, const KVCache& cache) { return Sums::size(rows, cache); }

size_t attention_scratch(size_t rows, const KVCache& cache) {
    uint8_t* const start = nullptr;
    const size_t bytes = static_cast<size_t>(Scratch(start, rows, cache).end - start);
#if defined(__AMX_BF16__)
    const bool int8 = cache.type == OCTAVO_KV_INT8;
    const size_t tiled = int8 ? int8_tiled_attention_scratch(rows, cache) : tiled_attention_scratch(rows, cache);
    return bytes > tiled ? bytes : tiled;
#endif
    return bytes;
}

void attention(const AttentionArgs& a, const QueryTile& t, size_t last_head, size_t first_range, size_t last_range,
               uint8_t* scratch, float* states) {
#if defined(__AMX_BF16__)
    if (a.cache.type == OCTAVO_KV_INT8)
        return int8_tiled_attention(a, t, last_head, first_range, last_range, scratch, states);
    if (has_tiled_attention(a.cache))
        return tiled_attention(a, t, last_head, first_range, last_range, scratch, states);
#endif
    QueryTile of_head = t;
    for (size_t& head = of_head.kv_head; head < last_head; ++head)
        attend(a, of_head, head + 1 < last_head, first_range, last_range, scratch, states);
}

void attention_merge(const AttentionArgs& a, const QueryTile& t, size_t num_ranges, float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads);
    const Sums merged = Sums::in(states, rows, a.cache);
    for (size_t range = 1; range < num_ranges; ++range)
        merge(a.cache, Sums::in(states + range * Sums::size(rows, a.cache), rows, a.cache), merged, rows);
    write_out(a, t, t.kv_head, 0, merged, rows);
}

}  // namespace octavo::OCTAVO_LEVEL
