// Attention of a tile of queries over the paged cache: online softmax over KV tiles at absolute positions.
//
// The rows of a task are (token, query head) pairs that share a KV head, token-major. For one row the order of all
// sums is fixed by position alone: scores add over head_dim in order; weights add by lane of position, halving at the
// end of a range; values add over positions in order; the running maximum moves at multiples of kKVTile; the results
// of ranges of kKVRange positions are merged in order. A chunk of a prompt therefore gives the bits of the whole
// prompt, and ranges computed by several threads those of one. Masked positions weigh exactly 0 and their K may be
// anything.
#include <cmath>

#include "../abi.h"
#include "level.h"
#include "pairs.h"
#if defined(__AMX_BF16__)
#include "tiles.h"
#endif

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kRowBlock = 4;                     // rows in registers
constexpr size_t kVectors = kLanes == 16 ? 4 : 2;   // vectors of positions or values in registers
constexpr size_t kTileVectors = kKVTile / kLanes;
constexpr size_t kGroupVectors = kGroup / kLanes;
constexpr size_t kTileGroups = kKVTile / kGroup;
constexpr size_t kMaxRowsInt8 = 2 * kRowBlock;  // more rows than this widen a tile of int8 once for all
constexpr float kNever = -__builtin_inff();

// What a row has summed: [value_width] weighted values, then the sum of weights and the largest score.
inline size_t state_width(const KVCache& c) { return c.value_width + kGroup; }
inline float& weight_of(float* state, const KVCache& c) { return state[c.value_width]; }
inline float& largest_of(float* state, const KVCache& c) { return state[c.value_width + 1]; }

#if defined(__AMX_BF16__)
constexpr size_t kScoreRows = 2 * kTileMaxRows;
// Whether tiles fit: whole steps of 32 dims. Few rows are short tiles; of more, all tiles are full.
inline bool has_tiles(const KVCache& c) { return c.type != OCTAVO_KV_FLOAT32 && c.head_dim % 32 == 0; }
inline size_t padded_rows(size_t rows) { return rows <= kTileMaxRows ? rows : round_up(rows, kTileMaxRows); }
#else
constexpr size_t kScoreRows = kRowBlock;
inline size_t padded_rows(size_t rows) { return rows; }
#endif

struct Scratch {
    float* range;       // [padded rows, state_width]: of the current range
    float* merged;      // [padded rows, state_width]: of the ranges before
    float* weights;     // [rows, kLanes]: sum of weights by lane, of the range
    float* scores;      // [kScoreRows, kKVTile]
    uint16_t* rounded;  // [kScoreRows, kKVTile]: weights as bfloat16
    uint16_t* q;        // [padded rows, key_dim]: queries as bfloat16
    uint8_t* pieces;    // kTileGroups pieces of the cache: for blocks that are no multiple of kGroup
    uint8_t* wide;      // the same in bfloat16: widened from int8
    uint8_t* end;

    Scratch(uint8_t* memory, size_t rows, const KVCache& c) {
        const auto take = [&memory](size_t bytes) {
            uint8_t* piece = memory;
            memory += round_up(bytes, 64);
            return piece;
        };
        const size_t padded = padded_rows(rows);
        range = reinterpret_cast<float*>(take(padded * state_width(c) * 4));
        merged = reinterpret_cast<float*>(take(padded * state_width(c) * 4));
        weights = reinterpret_cast<float*>(take(rows * kLanes * 4));
        scores = reinterpret_cast<float*>(take(kScoreRows * kKVTile * 4));
        rounded = reinterpret_cast<uint16_t*>(take(kScoreRows * kKVTile * 2));
        q = reinterpret_cast<uint16_t*>(take(padded * c.key_dim * 2 + sizeof(Halves)));
        pieces = take(kTileGroups * c.piece_bytes);
        wide = take(kTileGroups * kGroup * (c.key_dim + c.value_width) * 2);
        end = memory;
    }
};

// The positions that a task visits, from the start of a KV tile.
struct Visit {
    size_t begin, end;
};

