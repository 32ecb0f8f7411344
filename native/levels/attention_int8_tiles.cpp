// Attention on AMX over caches of int8: products of bytes, of K and V as they lie in the cache.
//
// A query becomes whole numbers of 16 bits against its largest, a high and a low byte: its scores are exact sums, scaled
// once for a position. Weights, each times the scale of its V, become whole numbers of 16 bits against the largest scale
// that the row sees in a range, and their sums with V are exact too. So rows may share tiles, positions come in any order,
// and depth be a quarter of a tile or all of it: for one row everything depends on positions alone. Floats are added by
// lane of position, groups of even and odd number apart, and ranges of kKVRange positions are merged in order.
#include "attention.h"
#include "softmax_tiles.h"
#include "tiles.h"

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kGroups = kKVRange / kGroup, kTileGroups = kKVTile / kGroup, kTiles = kKVRange / kKVTile;
constexpr size_t kFewRows = kTileMaxRows / 2;  // both bytes of so many rows are one tile
constexpr size_t kBytes = 2;                   // of a query or a weight: high and low
constexpr float kQueryTop = 32639.0f;          // high and low byte of it are 127
constexpr float kTiny = 1e-30f;                // a largest number below it counts as zero
constexpr float kWeightTop = 65280.0f;         // below 2^16: the largest weight may be a rounding above 1

using Span = KVSpan<kGroups>;

// Of a query: whole tiles. What a tile of K reads behind a shorter K, whatever it is, is multiplied with zeros.
inline size_t query_bytes(const KVCache& c) { return round_up(c.key_dim, kTileRowBytes); }

struct Scratch {
    Sums unit;          // of one range
    Sums merged;        // of all rows: of the ranges before
    uint8_t* q;         // [units][kBytes * 16][query_bytes]
    float* q_scales;    // [padded rows]
    int32_t* dots;      // [2][kBytes * 16][kKVTile]: of two tiles of positions; then of V
    float* scores;      // [kTiles][16][kKVTile]
    uint8_t* weights;   // [kBytes * 16][kKVRange]
    float* v_scales;    // [kKVRange]: what weights are multiplied with, 0 where nothing is seen
    uint8_t* pieces;    // of blocks that are no whole groups
    uint8_t* values;    // [kKVRange / 4][value_width][4]: the V of a range
    uint8_t* end;

    Scratch(uint8_t* memory, size_t rows, const KVCache& c) {
        Cutter cutter{memory};
        const size_t padded = round_up(rows, kTileMaxRows);
        unit = Sums::in(cutter.take<float>(Sums::size(kTileMaxRows, c)), kTileMaxRows, c);
        merged = Sums::in(cutter.take<float>(Sums::size(padded, c)), padded, c);
        q = cutter.take(kBytes * padded * query_bytes(c));
        q_scales = cutter.take<float>(padded);
        dots = cutter.take<int32_t>(2 * kBytes * kTileMaxRows * kKVTile);
        scores = cutter.take<float>(kTileMaxRows * kKVRange);
        weights = cutter.take(kBytes * kTileMaxRows * kKVRange);
        v_scales = cutter.take<float>(kKVRange);
        pieces = cutter.take(kGroups * c.piece_bytes);
        values = cutter.take(kKVRange * c.value_width);
        end = cutter.end;
    }
};

inline __m512 number(const int32_t* high, const int32_t* low) {
    const __m512 more = _mm512_cvtepi32_ps(_mm512_loadu_si512(high));
    return _mm512_fmadd_ps(more, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(_mm512_loadu_si512(low)));
}

// The low bytes of a and of b, then the second ones.
inline __m512i bytes_of(__m512i a, __m512i b) {
    alignas(64) static constexpr struct Order {
        uint8_t from[64];
        constexpr Order() : from{} {
            for (size_t i = 0; i < 32; ++i) from[i] = static_cast<uint8_t>(4 * i), from[32 + i] = static_cast<uint8_t>(4 * i + 1);
        }
    } kOrder;
    return _mm512_permutex2var_epi8(a, _mm512_load_si512(kOrder.from), b);
}

