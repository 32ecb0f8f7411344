// What the kinds of attention share: where K and V lie, what a row has summed, and what becomes of it.
#pragma once

#include "../abi.h"
#include "level.h"
#include "pairs.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr float kNever = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kSlack = 8.0f;  // a row's weights are against an older maximum until one would be 2^8 times heavier

// Scores times this are powers of two to weigh by. It is above 0: the largest score stays the largest.
inline float score_unit(const AttentionArgs& a) { return a.softcap != 0.0f ? kLog2E : a.scale * kLog2E; }

// What a row has summed: [value_width] weighted values, then the sum of weights by lane.
inline size_t state_width(const KVCache& c) { return c.value_width + kGroup; }

// Cuts a task's memory into pieces, each on cache lines of its own.
struct Cutter {
    uint8_t* end;

    template <class T = uint8_t>
    T* take(size_t count) {
        T* piece = reinterpret_cast<T*>(end);
        end += round_up(count * sizeof(T), 64);
        return piece;
    }
};

// What rows that follow each other have summed.
struct Sums {
    float* rows;  // [count, state_width]
    float* tops;  // [count]: their largest scores, as powers of two (times log2 e)

    static size_t size(size_t count, const KVCache& c) { return round_up(count, kGroup) * (state_width(c) + 1); }
    static Sums in(float* memory, size_t count, const KVCache& c) {
        return {memory, memory + round_up(count, kGroup) * state_width(c)};
    }

    // Of the rows from `row` on.
    Sums from(size_t row, const KVCache& c) const {
        Sums rest = *this;
        rest.rows += row * state_width(c), rest.tops += row;
        return rest;
    }
    void clear(size_t count, const KVCache& c) const {
        std::memset(rows, 0, count * state_width(c) * sizeof(float));
        for (size_t row = 0; row < round_up(count, kLanes); ++row) tops[row] = kNever;
    }
};

inline size_t slot_of(const AttentionArgs& a, const QueryTile& t, size_t position) {
    return static_cast<size_t>(t.block_table[position / a.block_size]) * a.block_size + position % a.block_size;
}

// A copy of a group's V in bfloat16 whose positions from `count` on are zero: their memory was perhaps never written,
// and NaN weighed with 0 is NaN.
inline const uint8_t* clear_behind(const KVCache& c, const uint8_t* v, size_t count, uint8_t* out) {
    const size_t pair_bytes = c.value_width * 4;
    std::memcpy(out, v, (count + 1) / 2 * pair_bytes);
    std::memset(out + (count + 1) / 2 * pair_bytes, 0, (kGroup - count) / 2 * pair_bytes);
    for (size_t i = 0; count % 2 != 0 && i < c.value_width; ++i)
        std::memset(out + count / 2 * pair_bytes + i * 4 + 2, 0, 2);
    return out;
}

// Where rows (token, query head) that share a KV head lie in q and in the output, one after the other.
class Rows {
public:
    Rows(const AttentionArgs& a, const QueryTile& t, size_t kv_head, size_t row)
        : share_(a.num_heads / a.cache.num_kv_heads),
          head_(row % share_),
          step_(a.cache.head_dim),
          wrap_((a.num_heads - share_ + 1) * a.cache.head_dim),
          at_(((t.first_token + row / share_) * a.num_heads + kv_head * share_ + head_) * a.cache.head_dim) {}

    size_t next() {
        const size_t at = at_;
        const bool last = ++head_ == share_;
        at_ += last ? wrap_ : step_;
        if (last) head_ = 0;
        return at;
    }

private:
    size_t share_, head_, step_, wrap_, at_;
};

// The oldest position that the one at `position` sees.
inline size_t oldest_seen(const AttentionArgs& a, size_t position) {
    return a.window != 0 && position + 1 > a.window ? position + 1 - a.window : 0;
}

// Pieces that hold consecutive groups of slots, where blocks are whole groups.
struct Pieces {
    const AttentionArgs& a;
    const QueryTile& t;
    size_t head, block, within;

    Pieces(const AttentionArgs& args, const QueryTile& tile, size_t position, size_t kv_head)
        : a(args), t(tile), head(kv_head), block(position / args.block_size), within(position % args.block_size) {}

    uint8_t* next() {
        const size_t slot = static_cast<size_t>(t.block_table[block]) * a.block_size + within;
        within += kGroup;
        if (within == a.block_size) within = 0, ++block;
        return a.cache.piece(slot / kGroup, head);
    }
};

// A copy of 16 slots in a row, where blocks are no whole groups.
inline uint8_t* gather(const AttentionArgs& a, const QueryTile& t, size_t first, size_t end, size_t head,
                uint8_t* piece) {
    for (size_t lane = 0; lane < kGroup && first + lane < end; ++lane) {
        const size_t slot = slot_of(a, t, first + lane);
        copy_slot(a.cache, a.cache.piece(slot / kGroup, head), slot % kGroup, piece, lane);
    }
    return piece;
}

// Where the K, V and scales of GROUPS consecutive groups lie; the pieces that come next can be asked for.
template <size_t GROUPS>
struct KVSpan {
    const uint8_t* k[GROUPS];
    const uint8_t* v[GROUPS];
    const float* scales[GROUPS];  // [2][kGroup]: of K, of V
    const uint8_t* next[GROUPS];
    size_t start;                 // position
    size_t first, last;           // groups that are there