// Where the K, V and scales of one KV tile lie. A group behind the last repeats it: its scores are masked.
struct KVTile {
    const uint8_t* k[kTileGroups];
    const uint8_t* v[kTileGroups];
    const float* scales[kTileGroups];  // [2][kGroup]: of K, of V
    const uint8_t* next[kTileGroups];  // pieces of the tile that follows, to be asked for while this one is computed
    size_t start, num_groups, next_start, next_head;
};

inline size_t slot_of(const AttentionArgs& a, const QueryTile& t, size_t position) {
    return static_cast<size_t>(t.block_table[position / a.block_size]) * a.block_size + position % a.block_size;
}

// A copy of a group's V in bfloat16 whose positions from `count` on are zero: their memory was perhaps never written,
// and NaN weighed with 0 is NaN.
const uint8_t* clear_behind(const KVCache& c, const uint8_t* v, size_t count, uint8_t* out) {
    const size_t pair_bytes = c.value_width * 4;
    std::memcpy(out, v, (count + 1) / 2 * pair_bytes);
    std::memset(out + (count + 1) / 2 * pair_bytes, 0, (kGroup - count) / 2 * pair_bytes);
    for (size_t i = 0; count % 2 != 0 && i < c.value_width; ++i)
        std::memset(out + count / 2 * pair_bytes + i * 4 + 2, 0, 2);
    return out;
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
uint8_t* gather(const AttentionArgs& a, const QueryTile& t, size_t first, size_t end, uint8_t* piece) {
    for (size_t lane = 0; lane < kGroup && first + lane < end; ++lane) {
        const size_t slot = slot_of(a, t, first + lane);
        copy_slot(a.cache, a.cache.piece(slot / kGroup, t.kv_head), slot % kGroup, piece, lane);
    }
    return piece;
}

// `end`: of what the queries see.
void locate(const AttentionArgs& a, const QueryTile& t, size_t start, size_t end, const Scratch& s, KVTile& tile) {
    const KVCache& cache = a.cache;
    const bool whole = a.block_size % kGroup == 0;
    tile.start = start;
    tile.num_groups = ((end - start < kKVTile ? end - start : kKVTile) + kGroup - 1) / kGroup;
    Pieces pieces(a, t, start, t.kv_head), next(a, t, tile.next_start, tile.next_head);
    for (size_t g = 0; g < kTileGroups; ++g) {
        if (g < tile.num_groups) {
            const uint8_t* piece =
                whole ? pieces.next() : gather(a, t, start + g * kGroup, end, s.pieces + g * cache.piece_bytes);
            tile.k[g] = piece;
            tile.v[g] = piece + cache.v_offset;
            tile.scales[g] = reinterpret_cast<const float*>(piece + cache.scale_offset);
        } else {
            tile.k[g] = tile.k[g - 1], tile.v[g] = tile.v[g - 1], tile.scales[g] = tile.scales[g - 1];
        }
        tile.next[g] = whole && tile.next_start + g * kGroup < end ? next.next() : tile.k[g];
    }
    if (end % kGroup != 0 && end < start + kKVTile && cache.type == OCTAVO_KV_BFLOAT16) {
        const size_t g = tile.num_groups - 1;
        tile.v[g] = clear_behind(cache, tile.v[g], end % kGroup, s.wide);
    }
}

// The tile's int8 numbers as bfloat16, in the order of BFloat16KV; the scales stay where they are.
void widen(const KVCache& c, const Scratch& s, KVTile& tile) {
    uint8_t* out = s.wide;
    const auto put = [](uint8_t* at, Pairs pairs) {
        const Words bits = bits_of(pairs);
        std::memcpy(at, &bits, sizeof bits);
    };
    Pairs pairs[2];
    for (size_t g = 0; g < tile.num_groups; ++g) {
        const uint8_t *k = tile.k[g], *v = tile.v[g];
        tile.k[g] = out;
        for (size_t step = 0; step < c.key_dim / 2; step += 2, out += 2 * kGroup * 4) {
            for (size_t lane = 0; lane < kGroup; lane += kLanes) {
                Int8KV::load(k + operand_offset<Int8KV>(kGroup, step, lane), pairs);
                put(out + lane * 4, pairs[0]);
                put(out + (kGroup + lane) * 4, pairs[1]);
            }
        }
        tile.v[g] = out;
        for (size_t step = 0; step < kGroup / 2; step += 2, out += 2 * c.value_width * 4) {
            for (size_t column = 0; column < c.value_width; column += kLanes) {
                Int8KV::load(v + operand_offset<Int8KV>(c.value_width, step, column), pairs);
                put(out + column * 4, pairs[0]);
                put(out + (c.value_width + column) * 4, pairs[1]);
            }
        }
    }
    for (size_t g = tile.num_groups; g < kTileGroups; ++g) tile.k[g] = tile.k[g - 1], tile.v[g] = tile.v[g - 1];
}

template <class KV, size_t ROWS>
inline void score(const typename KV::Element* const* q, const KVTile& tile, size_t vector, size_t num_steps,
                  float* scores) {
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
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t v = 0; v < kVectors; ++v) store(scores + r * kKVTile + (vector + v) * kLanes, total[r][v]);
}