// FEW rows: a tile of queries or weights holds the high bytes of all, then the low ones; V is multiplied as it lies, a
// quarter of a tile deep. Else two tiles of 16 rows, and V is laid out anew, for several tiles of rows.
template <bool FEW>
class Attention {
public:
    Attention(const AttentionArgs& args, const QueryTile& tile, size_t num_rows, uint8_t* scratch)
        : a(args), c(args.cache), t(tile), rows(num_rows), share(a.num_heads / c.num_kv_heads),
          low_row(FEW ? num_rows : kTileMaxRows), s(scratch, num_rows, c) {}

    void configure() const {
        TileConfig config;
        const size_t tile_rows = FEW ? kBytes * rows : kTileMaxRows;
        for (size_t tile = 0; tile < 6; ++tile) config.set(tile, tile_rows);
        config.set(6, kTileMaxRows);
        config.set(7, kTileMaxRows);
        if constexpr (FEW) {
            config.set(5, tile_rows, kGroup);
            config.set(7, kGroup / 4);
        }
        configure_tiles(config);
    }

    void run(size_t last_head, size_t first_range, size_t last_range, float* states) {
        for (size_t head = t.kv_head; head < last_head; ++head) {
            round_queries(head);
            for (size_t range = first_range; range < last_range; ++range) {
                locate(head, range);
                locate_next(a, t, head, range, last_head, first_range, last_range, span);
                Sums sums = s.unit;
                if (states != nullptr) {
                    sums = Sums::in(states + (range - first_range) * Sums::size(rows, c), rows, c);
                    sums.clear(rows, c);
                }
                for (size_t row = 0; row < rows; row += kTileMaxRows) {
                    const size_t count = min(rows - row, kTileMaxRows);
                    const size_t oldest = oldest_seen(a, t.first_position + row / share);
                    const size_t newest = t.first_position + (row + count - 1) / share;
                    if (newest < span.start || oldest >= span.start + kKVRange) continue;
                    visit(row, count, states == nullptr ? sums : sums.from(row, c));
                    if (states != nullptr) continue;
                    take_over(a, t, head, row, count, range == max(oldest / kKVRange, first_range),
                              range == min(newest / kKVRange, last_range - 1), sums, s.merged.from(row, c));
                }
            }
        }
    }

private:
    const AttentionArgs& a;
    const KVCache& c;
    const QueryTile& t;
    const size_t rows, share, low_row;
    Scratch s;
    Span span;
    // Of a unit of up to 16 rows and one range:
    size_t first, last;  // groups that some row sees
    size_t begin, end;   // the same and those multiplied with them, which weigh nothing
    Seen seen[kTileMaxRows];
    __m512 tops[kTileMaxRows];
    float v_units[kTileMaxRows];

