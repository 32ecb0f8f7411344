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

struct Scratch {
    float* range;    // [rows, state_width]: of the current range
    float* merged;   // [rows, state_width]: of the ranges before
    float* weights;  // [rows, kLanes]: sum of weights by lane, of the range
    float* scores;   // [kRowBlock, kKVTile]
    uint16_t* rounded;  // [kRowBlock, kKVTile]: weights as bfloat16
    uint16_t* q;        // [rows, key_dim]: queries as bfloat16
    uint8_t* pieces;    // kTileGroups pieces of the cache: for blocks that are no multiple of kGroup
    uint8_t* wide;      // the same in bfloat16: widened from int8
    uint8_t* end;

    Scratch(uint8_t* memory, size_t rows, const KVCache& c) {
        const auto take = [&memory](size_t bytes) {
            uint8_t* piece = memory;
            memory += round_up(bytes, 64);
            return piece;
        };
        range = reinterpret_cast<float*>(take(rows * state_width(c) * 4));
        merged = reinterpret_cast<float*>(take(rows * state_width(c) * 4));
        weights = reinterpret_cast<float*>(take(rows * kLanes * 4));
        scores = reinterpret_cast<float*>(take(kRowBlock * kKVTile * 4));
        rounded = reinterpret_cast<uint16_t*>(take(kRowBlock * kKVTile * 2));
        q = reinterpret_cast<uint16_t*>(take(rows * c.key_dim * 2 + sizeof(Halves)));
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

// `end`: of what the queries see.
void locate(const AttentionArgs& a, const QueryTile& t, size_t start, size_t end, const Scratch& s, KVTile& tile) {
    const KVCache& cache = a.cache;
    tile.start = start;
    tile.num_groups = ((end - start < kKVTile ? end - start : kKVTile) + kGroup - 1) / kGroup;
    for (size_t g = 0; g < kTileGroups; ++g) {
        if (g >= tile.num_groups) {
            tile.k[g] = tile.k[g - 1], tile.v[g] = tile.v[g - 1], tile.scales[g] = tile.scales[g - 1];
            continue;
        }
        const size_t first = start + g * kGroup;
        uint8_t* piece;
        if (a.block_size % kGroup == 0) {
            piece = cache.piece(slot_of(a, t, first) / kGroup, t.kv_head);
        } else {
            piece = s.pieces + g * cache.piece_bytes;
            for (size_t lane = 0; lane < kGroup && first + lane < end; ++lane) {
                const size_t slot = slot_of(a, t, first + lane);
                copy_slot(cache, cache.piece(slot / kGroup, t.kv_head), slot % kGroup, piece, lane);
            }
        }
        tile.k[g] = piece;
        tile.v[g] = piece + cache.v_offset;
        tile.scales[g] = reinterpret_cast<const float*>(piece + cache.scale_offset);
    }
    for (size_t g = 0; g < kTileGroups; ++g) {
        const size_t first = tile.next_start + g * kGroup;
        tile.next[g] = a.block_size % kGroup == 0 && first < end
                           ? cache.piece(slot_of(a, t, first) / kGroup, tile.next_head)
                           : tile.k[g];
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
    const auto add = [&](size_t step, const auto& select) {
        const size_t group = step / group_steps;
        typename KV::Operand values[VECTORS][KV::kSteps];
        for (size_t v = 0; v < VECTORS; ++v) {
            const size_t offset = operand_offset<KV>(width, step % group_steps, column + v * kLanes);
            KV::load(tile.v[group] + offset, values[v]);
            __builtin_prefetch(tile.next[group] + cache.v_offset + offset);
        }
        for (size_t n = 0; n < KV::kSteps; ++n)
            for (size_t r = 0; r < ROWS; ++r) {
                const typename KV::Operand weight = KV::factor(weights + r * kKVTile, step + n);
                for (size_t v = 0; v < VECTORS; ++v) sums[r][v] = KV::add(weight, select(values[v][n]), sums[r][v]);
            }
    };
    for (size_t at = first / depth * depth; at + depth <= last; at += depth)
        add(at / KV::kDepth, [](typename KV::Operand v) { return v; });
    if (last % depth != 0)  // what lies behind the last position was perhaps never written
        add(last / depth * KV::kSteps, [](typename KV::Operand v) { return KV::behind_last(v); });
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
    Ints lanes;
    for (size_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l);
    Floats score[kTileVectors];
    Floats top = splat(kNever);
    for (size_t v = 0; v < kTileVectors; ++v) {
        const Ints position = lanes + static_cast<int32_t>(tile.start + v * kLanes);
        Floats s = load(scores + v * kLanes) * a.scale;
        if constexpr (SCALED) s *= load(tile.scales[v / kGroupVectors] + v % kGroupVectors * kLanes);
        if (a.softcap != 0.0f) s = a.softcap * tanh(s / a.softcap);
        const Ints visible =
            (position <= static_cast<int32_t>(newest)) & (position >= static_cast<int32_t>(oldest));
        score[v] = visible ? s : splat(kNever);
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
        const Floats shrink = exp(splat(largest) - new_top);
        for (size_t c = 0; c < a.cache.value_width; c += kLanes) store(state + c, load(state + c) * shrink);
        sums *= shrink;
        largest = new_top;
    }
    for (size_t v = 0; v < kTileVectors; ++v) {
        Floats weight = exp(score[v] - new_top);
        sums += weight;
        if constexpr (SCALED) {  // the scale of a position that is not visible may be anything
            const Floats scale = load(tile.scales[v / kGroupVectors] + kGroup + v % kGroupVectors * kLanes);
            weight = score[v] > splat(kNever) ? weight * scale : Floats{};
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

template <class KV, bool SCALED, size_t ROWS>
void visit(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, const Scratch& s) {
    const size_t share = a.num_heads / a.cache.num_kv_heads, width = a.cache.value_width;
    const size_t stride = state_width(a.cache);
    const size_t first_position = t.first_position + row / share;
    const size_t last_position = t.first_position + (row + ROWS - 1) / share;
    const size_t oldest = a.window != 0 && first_position + 1 > a.window ? first_position + 1 - a.window : 0;
    if (last_position < tile.start || oldest >= tile.start + kKVTile) return;

    using Element = typename KV::Element;
    constexpr bool rounds = KV::kDepth == 2;
    const Element* q[ROWS];
    Element* weights;
    if constexpr (rounds) {
        for (size_t r = 0; r < ROWS; ++r) q[r] = s.q + (row + r) * a.cache.key_dim;
        weights = s.rounded;
    } else {
        for (size_t r = 0; r < ROWS; ++r) q[r] = query(a, t, row + r);
        weights = s.scores;
    }
    for (size_t vector = 0; vector < tile.num_groups * kGroupVectors; vector += kVectors)
        score<KV, ROWS>(q, tile, vector, a.cache.key_dim / KV::kDepth, s.scores);

    for (size_t r = 0; r < ROWS; ++r) {
        const size_t newest = t.first_position + (row + r) / share;
        const size_t from = a.window != 0 && newest + 1 > a.window ? newest + 1 - a.window : 0;
        soften<SCALED>(a, tile, from, newest, s.scores + r * kKVTile, weights + r * kKVTile,
                       s.range + (row + r) * stride, s.weights + (row + r) * kLanes);
    }

    const size_t first = oldest > tile.start ? oldest - tile.start : 0;
    const size_t last = last_position + 1 - tile.start < kKVTile ? last_position + 1 - tile.start : kKVTile;
    float* total = s.range + row * stride;
    size_t column = 0;
    for (; column + kVectors * kLanes <= width; column += kVectors * kLanes)
        mix<KV, ROWS, kVectors>(weights, tile, first, last, column, a.cache, total);
    for (; column < width; column += kLanes) mix<KV, ROWS, 1>(weights, tile, first, last, column, a.cache, total);
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

void visit_tile(const AttentionArgs& a, const QueryTile& t, KVTile& tile, size_t rows, const Scratch& s) {
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
    const Floats keep = exp(splat(top) - new_top), take = exp(splat(range_top) - new_top);
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
    std::memset(s.q, 0, rows * a.cache.key_dim * sizeof(uint16_t));
    for (size_t row = 0; row < rows; ++row) {
        const float* q = query(a, t, row);
        for (size_t d = 0; d < dim; d += kLanes) {
            const size_t count = dim - d < kLanes ? dim - d : kLanes;
            const Halves rounded = to_bfloat16(load_part(q + d, count));
            std::memcpy(s.q + row * a.cache.key_dim + d, &rounded, count * sizeof(uint16_t));
        }
    }
}

// Sums KV tiles from `begin` up to `range_end` for all rows of the query tile into s.range.
void visit_range(const AttentionArgs& a, const QueryTile& t, size_t begin, size_t range_end, const Visit& whole,
                 size_t rows, const Scratch& s) {
    const size_t stride = state_width(a.cache);
    std::memset(s.range, 0, rows * stride * sizeof(float));
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

size_t attention_state(size_t rows, const KVCache& cache) { return rows * state_width(cache); }

size_t attention_scratch(size_t rows, const KVCache& cache) {
    uint8_t* const start = nullptr;
    return static_cast<size_t>(Scratch(start, rows, cache).end - start);
}

void attention(const AttentionArgs& a, const QueryTile& t, size_t first_range, size_t last_range, uint8_t* scratch,
               float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads), stride = state_width(a.cache);
    Scratch s(scratch, rows, a.cache);
    if (a.cache.type != OCTAVO_KV_FLOAT32) round_queries(a, t, rows, s);
    for (size_t row = 0; row < rows; ++row) largest_of(s.merged + row * stride, a.cache) = kNever;
    const size_t end = t.first_position + t.num_tokens;
    const size_t oldest = a.window != 0 && t.first_position + 1 > a.window ? t.first_position + 1 - a.window : 0;
    const size_t first = first_range * kKVRange > oldest ? first_range * kKVRange : oldest;
    const Visit visit = {first / kKVTile * kKVTile, last_range * kKVRange < end ? last_range * kKVRange : end};
    for (size_t range = first_range; range < last_range; ++range) {
        if (states != nullptr) s.range = states + (range - first_range) * rows * stride;
        const size_t begin = range == first_range ? visit.begin : range * kKVRange;
        visit_range(a, t, begin, (range + 1) * kKVRange < end ? (range + 1) * kKVRange : end, visit, rows, s);
        if (states == nullptr)
            for (size_t row = 0; row < rows; ++row) merge(a.cache, s.range + row * stride, s.merged + row * stride);
    }
    if (states == nullptr)
        for (size_t row = 0; row < rows; ++row) write_out(a, t, row, s.merged + row * stride);
}

void attention_merge(const AttentionArgs& a, const QueryTile& t, size_t num_ranges, float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads), stride = state_width(a.cache);
    for (size_t row = 0; row < rows; ++row) {
        float* merged = states + row * stride;
        for (size_t range = 1; range < num_ranges; ++range)
            merge(a.cache, states + (range * rows + row) * stride, merged);
        write_out(a, t, row, merged);
    }
}

}  // namespace octavo::OCTAVO_LEVEL