// total[r][d] += sum over positions [first, last) of the tile of weights[r][j] * v[j][d]. Positions that are loaded
// together with these weigh 0.
template <class KV, size_t ROWS, size_t VECTORS>
inline void mix(const typename KV::Element* weights, const KVTile& tile, size_t first, size_t last, size_t column,
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

inline void put_weight(float* at, Floats weight) { store(at, weight); }
inline void put_weight(uint16_t* at, Floats weight) {
    const Halves rounded = to_bfloat16(weight);
    std::memcpy(at, &rounded, sizeof rounded);
}

// Turns a row's scores into weights against its new maximum; positions outside [oldest, newest] weigh 0.
template <bool SCALED, class Element>
inline void soften(const AttentionArgs& a, const KVTile& tile, size_t oldest, size_t newest, const float* scores,
                   Element* out, float* state, float* weights) {
    float& largest = largest_of(state, a.cache);
    const bool all_visible = oldest <= tile.start && newest + 1 >= tile.start + kKVTile;
    Ints lanes;
    for (size_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l);
    Floats score[kTileVectors];
    Floats top = splat(kNever);
    for (size_t v = 0; v < kTileVectors; ++v) {
        score[v] = load(scores + v * kLanes) * a.scale;
        if constexpr (SCALED) score[v] *= load(tile.scales[v / kGroupVectors] + v % kGroupVectors * kLanes);
        if (a.softcap != 0.0f) score[v] = a.softcap * tanh(score[v] / a.softcap);
        if (!all_visible) {
            const Ints position = lanes + static_cast<int32_t>(tile.start + v * kLanes);
            const Ints visible =
                (position <= static_cast<int32_t>(newest)) & (position >= static_cast<int32_t>(oldest));
            score[v] = visible ? score[v] : splat(kNever);
        }
        top = max(score[v], top);
    }
    const float tile_top = max_lane(top);
    const float new_top = tile_top > largest ? tile_top : largest;
    if (new_top == kNever) {  // nothing visible so far
        std::memset(out, 0, kKVTile * sizeof(Element));
        return;
    }
    Floats sums = load(weights);
    if (new_top != largest) {
        const Floats shrink = exp_below(splat(largest) - new_top);
        for (size_t c = 0; c < a.cache.value_width; c += kLanes) store(state + c, load(state + c) * shrink);
        sums *= shrink;
        largest = new_top;
    }
    for (size_t v = 0; v < kTileVectors; ++v) {
        Floats weight = exp_below(score[v] - new_top);
        sums += weight;
        if constexpr (SCALED) {
            weight *= load(tile.scales[v / kGroupVectors] + kGroup + v % kGroupVectors * kLanes);
            // The scale of a position that is not visible may be anything.
            if (!all_visible) weight = score[v] > splat(kNever) ? weight : Floats{};
        }
        put_weight(out + v * kLanes, weight);
    }
    store(weights, sums);
}

inline const float* query(const AttentionArgs& a, const QueryTile& t, size_t row) {
    const size_t share = a.num_heads / a.cache.num_kv_heads;
    const size_t token = t.first_token + row / share, head = t.kv_head * share + row % share;
    return a.q + (token * a.num_heads + head) * a.cache.head_dim;
}

// Positions [first, last) of the KV tile, relative to its start, that some of the rows see.
struct Seen {
    size_t first, last;
};

inline Seen seen_by(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, size_t num_rows) {
    const size_t share = a.num_heads / a.cache.num_kv_heads;
    const size_t first_position = t.first_position + row / share;
    const size_t last_position = t.first_position + (row + num_rows - 1) / share;
    const size_t oldest = a.window != 0 && first_position + 1 > a.window ? first_position + 1 - a.window : 0;
    if (last_position < tile.start || oldest >= tile.start + kKVTile) return {0, 0};
    const size_t last = last_position + 1 - tile.start;
    return {oldest > tile.start ? oldest - tile.start : 0, last < kKVTile ? last : kKVTile};
}

template <bool SCALED, class Element>
void soften_rows(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, size_t num_rows,
                 const float* scores, const Scratch& s, Element* weights) {
    const size_t share = a.num_heads / a.cache.num_kv_heads;
    size_t newest = t.first_position + row / share, head = row % share;
    for (size_t r = 0; r < num_rows; ++r, ++head) {
        if (head == share) head = 0, ++newest;
        const size_t oldest = a.window != 0 && newest + 1 > a.window ? newest + 1 - a.window : 0;
        soften<SCALED>(a, tile, oldest, newest, scores + r * kKVTile, weights + r * kKVTile,
                       s.range + (row + r) * state_width(a.cache), s.weights + (row + r) * kLanes);
    }
}

template <class KV, bool SCALED, size_t ROWS>
void visit(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, const Scratch& s) {
    const Seen seen = seen_by(a, t, tile, row, ROWS);
    if (seen.last == 0) return;
    using Element = typename KV::Element;
    const Element* q[ROWS];
    Element* weights;
    if constexpr (KV::kDepth == 2) {
        for (size_t r = 0; r < ROWS; ++r) q[r] = s.q + (row + r) * a.cache.key_dim;
        weights = s.rounded;
    } else {
        for (size_t r = 0; r < ROWS; ++r) q[r] = query(a, t, row + r);
        weights = s.scores;
    }
    for (size_t vector = 0; vector < tile.num_groups * kGroupVectors; vector += kVectors)
        score<KV, ROWS>(q, tile, vector, a.cache.key_dim / KV::kDepth, s.scores);
    soften_rows<SCALED>(a, t, tile, row, ROWS, s.scores, s, weights);
    const size_t width = a.cache.value_width;
    float* total = s.range + row * state_width(a.cache);
    size_t column = 0;
    for (; column + kVectors * kLanes <= width; column += kVectors * kLanes)
        mix<KV, ROWS, kVectors>(weights, tile, seen.first, seen.last, column, a.cache, total);
    for (; column < width; column += kLanes)
        mix<KV, ROWS, 1>(weights, tile, seen.first, seen.last, column, a.cache, total);
}

template <class KV, bool SCALED>
void visit_rows(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t rows, const Scratch& s) {
    size_t row = 0;
    for (; row + kRowBlock <= rows; row += kRowBlock) visit<KV, SCALED, kRowBlock>(a, t, tile, row, s);
    switch (rows - row) {
        case 1: return visit<KV, SCALED, 1>(a, t, tile, row, s);
        case 2: return visit<KV, SCALED, 2>(a, t, tile, row, s);
        case 3: return visit<KV, SCALED, 3>(a, t, tile, row, s);
    }
}

#if defined(__AMX_BF16__)
// Tiles 0 to 3: sums. 4: queries, 5: K. 6: weights of 16 positions, 7: their V.
void configure(size_t rows) {
    TileConfig config;
    const size_t short_rows = rows < kTileMaxRows ? rows : kTileMaxRows;
    for (size_t tile = 0; tile < 5; ++tile) config.set(tile, short_rows);
    config.set(5, kTileMaxRows);
    config.set(6, short_rows, kGroup * sizeof(uint16_t));
    config.set(7, kGroup / 2);
    configure_tiles(config);
}

inline void fetch(const uint8_t* from, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// scores[., 64 positions] of up to 16 rows; those of groups that are not there repeat the last.
void score_with_tiles(const KVCache& c, const KVTile& tile, const uint16_t* q, float* scores) {
    static_assert(kTileGroups == 4);
    constexpr size_t step_bytes = kTileMaxRows * kTileRowBytes;
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (size_t step = 0; step < c.key_dim / 32; ++step) {
        load_tile<4>(q + step * 32, c.key_dim * sizeof(uint16_t));
        load_tile<5>(tile.k[0] + step * step_bytes, kTileRowBytes);
        multiply_tiles<0, 4, 5>();
        load_tile<5>(tile.k[1] + step * step_bytes, kTileRowBytes);
        multiply_tiles<1, 4, 5>();
        load_tile<5>(tile.k[2] + step * step_bytes, kTileRowBytes);
        multiply_tiles<2, 4, 5>();
        load_tile<5>(tile.k[3] + step * step_bytes, kTileRowBytes);
        multiply_tiles<3, 4, 5>();
    }
    constexpr size_t stride = kKVTile * sizeof(float);
    store_tile<0>(scores, stride);
    store_tile<1>(scores + kGroup, stride);
    store_tile<2>(scores + 2 * kGroup, stride);
    store_tile<3>(scores + 3 * kGroup, stride);
}

// total[., COUNT x 16 columns] += weights of the groups [first, last) times their V.
template <size_t COUNT>
void mix_with_tiles(const KVCache& c, const KVTile& tile, const uint16_t* weights, size_t first, size_t last,
                    size_t column, float* total) {
    const size_t stride = state_width(c) * sizeof(float), row_bytes = c.value_width * 4;
    total += column;
    load_tile<0>(total, stride);
    if constexpr (COUNT > 1) load_tile<1>(total + kGroup, stride);
    if constexpr (COUNT > 2) load_tile<2>(total + 2 * kGroup, stride);
    if constexpr (COUNT > 3) load_tile<3>(total + 3 * kGroup, stride);
    for (size_t group = first; group < last; ++group) {
        const uint8_t* v = tile.v[group] + column * 4;
        load_tile<6>(weights + group * kGroup, kKVTile * sizeof(uint16_t));
        load_tile<7>(v, row_bytes);
        multiply_tiles<0, 6, 7>();
        if constexpr (COUNT > 1) load_tile<7>(v + 64, row_bytes), multiply_tiles<1, 6, 7>();
        if constexpr (COUNT > 2) load_tile<7>(v + 128, row_bytes), multiply_tiles<2, 6, 7>();
        if constexpr (COUNT > 3) load_tile<7>(v + 192, row_bytes), multiply_tiles<3, 6, 7>();
    }
    store_tile<0>(total, stride);
    if constexpr (COUNT > 1) store_tile<1>(total + kGroup, stride);
    if constexpr (COUNT > 2) store_tile<2>(total + 2 * kGroup, stride);
    if constexpr (COUNT > 3) store_tile<3>(total + 3 * kGroup, stride);
}

void mix_rows(const AttentionArgs& a, const KVTile& tile, const Seen& seen, size_t row, const uint16_t* weights,
              const Scratch& s) {
    const size_t first = seen.first / kGroup, last = (seen.last + kGroup - 1) / kGroup, width = a.cache.value_width;
    float* total = s.range + row * state_width(a.cache);
    size_t column = 0;
    for (; column + 4 * kGroup <= width; column += 4 * kGroup)
        mix_with_tiles<4>(a.cache, tile, weights, first, last, column, total);
    for (; column < width; column += 2 * kGroup)  // width is a multiple of 32 here
        mix_with_tiles<2>(a.cache, tile, weights, first, last, column, total);
}

// Two tiles of rows take turns: the tile unit works for one while the core weighs the scores of the other.
template <bool SCALED>
void visit_with_tiles(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t rows, const Scratch& s) {
    for (const uint8_t* next : tile.next) fetch(next, a.cache.piece_bytes);
    for (size_t begin = 0; begin < rows; begin += kScoreRows) {
        Seen seen[2] = {};
        size_t num_rows[2] = {};
        for (size_t i = 0; i < 2; ++i) {
            const size_t row = begin + i * kTileMaxRows;
            if (row >= rows) continue;
            num_rows[i] = rows - row < kTileMaxRows ? rows - row : kTileMaxRows;
            seen[i] = seen_by(a, t, tile, row, num_rows[i]);
            if (seen[i].last != 0)
                score_with_tiles(a.cache, tile, s.q + row * a.cache.key_dim, s.scores + i * kTileMaxRows * kKVTile);
        }
        for (size_t i = 0; i < 2; ++i) {
            const size_t row = begin + i * kTileMaxRows, at = i * kTileMaxRows * kKVTile;
            if (seen[i].last == 0) continue;
            soften_rows<SCALED>(a, t, tile, row, num_rows[i], s.scores + at, s, s.rounded + at);
            mix_rows(a, tile, seen[i], row, s.rounded + at, s);
        }
    }
}
#endif

void visit_tile(const AttentionArgs& a, const QueryTile& t, KVTile& tile, size_t rows, const Scratch& s) {
#if defined(__AMX_BF16__)
    if (has_tiles(a.cache)) {
        if (a.cache.type == OCTAVO_KV_BFLOAT16) return visit_with_tiles<false>(a, t, tile, rows, s);
        widen(a.cache, s, tile);
        return visit_with_tiles<true>(a, t, tile, rows, s);
    }
#endif
    switch (a.cache.type) {
        case OCTAVO_KV_FLOAT32: return visit_rows<FloatKV, false>(a, t, tile, rows, s);
        case OCTAVO_KV_BFLOAT16: return visit_rows<BFloat16KV, false>(a, t, tile, rows, s);
        default:
            if (rows <= kMaxRowsInt8) return visit_rows<Int8KV, true>(a, t, tile, rows, s);
            widen(a.cache, s, tile);
            return visit_rows<BFloat16KV, true>(a, t, tile, rows, s);
    }
}

// Adds what a row summed in one range to what it summed in the ranges before.
void merge(const KVCache& c, float* range, float* merged) {
    const float range_top = largest_of(range, c), top = largest_of(merged, c);
    if (range_top == kNever) return;
    if (top == kNever) {
        std::memcpy(merged, range, state_width(c) * sizeof(float));
        return;
    }
    const float new_top = range_top > top ? range_top : top;
    const Floats keep = exp_below(splat(top) - new_top), take = exp_below(splat(range_top) - new_top);
    for (size_t i = 0; i < c.value_width; i += kLanes) store(merged + i, load(range + i) * take + load(merged + i) * keep);
    weight_of(merged, c) = weight_of(range, c) * take[0] + weight_of(merged, c) * keep[0];
    largest_of(merged, c) = new_top;
}

void write_out(const AttentionArgs& a, const QueryTile& t, size_t row, float* merged) {
    const float weight = weight_of(merged, a.cache);
    float* out = a.out + (query(a, t, row) - a.q);
    for (size_t d = 0; d < a.cache.head_dim; ++d) out[d] = merged[d] / weight;
}

void round_queries(const AttentionArgs& a, const QueryTile& t, size_t rows, const Scratch& s) {
    const size_t dim = a.cache.head_dim;
    std::memset(s.q, 0, padded_rows(rows) * a.cache.key_dim * sizeof(uint16_t));
    for (size_t row = 0; row < rows; ++row) {
        const float* q = query(a, t, row);
        for (size_t d = 0; d < dim; d += kLanes) {
            const size_t count = dim - d < kLanes ? dim - d : kLanes;
            const Halves rounded = to_bfloat16(load_part(q + d, count));
            uint16_t* out = s.q + row * a.cache.key_dim + d;
            if (count == kLanes)
                std::memcpy(out, &rounded, sizeof rounded);
            else
                std::memcpy(out, &rounded, count * sizeof(uint16_t));
        }
    }
}

// Sums KV tiles from `begin` up to `range_end` for all rows of the query tile into s.range.
void visit_range(const AttentionArgs& a, const QueryTile& t, size_t begin, size_t range_end, const Visit& whole,
                 size_t rows, const Scratch& s) {
    const size_t stride = state_width(a.cache);
    std::memset(s.range, 0, padded_rows(rows) * stride * sizeof(float));
    std::memset(s.weights, 0, rows * kLanes * sizeof(float));
    for (size_t row = 0; row < rows; ++row) largest_of(s.range + row * stride, a.cache) = kNever;
    KVTile tile;
    for (size_t start = begin; start < range_end; start += kKVTile) {
        const bool last = start + kKVTile >= whole.end;
        tile.next_start = last ? (t.next_head_follows ? whole.begin : t.first_position + t.num_tokens) : start + kKVTile;
        tile.next_head = t.kv_head + (last && t.next_head_follows);
        locate(a, t, start, t.first_position + t.num_tokens, s, tile);
        visit_tile(a, t, tile, rows, s);
    }
    for (size_t row = 0; row < rows; ++row)
        weight_of(s.range + row * stride, a.cache) = sum(load(s.weights + row * kLanes));
}

}  // namespace

const KVKernels kv = {rope_kv_write, copy_slot, attention, attention_merge, attention_scratch, attention_state};

size_t attention_state(size_t rows, const KVCache& cache) { return padded_rows(rows) * state_width(cache); }

size_t attention_scratch(size_t rows, const KVCache& cache) {
    uint8_t* const start = nullptr;
    return static_cast<size_t>(Scratch(start, rows, cache).end - start);
}

void attention(const AttentionArgs& a, const QueryTile& t, size_t first_range, size_t last_range, uint8_t* scratch,
               float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads), stride = state_width(a.cache);
    Scratch s(scratch, rows, a.cache);
    if (a.cache.type != OCTAVO_KV_FLOAT32) round_queries(a, t, rows, s);
#if defined(__AMX_BF16__)
    if (has_tiles(a.cache)) configure(rows);
#endif
    for (size_t row = 0; row < rows; ++row) largest_of(s.merged + row * stride, a.cache) = kNever;
    const size_t end = t.first_position + t.num_tokens;
    const size_t oldest = a.window != 0 && t.first_position + 1 > a.window ? t.first_position + 1 - a.window : 0;
    const size_t first = first_range * kKVRange > oldest ? first_range * kKVRange : oldest;
    const Visit visit = {first / kKVTile * kKVTile, last_range * kKVRange < end ? last_range * kKVRange : end};
    for (size_t range = first_range; range < last_range; ++range) {
        if (states != nullptr) s.range = states + (range - first_range) * padded_rows(rows) * stride;
        const size_t begin = range == first_range ? visit.begin : range * kKVRange;
        visit_range(a, t, begin, (range + 1) * kKVRange < end ? (range + 1) * kKVRange : end, visit, rows, s);
        if (states == nullptr)
            for (size_t row = 0; row < rows; ++row) merge(a.cache, s.range + row * stride, s.merged + row * stride);
    }
#if defined(__AMX_BF16__)
    if (has_tiles(a.cache)) release_tiles();
#endif
    if (states == nullptr)
        for (size_t row = 0; row < rows; ++row) write_out(a, t, row, s.merged + row * stride);
}

void attention_merge(const AttentionArgs& a, const QueryTile& t, size_t num_ranges, float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads), stride = state_width(a.cache);
    for (size_t row = 0; row < rows; ++row) {
        float* merged = states + row * stride;
        for (size_t range = 1; range < num_ranges; ++range)
            merge(a.cache, states + (range * padded_rows(rows) + row) * stride, merged);
        write_out(a, t, row, merged);
    }
}

}  // namespace octavo::OCTAVO_LEVEL