    void round_queries(size_t head) {
        const size_t bytes = query_bytes(c);
        Rows order(a, t, head, 0);
        std::memset(s.q, 0, kBytes * round_up(rows, kTileMaxRows) * bytes);
        for (size_t row = 0; row < rows; ++row) {
            const float* q = a.q + order.next();
            uint8_t* high = s.q + (row / kTileMaxRows * kBytes * kTileMaxRows + row % kTileMaxRows) * bytes;
            uint8_t* low = high + low_row * bytes;
            const auto part = [&](size_t d) { return load_part(q + d, min(c.head_dim - d, kLanes)); };
            __m512 top{};
            for (size_t d = 0; d < c.head_dim; d += kLanes) top = _mm512_max_ps(_mm512_abs_ps((__m512)part(d)), top);
            const float largest = _mm512_reduce_max_ps(top), factor = largest > kTiny ? kQueryTop / largest : 0.0f;
            s.q_scales[row] = largest > kTiny ? largest / kQueryTop : 1.0f;
            for (size_t d = 0; d < c.head_dim; d += kLanes) {
                const __m512i code = _mm512_cvtps_epi32((__m512)(part(d) * factor));
                const __m512i rest = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(low + d), _mm512_cvtepi32_epi8(code));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(high + d), _mm512_cvtepi32_epi8(rest));
            }
        }
    }

    void locate(size_t head, size_t range) {
        const Seen of_range = positions_of(a, t, range);
        span.start = range * kKVRange;
        span.locate(a, t, head, of_range.first, of_range.last, s.pieces, nullptr);
        if constexpr (!FEW)
            for (size_t g = span.first; g < span.last; ++g)
                std::memcpy(s.values + g * kGroup * c.value_width, span.v[g], kGroup * c.value_width);
    }

    OCTAVO_FORCED void fetch(size_t g, size_t part) const {
        if constexpr (FEW) fetch_part(span.next[g], c.piece_bytes, part);
    }

    // Sums the range for rows [row, row + num_rows), of which one at least sees something.
    void visit(size_t row, size_t num_rows, const Sums& sums) {
        size_t newest = t.first_position + row / share, head = row % share;
        for (size_t r = 0; r < num_rows; ++r, ++head) {
            if (head == share) head = 0, ++newest;
            const size_t oldest = oldest_seen(a, newest);
            seen[r] = {oldest > span.start ? oldest - span.start : 0, newest < span.start ? 0 : min(newest + 1 - span.start, kKVRange)};
            tops[r] = _mm512_set1_ps(kNever);
        }
        first = seen[0].first / kGroup, last = (seen[num_rows - 1].last + kGroup - 1) / kGroup;
        constexpr size_t together = FEW ? 2 : kTileGroups;
        begin = first / together * together, end = round_up(last, together);
        const uint8_t* q = s.q + row * kBytes * query_bytes(c);
        const size_t first_tile = first / kTileGroups, last_tile = (last - 1) / kTileGroups;
        for (size_t tile = first_tile; tile <= last_tile; ++tile) {
            score(q, tile);
            if (tile > first_tile) scale(tile - 1, row, num_rows);
        }
        scale(last_tile, row, num_rows);
        for (size_t r = 0; r < num_rows; ++r) {
            if (r == 0 || seen[r].first != seen[r - 1].first || seen[r].last != seen[r - 1].last)
                scale_values(r);
            else
                v_units[r] = v_units[r - 1];
            weigh(row + r, r, sums);
        }
        mix(num_rows, sums);
    }

    float* scores_of(size_t r, size_t tile) const { return s.scores + (tile * kTileMaxRows + r) * kKVTile; }
    int32_t* dots_of(size_t tile) const { return s.dots + tile % 2 * kBytes * kTileMaxRows * kKVTile; }

    // Products of the queries with K, 64 positions.
    OCTAVO_FORCED void score(const uint8_t* q, size_t tile) {
        const size_t stop = min(tile * kTileGroups + kTileGroups, last), bytes = query_bytes(c);
        constexpr size_t stride = kKVTile * sizeof(int32_t);
        int32_t* const dots = dots_of(tile);
        const auto load_queries = [&](size_t d) OCTAVO_INLINE_LAMBDA {
            load_tile<4>(q + d, bytes);
            if constexpr (!FEW) load_tile<5>(q + kTileMaxRows * bytes + d, bytes);
        };
        const bool once = bytes == kTileRowBytes;
        if (once) load_queries(0);
        for (size_t g = max(tile * kTileGroups, first); g < stop; g += 2) {
            int32_t* out = dots + g % kTileGroups * kGroup;
            const bool two = g + 1 < stop;
            zero_tile<0>();
            zero_tile<1>();
            if constexpr (!FEW) {
                zero_tile<2>();
                zero_tile<3>();
            }
            for (size_t d = 0; d < bytes; d += kTileRowBytes) {
                if (!once) load_queries(d);
                load_tile<6>(span.k[g] + d * kGroup, kTileRowBytes);
                multiply_byte_tiles<0, 4, 6, int8_t, int8_t>();
                if constexpr (!FEW) multiply_byte_tiles<2, 5, 6, int8_t, int8_t>();
                if (!two) continue;
                load_tile<6>(span.k[g + 1] + d * kGroup, kTileRowBytes);
                multiply_byte_tiles<1, 4, 6, int8_t, int8_t>();
                if constexpr (!FEW) multiply_byte_tiles<3, 5, 6, int8_t, int8_t>();
            }
            for (size_t part = 0; part < 4; ++part) fetch(g, part);  // in a loop: written out, decode takes a third longer
            store_tile<0>(out, stride);
            if constexpr (!FEW) store_tile<2>(out + kTileMaxRows * kKVTile, stride);
            if (!two) continue;
            for (size_t part = 0; part < 4; ++part) fetch(g + 1, part);
            store_tile<1>(out + kGroup, stride);
            if constexpr (!FEW) store_tile<3>(out + kTileMaxRows * kKVTile + kGroup, stride);
        }
    }

    // Products of 64 positions become scores; of positions that a row does not see, -inf.
    OCTAVO_FORCED void scale(size_t tile, size_t row, size_t num_rows) {
        const size_t start = tile * kTileGroups;
        const __m512 never = _mm512_set1_ps(kNever);
        for (size_t r = 0; r < num_rows; ++r) {
            const int32_t* const high = dots_of(tile) + r * kKVTile;
            float* const scores = scores_of(r, tile);
            __m512 top = tops[r];
            const float by = s.q_scales[row + r] * a.scale / a.softcap;  // where there is a cap
            const auto score_of = [&](size_t g) OCTAVO_INLINE_LAMBDA {
                const int32_t* at = high + (g - start) * kGroup;
                const __m512 score = _mm512_mul_ps(number(at, at + low_row * kKVTile), _mm512_loadu_ps(span.scales[g]));
                return a.softcap == 0.0f ? score : (__m512)(a.softcap * tanh((Floats)score * by));
            };
            const auto keep = [&](size_t g, __m512 score) OCTAVO_INLINE_LAMBDA {
                top = _mm512_max_ps(top, score);
                _mm512_storeu_ps(scores + (g - start) * kGroup, score);
            };
            const bool whole = seen[r].first <= start * kGroup && seen[r].last >= (start + kTileGroups) * kGroup;
            for (size_t g = start; whole && g < start + kTileGroups; ++g) keep(g, score_of(g));
            for (size_t g = max(start, begin); !whole && g < min(start + kTileGroups, end); ++g) {
                const __mmask16 lanes = lanes_in(g * kGroup, seen[r].first, seen[r].last);  // scales of others may be anything
                keep(g, lanes == 0 ? never : _mm512_mask_mov_ps(never, lanes, score_of(g)));
            }
            tops[r] = top;
        }
    }

    // What the weights of a row are multiplied with: the scales of V that it sees, the largest made kWeightTop.
    OCTAVO_FORCED void scale_values(size_t r) {
        __m512 top{};
        for (size_t g = begin; g < end; ++g) {
            const __mmask16 lanes = lanes_in(g * kGroup, seen[r].first, seen[r].last);
            const __m512 scales = lanes == 0 ? __m512{} : _mm512_maskz_loadu_ps(lanes, span.scales[g] + kGroup);
            _mm512_storeu_ps(s.v_scales + g * kGroup, scales);
            top = _mm512_max_ps(top, scales);
        }
        const float largest = _mm512_reduce_max_ps(top);
        const __m512 factor = _mm512_set1_ps(largest > kTiny ? kWeightTop / largest : 0.0f);
        for (size_t g = begin; g < end; ++g)
            _mm512_storeu_ps(s.v_scales + g * kGroup, _mm512_mul_ps(_mm512_loadu_ps(s.v_scales + g * kGroup), factor));
        v_units[r] = largest / kWeightTop;
    }

    // Scores of a row become weights.
    OCTAVO_FORCED void weigh(size_t row, size_t r, const Sums& sums) {
        uint8_t *high = s.weights + r * kKVRange, *low = high + low_row * kKVRange;
        Floats even_sum{}, odd_sum{};
        const bool sees = seen[r].first < seen[r].last;
        const float unit = a.softcap != 0.0f ? kLog2E : s.q_scales[row] * score_unit(a);
        const float top = sees ? _mm512_reduce_max_ps(tops[r]) * unit : kNever;
        const Floats by = splat(unit), shift = splat(sees ? -top : 0.0f);
        for (size_t g = begin; g < end; g += 2) {
            const float* scores = scores_of(r, g / kTileGroups) + g % kTileGroups * kGroup;
            const Floats even = exp2(fma(load(scores), by, shift));
            const Floats odd = exp2(fma(load(scores + kGroup), by, shift));
            even_sum += even;
            odd_sum += odd;
            const __m512i codes = bytes_of(_mm512_cvtps_epi32((__m512)(even * load(s.v_scales + g * kGroup))),
                                           _mm512_cvtps_epi32((__m512)(odd * load(s.v_scales + (g + 1) * kGroup))));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + g * kGroup), _mm512_castsi512_si256(codes));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + g * kGroup), _mm512_extracti64x4_epi64(codes, 1));
        }
        store(sums.rows + r * state_width(c) + c.value_width, even_sum + odd_sum);
        sums.tops[r] = top;
    }

    // Weights times V.
    OCTAVO_FORCED void mix(size_t num_rows, const Sums& sums) {
        constexpr size_t together = FEW ? 4 : 2;
        size_t column = 0;
        for (; column + together * kGroup <= c.value_width; column += together * kGroup)
            mix_columns<together>(num_rows, column, sums);
        for (; column < c.value_width; column += kGroup) mix_columns<1>(num_rows, column, sums);
    }

    template <size_t COLUMNS>
    OCTAVO_FORCED void mix_columns(size_t num_rows, size_t column, const Sums& sums) {
        const size_t stride = c.value_width * 4;
        constexpr size_t out_stride = kKVTile * sizeof(int32_t);
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        if constexpr (FEW) {
            for (size_t g = first; g < last; ++g) {
                const uint8_t* v = span.v[g] + column * 4;
                load_tile<5>(s.weights + g * kGroup, kKVRange);
                mix_quarter<0>(v, stride, g);
                if constexpr (COLUMNS == 1) continue;
                mix_quarter<1>(v, stride, g);
                mix_quarter<2>(v, stride, g);
                mix_quarter<3>(v, stride, g);
            }
            store_tile<0>(s.dots, out_stride);
            if constexpr (COLUMNS > 1) {
                store_tile<1>(s.dots + kGroup, out_stride);
                store_tile<2>(s.dots + 2 * kGroup, out_stride);
                store_tile<3>(s.dots + 3 * kGroup, out_stride);
            }
        } else {
            for (size_t tile = begin / kTileGroups; tile < end / kTileGroups; ++tile) {
                const uint8_t* v = s.values + tile * kKVTile * c.value_width + column * 4;
                load_tile<4>(s.weights + tile * kKVTile, kKVRange);
                load_tile<5>(s.weights + kTileMaxRows * kKVRange + tile * kKVTile, kKVRange);
                load_tile<6>(v, stride);
                multiply_byte_tiles<0, 4, 6, uint8_t, int8_t>();
                multiply_byte_tiles<2, 5, 6, uint8_t, int8_t>();
                if constexpr (COLUMNS == 1) continue;
                load_tile<7>(v + kTileRowBytes, stride);
                multiply_byte_tiles<1, 4, 7, uint8_t, int8_t>();
                multiply_byte_tiles<3, 5, 7, uint8_t, int8_t>();
            }
            store_tile<0>(s.dots, out_stride);
            store_tile<2>(s.dots + kTileMaxRows * kKVTile, out_stride);
            if constexpr (COLUMNS > 1) {
                store_tile<1>(s.dots + kGroup, out_stride);
                store_tile<3>(s.dots + kTileMaxRows * kKVTile + kGroup, out_stride);
            }
        }
        for (size_t r = 0; r < num_rows; ++r) {
            const __m512 unit = _mm512_set1_ps(v_units[r]);
            const int32_t* high = s.dots + r * kKVTile;
            float* out = sums.rows + r * state_width(c) + column;
            for (size_t d = 0; d < COLUMNS * kGroup; d += kGroup)
                _mm512_storeu_ps(out + d, _mm512_mul_ps(number(high + d, high + low_row * kKVTile + d), unit));
        }
    }

    // Column TILE of a group's V.
    template <int TILE>
    OCTAVO_FORCED void mix_quarter(const uint8_t* v, size_t stride, size_t g) {
        load_tile<7>(v + TILE * kTileRowBytes, stride);
        multiply_byte_tiles<TILE, 5, 7, uint8_t, int8_t>();
        fetch(g, 4 + TILE);
    }
};

}  // namespace

size_t int8_tiled_attention_scratch(size_t rows, const KVCache& cache) {
    uint8_t* const start = nullptr;
    return static_cast<size_t>(Scratch(start, rows, cache).end - start);
}

void int8_tiled_attention(const AttentionArgs& a, const QueryTile& t, size_t last_head, size_t first_range,
                          size_t last_range, uint8_t* scratch, float* states) {
    const size_t rows = t.num_tokens * (a.num_heads / a.cache.num_kv_heads);
    const auto run = [&](auto attention) {
        attention.configure();
        attention.run(last_head, first_range, last_range, states);
        release_tiles();
    };
    if (rows <= kFewRows)
        run(Attention<true>(a, t, rows, scratch));
    else
        run(Attention<false>(a, t, rows, scratch));
}

}  // namespace octavo::OCTAVO_LEVEL