    // Positions from `begin` (of a group) up to `end`, of one head; `next` those of another. `pieces` is room for
    // GROUPS pieces, `wide` for one in bfloat16.
    void locate(const AttentionArgs& a, const QueryTile& t, size_t head, size_t begin, size_t end, uint8_t* pieces,
                uint8_t* wide) {
        const KVCache& cache = a.cache;
        first = (begin - start) / kGroup, last = (end - start + kGroup - 1) / kGroup;
        const bool whole = a.block_size % kGroup == 0;
        Pieces all(a, t, start + first * kGroup, head);
        for (size_t g = first; g < last; ++g) {
            const uint8_t* piece =
                whole ? all.next() : gather(a, t, start + g * kGroup, end, head, pieces + g * cache.piece_bytes);
            k[g] = next[g] = piece;
            v[g] = piece + cache.v_offset;
            scales[g] = reinterpret_cast<const float*>(piece + cache.scale_offset);
        }
        if (first > 0) scales[first - 1] = scales[first];  // weighed in pairs, the other as nothing
        if (last < GROUPS) scales[last] = scales[last - 1];
        if (end % kGroup != 0 && cache.type == OCTAVO_KV_BFLOAT16)
            v[last - 1] = clear_behind(cache, v[last - 1], end % kGroup, wide);
    }
    void locate_next(const AttentionArgs& a, const QueryTile& t, size_t head, size_t from, size_t end) {
        if (a.block_size % kGroup != 0) return;
        Pieces all(a, t, from, head);
        for (size_t g = first; g < last && from < end; ++g, from += kGroup) next[g] = all.next();
    }
};

// A span's int8 numbers as bfloat16, in the order of BFloat16KV: groups one after the other in `keys` and in `values`. The
// scales stay where they are.
template <size_t GROUPS>
void widen(const KVCache& c, uint8_t* keys, uint8_t* values, KVSpan<GROUPS>& span) {
    Words pairs[2];
    for (size_t g = span.first; g < span.last; ++g) {
        const uint8_t *k = span.k[g], *v = span.v[g];
        uint8_t* out = keys + g * kGroup * c.key_dim * 2;
        span.k[g] = out;
        for (size_t step = 0; step < c.key_dim / 2; step += 2, out += 2 * kGroup * 4) {
            for (size_t lane = 0; lane < kGroup; lane += kLanes) {
                widen_int8(load_words(k + (step / 2 * kGroup + lane) * 4), pairs);
                std::memcpy(out + lane * 4, &pairs[0], sizeof *pairs);
                std::memcpy(out + (kGroup + lane) * 4, &pairs[1], sizeof *pairs);
            }
        }
        out = values + g * kGroup * c.value_width * 2;
        span.v[g] = out;
        for (size_t step = 0; step < kGroup / 2; step += 2, out += 2 * c.value_width * 4) {
            for (size_t column = 0; column < c.value_width; column += kLanes) {
                widen_int8(load_words(v + (step / 2 * c.value_width + column) * 4), pairs);
                std::memcpy(out + column * 4, &pairs[0], sizeof *pairs);
                std::memcpy(out + (c.value_width + column) * 4, &pairs[1], sizeof *pairs);
            }
        }
    }
}

// Adds what `count` rows summed in one range to what they summed in the ranges before.
inline void merge(const KVCache& c, const Sums& range, const Sums& merged, size_t count) {
    float keep[kLanes], take[kLanes];
    for (size_t row = 0; row < count; ++row) {
        const size_t lane = row % kLanes;
        if (lane == 0) {
            const Floats top = load(merged.tops + row), range_top = load(range.tops + row), largest = max(range_top, top);
            const Floats against = largest == splat(kNever) ? Floats{} : largest;
            store(keep, power_of_two(top - against));
            store(take, power_of_two(range_top - against));
            store(merged.tops + row, largest);
        }
        const Floats kept = splat(keep[lane]), taken = splat(take[lane]);
        const float* from = range.rows + row * state_width(c);
        float* to = merged.rows + row * state_width(c);
        for (size_t i = 0; i < c.value_width + kLanes; i += kLanes)
            store(to + i, fma(load(from + i), taken, load(to + i) * kept));
    }
}

// Writes the output of `count` rows from `row` on, whose sums `merged` are.
inline void write_out(const AttentionArgs& a, const QueryTile& t, size_t head, size_t row, const Sums& merged, size_t count) {
    const size_t dim = a.cache.head_dim, width = a.cache.value_width;
    Rows rows(a, t, head, row);
    float weights[kGroup];
    for (size_t r = 0; r < count; ++r) {
        if (r % kGroup == 0) {
            Floats lanes[kGroup];
            const size_t together = count - r < kGroup ? count - r : kGroup;
            for (size_t i = 0; i < together; ++i) lanes[i] = load(merged.rows + (r + i) * state_width(a.cache) + width);
            if (together == kGroup)
                sum_each(lanes, weights);
            else
                for (size_t i = 0; i < together; ++i) weights[i] = sum(lanes[i]);
        }
        const Floats by = splat(1.0f / weights[r % kGroup]);
        const float* values = merged.rows + r * state_width(a.cache);
        float* out = a.out + rows.next();
        size_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) store(out + d, load(values + d) * by);
        if (d < dim) store_part(out + d, load(values + d) * by, dim - d);
    }
}

// `rounded`: [padded, key_dim], as bfloat16; rows behind the last are zeros.
inline void round_queries(const AttentionArgs& a, const QueryTile& t, size_t head, size_t count, size_t padded,
                          Rounded* rounded) {
    const size_t dim = a.cache.head_dim;
    Rows rows(a, t, head, 0);
    for (size_t row = 0; row < count; ++row, rounded += a.cache.key_dim) {
        const float* q = a.q + rows.next();
        size_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) store_rounded(rounded + d, load(q + d));
        if (d < dim) {
            Rounded rest[kLanes];
            store_rounded(rest, load_part(q + d, dim - d));
            std::memcpy(rounded + d, rest, (a.cache.key_dim - d) * sizeof *rest);
        }
    }
    std::memset(rounded, 0, (padded - count) * a.cache.key_dim * sizeof *rounded);
}

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
