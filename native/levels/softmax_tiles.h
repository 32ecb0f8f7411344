// What the kinds of attention on AMX share.
#pragma once

#include <immintrin.h>

#include "attention.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

inline size_t min(size_t a, size_t b) { return a < b ? a : b; }
inline size_t max(size_t a, size_t b) { return a > b ? a : b; }

// 2^t for t <= 0 or a rounding above it, within 9e-5 of itself; rounding a weight to bfloat16 costs up to 2e-3. The fraction by
// a polynomial that is 1 at 0, fitted for the least relative error.
inline Floats exp2(Floats t) {
    const Floats r = (Floats)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t)
    Floats p = splat(7.7067041988e-2f);
    p = fma(p, r, splat(2.2764499121e-1f));
    p = fma(p, r, splat(6.9511678641e-1f));
    p = fma(p, r, splat(1.0f));
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)t);
}

// Lanes of a vector of positions from `at` on that lie in [first, last).
inline __mmask16 lanes_in(size_t at, size_t first, size_t last) {
    const auto below = [at](size_t end) { return end <= at ? 0u : end - at >= kLanes ? 0xffffu : (1u << (end - at)) - 1u; };
    return static_cast<__mmask16>(below(last) & ~below(first));
}

struct Seen {
    size_t first, last;  // positions [first, last)
};

// Positions of a range that some token of a tile sees, from a whole group on.
inline Seen positions_of(const AttentionArgs& a, const QueryTile& t, size_t range) {
    const size_t oldest = oldest_seen(a, t.first_position) / kGroup * kGroup;
    return {max(range * kKVRange, oldest), min((range + 1) * kKVRange, t.first_position + t.num_tokens)};
}

// What the thread reads behind a range and head of its task: the next range, head, or task.
template <size_t GROUPS>
void locate_next(const AttentionArgs& a, const QueryTile& t, size_t head, size_t range, size_t last_head, size_t first_range,
                 size_t last_range, KVSpan<GROUPS>& span) {
    const auto locate = [&](const QueryTile& tile, size_t next_head, size_t next_range) {
        const Seen next = positions_of(a, tile, next_range);
        span.locate_next(a, tile, next_head, next.first, next.last);
    };
    if (range + 1 < last_range) return locate(t, head, range + 1);
    if (head + 1 < last_head) return locate(t, head + 1, first_range);
    if (t.next != nullptr) locate(*t.next, t.next->kv_head, t.next_range);
}

// Asks for one of 8 parts of a piece: all at once would fill the few buffers for lines that are under way.
OCTAVO_FORCED void fetch_part(const uint8_t* piece, size_t bytes, size_t part) {
    const size_t lines = bytes / 64;
    for (size_t line = lines * part / 8; line < lines * (part + 1) / 8; ++line) __builtin_prefetch(piece + line * 64, 0, 2);
}

// What rows [row, row + count) of one head summed in one range joins what they summed in those before, or becomes their output.
inline void take_over(const AttentionArgs& a, const QueryTile& t, size_t head, size_t row, size_t count, bool starts, bool ends,
                      const Sums& of_range, const Sums& merged) {
    if (starts && ends) return write_out(a, t, head, row, of_range, count);
    if (starts) {
        std::memcpy(merged.rows, of_range.rows, count * state_width(a.cache) * sizeof(float));
        std::memcpy(merged.tops, of_range.tops, kLanes * sizeof(float));
    } else {
        merge(a.cache, of_range, merged, count);
    }
    if (ends) write_out(a, t, head, row, merged, count);
}

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
