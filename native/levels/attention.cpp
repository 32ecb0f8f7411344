// Attention of a tile of queries over the paged cache: online softmax over KV tiles at absolute positions.
//
// The rows of a task are (token, query head) pairs that share a KV head, token-major. For one row the order of all
// sums is fixed by position alone: scores add over head_dim in order; weights add by lane of position, halving at the
// end; values add over positions in order; the running maximum moves at multiples of kKVTile. A chunk of a prompt
// therefore gives the bits of the whole prompt. Masked positions weigh exactly 0 and their K may be anything.
#include <cmath>

#include "level.h"
#include "simd.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kRowBlock = kLanes == 16 ? 4 : 2;   // rows in registers
constexpr size_t kVectors = 4;                       // vectors of positions or values in registers
constexpr size_t kTileVectors = kKVTile / kLanes;
constexpr size_t kGroupVectors = kGroup / kLanes;
constexpr size_t kTileGroups = kKVTile / kGroup;

struct Scratch {
    float* total;    // [rows, value_width]: weighted sum of values
    float* weights;  // [rows, kLanes]: sum of weights by lane
    float* largest;  // [rows]
    float* scores;   // [kRowBlock, kKVTile]
    float* k;        // [kTileGroups, head_dim, kGroup]: for blocks that are no multiple of kGroup
    float* v;        // [kKVTile, value_width]

    Scratch(float* memory, size_t rows, size_t head_dim, size_t value_width) {
        total = memory;
        weights = total + rows * value_width;
        largest = weights + rows * kLanes;
        scores = largest + round_up(rows, kLanes);
        k = scores + kRowBlock * kKVTile;
        v = k + kKVTile * head_dim;
    }
};

// Where the K and V of one KV tile lie.
struct KVTile {
    const float* k[kTileGroups];  // each [head_dim, kGroup]
    const float* v[kTileGroups];  // each [kGroup, value_width]
    size_t start, num_groups;
};

size_t slot_of(const AttentionArgs& a, const QueryTile& t, size_t position) {
    return static_cast<size_t>(t.block_table[position / a.block_size]) * a.block_size + position % a.block_size;
}

void locate(const AttentionArgs& a, const QueryTile& t, size_t start, size_t end, const Scratch& s, KVTile& tile) {
    const KVCache& cache = a.cache;
    tile.start = start;
    tile.num_groups = ((end - start < kKVTile ? end - start : kKVTile) + kGroup - 1) / kGroup;
    for (size_t g = 0; g < tile.num_groups; ++g) {
        const size_t first = start + g * kGroup;
        if (a.block_size % kGroup == 0) {
            const size_t group = slot_of(a, t, first) / kGroup;
            tile.k[g] = cache.k_group(group, t.kv_head);
            tile.v[g] = cache.v_group(group, t.kv_head);
            continue;
        }
        float* k = s.k + g * kGroup * cache.head_dim;
        float* v = s.v + g * kGroup * cache.value_width;
        for (size_t lane = 0; lane < kGroup && first + lane < end; ++lane) {
            const size_t slot = slot_of(a, t, first + lane);
            const float* from = cache.k_group(slot / kGroup, t.kv_head) + slot % kGroup;
            for (size_t d = 0; d < cache.head_dim; ++d) k[d * kGroup + lane] = from[d * kGroup];
            std::memcpy(v + lane * cache.value_width,
                        cache.v_group(slot / kGroup, t.kv_head) + slot % kGroup * cache.value_width,
                        cache.value_width * sizeof(float));
        }
        tile.k[g] = k;
        tile.v[g] = v;
    }
}

