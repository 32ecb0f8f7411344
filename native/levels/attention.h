// What the kinds of attention share: where K and V lie, what a row has summed, and what becomes of it.
#pragma once

#include "../abi.h"
#include "level.h"
#include "pairs.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr float kNever = -__builtin_inff();

// What a row has summed: [value_width] weighted values, then the sum of weights and the largest score.
inline size_t state_width(const KVCache& c) { return c.value_width + kGroup; }
inline float& weight_of(float* state, const KVCache& c) { return state[c.value_width]; }
inline float& largest_of(float* state, const KVCache& c) { return state[c.value_width + 1]; }

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

// Of KV head `kv_head`: row (token, query head).
inline const float* query(const AttentionArgs& a, const QueryTile& t, size_t kv_head, size_t row) {
    const size_t share = a.num_heads / a.cache.num_kv_heads;
    const size_t token = t.first_token + row / share, head = kv_head * share + row % share;
    return a.q + (token * a.num_heads + head) * a.cache.head_dim;
}

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

// A span's int8 numbers as bfloat16, in the order of BFloat16KV; the scales stay where they are.
template <size_t GROUPS>
void widen(const KVCache& c, uint8_t* out, KVSpan<GROUPS>& span) {
    const auto put = [](uint8_t* at, Pairs pairs) {
        const Words bits = bits_of(pairs);
        std::memcpy(at, &bits, sizeof bits);
    };
    Pairs pairs[2];
    for (size_t g = span.first; g < span.last; ++g) {
        const uint8_t *k = span.k[g], *v = span.v[g];
        span.k[g] = out;
        for (size_t step = 0; step < c.key_dim / 2; step += 2, out += 2 * kGroup * 4) {
            for (size_t lane = 0; lane < kGroup; lane += kLanes) {
                Int8KV::load(k + operand_offset<Int8KV>(kGroup, step, lane), pairs);
                put(out + lane * 4, pairs[0]);
                put(out + (kGroup + lane) * 4, pairs[1]);
            }
        }
        span.v[g] = out;
        for (size_t step = 0; step < kGroup / 2; step += 2, out += 2 * c.value_width * 4) {
            for (size_t column = 0; column < c.value_width; column += kLanes) {
                Int8KV::load(v + operand_offset<Int8KV>(c.value_width, step, column), pairs);
                put(out + column * 4, pairs[0]);
                put(out + (c.value_width + column) * 4, pairs[1]);
            }
        }
    }
}

// Adds what a row summed in one range to what it summed in the ranges before.
inline void merge(const KVCache& c, float* range, float* merged) {
    const float range_top = largest_of(range, c), top = largest_of(merged, c);
    if (range_top == kNever) return;
    if (top == kNever) {
        std::memcpy(merged, range, state_width(c) * sizeof(float));
        return;
    }
    const float largest = range_top > top ? range_top : top;
    Floats both{};  // one is e^0; which, no branch could foresee
    both[0] = top - largest, both[1] = range_top - largest;
    both = exp(both);
    const Floats keep = splat(both[0]), take = splat(both[1]);
    for (size_t i = 0; i < c.value_width; i += kLanes) store(merged + i, load(range + i) * take + load(merged + i) * keep);
    weight_of(merged, c) = weight_of(range, c) * take[0] + weight_of(merged, c) * keep[0];
    largest_of(merged, c) = largest;
}

inline void write_out(const AttentionArgs& a, const QueryTile& t, size_t head, size_t row, const float* merged) {
    const float by = 1.0f / merged[a.cache.value_width];
    float* out = a.out + (query(a, t, head, row) - a.q);
    for (size_t d = 0; d < a.cache.head_dim; ++d) out[d] = merged[d] * by;
}

// `rounded`: [padded, key_dim], as bfloat16; rows behind the last are zeros.
inline void round_queries(const AttentionArgs& a, const QueryTile& t, size_t head, size_t rows, size_t padded, uint16_t* rounded) {
    const size_t dim = a.cache.head_dim;
    std::memset(rounded, 0, padded * a.cache.key_dim * sizeof(uint16_t));
    for (size_t row = 0; row < rows; ++row) {
        const float* q = query(a, t, head, row);
        for (size_t d = 0; d < dim; d += kLanes) {
            const size_t count = dim - d < kLanes ? dim - d : kLanes;
            const Halves bits = to_bfloat16(load_part(q + d, count));
            uint16_t* out = rounded + row * a.cache.key_dim + d;
            if (count == kLanes)
                std::memcpy(out, &bits, sizeof bits);
            else
                std::memcpy(out, &bits, count * sizeof(uint16_t));
        }
    }
}

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