template <size_t ROWS, size_t VECTORS>
inline void score(const float* const* q, const KVTile& tile, size_t vector, size_t dim, float* scores) {
    const float* k[VECTORS];
    for (size_t v = 0; v < VECTORS; ++v)
        k[v] = tile.k[(vector + v) / kGroupVectors] + (vector + v) % kGroupVectors * kLanes;
    Floats total[ROWS][VECTORS] = {};
    for (size_t d = 0; d < dim; ++d) {
        Floats keys[VECTORS];
        for (size_t v = 0; v < VECTORS; ++v) keys[v] = load(k[v] + d * kGroup);
        for (size_t r = 0; r < ROWS; ++r) {
            const Floats value = splat(q[r][d]);
            for (size_t v = 0; v < VECTORS; ++v) total[r][v] = fma(value, keys[v], total[r][v]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t v = 0; v < VECTORS; ++v) store(scores + r * kKVTile + (vector + v) * kLanes, total[r][v]);
}

// total[r][d] += sum over positions [first, last) of the tile of scores[r][j] * v[j][d].
template <size_t ROWS, size_t VECTORS>
inline void mix(const float* scores, const KVTile& tile, size_t first, size_t last, size_t column, size_t width,
                float* total) {
    Floats sums[ROWS][VECTORS];
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t v = 0; v < VECTORS; ++v) sums[r][v] = load(total + r * width + column + v * kLanes);
    for (size_t j = first; j < last; ++j) {
        const float* row = tile.v[j / kGroup] + j % kGroup * width + column;
        Floats values[VECTORS];
        for (size_t v = 0; v < VECTORS; ++v) values[v] = load(row + v * kLanes);
        for (size_t r = 0; r < ROWS; ++r) {
            const Floats weight = splat(scores[r * kKVTile + j]);
            for (size_t v = 0; v < VECTORS; ++v) sums[r][v] = fma(weight, values[v], sums[r][v]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t v = 0; v < VECTORS; ++v) store(total + r * width + column + v * kLanes, sums[r][v]);
}

// Turns a row's scores into weights against its new maximum; positions outside [oldest, newest] weigh 0.
inline void soften(const AttentionArgs& a, const KVTile& tile, size_t oldest, size_t newest, float* scores,
                   float* total, float* weights, float* largest) {
    const Floats never = splat(-__builtin_inff());
    Ints lanes;
    for (size_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l);
    Floats row[kTileVectors];
    Floats top = never;
    for (size_t v = 0; v < kTileVectors; ++v) {
        row[v] = never;
        if (v >= tile.num_groups * kGroupVectors) continue;
        const Ints position = lanes + static_cast<int32_t>(tile.start + v * kLanes);
        Floats s = load(scores + v * kLanes) * a.scale;
        if (a.softcap != 0.0f) s = a.softcap * tanh(s / a.softcap);
        row[v] = (position <= static_cast<int32_t>(newest)) & (position >= static_cast<int32_t>(oldest)) ? s : never;
        top = max(row[v], top);
    }
    const float tile_top = max_lane(top);
    const float new_top = tile_top > *largest ? tile_top : *largest;
    if (new_top == -__builtin_inff()) {  // nothing visible so far
        std::memset(scores, 0, kKVTile * sizeof(float));
        return;
    }
    Floats sums = load(weights);
    if (new_top != *largest) {
        const Floats shrink = exp(splat(*largest) - new_top);
        for (size_t c = 0; c < a.cache.value_width; c += kLanes) store(total + c, load(total + c) * shrink);
        sums *= shrink;
        *largest = new_top;
    }
    for (size_t v = 0; v < kTileVectors; ++v) {
        const Floats weight = exp(row[v] - new_top);
        store(scores + v * kLanes, weight);
        sums += weight;
    }
    store(weights, sums);
}


template <size_t ROWS>
void visit(const AttentionArgs& a, const QueryTile& t, const KVTile& tile, size_t row, const Scratch& s) {
    const size_t share = a.num_heads / a.cache.num_kv_heads, dim = a.cache.head_dim, width = a.cache.value_width;
    const size_t first_position = t.first_position + row / share;
    const size_t last_position = t.first_position + (row + ROWS - 1) / share;
    const size_t oldest = a.window != 0 && first_position + 1 > a.window ? first_position + 1 - a.window : 0;
    if (last_position < tile.start || oldest >= tile.start + kKVTile) return;

    const float* q[ROWS];
    for (size_t r = 0; r < ROWS; ++r) {
        const size_t token = t.first_token + (row + r) / share, head = t.kv_head * share + (row + r) % share;
        q[r] = a.q + (token * a.num_heads + head) * dim;
    }
    const size_t num_vectors = tile.num_groups * kGroupVectors;
    size_t vector = 0;
    for (; vector + kVectors <= num_vectors; vector += kVectors) score<ROWS, kVectors>(q, tile, vector, dim, s.scores);
    for (; vector < num_vectors; ++vector) score<ROWS, 1>(q, tile, vector, dim, s.scores);

    for (size_t r = 0; r < ROWS; ++r) {
        const size_t newest = t.first_position + (row + r) / share;
        const size_t from = a.window != 0 && newest + 1 > a.window ? newest + 1 - a.window : 0;
        soften(a, tile, from, newest, s.scores + r * kKVTile, s.total + (row + r) * width,
               s.weights + (row + r) * kLanes, s.largest + row + r);
    }

    const size_t first = oldest > tile.start ? oldest - tile.start : 0;
    const size_t last = last_position + 1 - tile.start < kKVTile ? last_position + 1 - tile.start : kKVTile;
    float* total = s.total + row * width;
    size_t column = 0;
    for (; column + kVectors * kLanes <= width; column += kVectors * kLanes)
        mix<ROWS, kVectors>(s.scores, tile, first, last, column, width, total);
    for (; column < width; column += kLanes) mix<ROWS, 1>(s.scores, tile, first, last, column, width, total);
}

}  // namespace

size_t attention_scratch(size_t rows, size_t head_dim, size_t value_width) {
    return rows * (value_width + kLanes) + round_up(rows, kLanes) + kKVTile * (kRowBlock + head_dim + value_width);
}

void attention(const AttentionArgs& a, const QueryTile& t, float* scratch) {
    const size_t share = a.num_heads / a.cache.num_kv_heads, dim = a.cache.head_dim, width = a.cache.value_width;
    const size_t rows = t.num_tokens * share;
    const Scratch s(scratch, rows, dim, width);
    std::memset(s.total, 0, rows * (width + kLanes) * sizeof(float));
    for (size_t row = 0; row < rows; ++row) s.largest[row] = -__builtin_inff();

    const size_t end = t.first_position + t.num_tokens;
    const size_t oldest = a.window != 0 && t.first_position + 1 > a.window ? t.first_position + 1 - a.window : 0;
    KVTile tile;
    for (size_t start = oldest / kKVTile * kKVTile; start < end; start += kKVTile) {
        locate(a, t, start, end, s, tile);
        size_t row = 0;
        for (; row + kRowBlock <= rows; row += kRowBlock) visit<kRowBlock>(a, t, tile, row, s);
        for (; row < rows; ++row) visit<1>(a, t, tile, row, s);
    }
    for (size_t row = 0; row < rows; ++row) {
        const float weight = sum(load(s.weights + row * kLanes));
        const size_t token = t.first_token + row / share, head = t.kv_head * share + row % share;
        float* out = a.out + (token * a.num_heads + head) * dim;
        for (size_t d = 0; d < dim; ++d) out[d] = s.total[row * width + d] / weight;
    }
}

}  // namespace octavo::OCTAVO_LEVEL
