// The int8 Linear (int8.h): bytes are multiplied as they lie in memory, whatever the number of rows.
//
// A strip is what one instruction multiplies: with byte dot products a line, or half of one, whose lanes are channels; else
// some channels of a line as int16, because products of bytes added in pairs of int16 would saturate. There a lane has
// two of the four k, and neighbours are added at the end.
#include "../int8.h"

#include "epilogue.h"
#include "level.h"
#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kTileRows = kLanes == 16 ? 8 : 6;  // what the registers hold beside two strips
constexpr int kFetchTo = 2;                         // of the caches, the second
constexpr size_t kTail = 64;                        // of a rounded row: Int8Tail, and rows start on cache lines

// Narrows codes.
template <class To>
inline void store_narrow(To* out, Ints codes) {
    typedef To Narrow __attribute__((vector_size(kLanes * sizeof(To))));
    const Narrow narrow = __builtin_convertvector(codes, Narrow);
    std::memcpy(out, &narrow, sizeof narrow);
}

#if defined(__AVX512VNNI__)

typedef int8_t Activation;
typedef __m512i Strip;

inline Strip load_strip(const uint8_t* p) { return _mm512_loadu_si512(p); }

// The activations of four consecutive k, in every lane.
inline Strip load_quad(const uint8_t* x) {
    int quad;
    std::memcpy(&quad, x, sizeof quad);
    return _mm512_set1_epi32(quad);
}

inline Ints multiply_add(Strip w, Strip x, Ints total) { return (Ints)_mm512_dpbusd_epi32((__m512i)total, w, x); }

#elif defined(__AVXVNNI__)

typedef int8_t Activation;
typedef __m256i Strip;

inline Strip load_strip(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }

inline Strip load_quad(const uint8_t* x) {
    int quad;
    std::memcpy(&quad, x, sizeof quad);
    return _mm256_set1_epi32(quad);
}

inline Ints multiply_add(Strip w, Strip x, Ints total) {
#if defined(OCTAVO_EVEX_AVXVNNI)
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(total) : "x"(w), "x"(x));
    return total;
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)total, w, x);
#endif
}

#else

typedef int16_t Activation;
typedef int16_t Strip __attribute__((vector_size(kLanes * 4)));

inline Strip load_strip(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Strip)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (Strip)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    typedef uint8_t Bytes __attribute__((vector_size(kLanes * 2)));
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, Strip);
#endif
}

inline Strip load_quad(const uint8_t* x) {
    typedef uint64_t Quads __attribute__((vector_size(kLanes * 4)));
    uint64_t quad;
    std::memcpy(&quad, x, sizeof quad);
    return (Strip)(Quads{} + quad);
}

// Products of neighbours are added.
inline Ints multiply_add(Strip w, Strip x, Ints total) {
#if defined(__AVX512F__)
    return total + (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    return total + (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#elif defined(__SSE2__)
    return total + (Ints)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
    const Ints wide_w = (Ints)w, wide_x = (Ints)x;
    return total + (wide_w << 16 >> 16) * (wide_x << 16 >> 16) + (wide_w >> 16) * (wide_x >> 16);
#endif
}

#endif

constexpr size_t kStripBytes = sizeof(Strip) / sizeof(Activation);
constexpr size_t kStrips = kInt8LineBytes / kStripBytes;  // of a line
constexpr size_t kVectors = 4;                    // strips of one row together: a sum alone would wait for its own latency
constexpr size_t kGroups = kStrips == 1 ? kVectors : 2;
constexpr size_t kTotals = kStrips * kLanes;  // integers that hold the sums of a group

using Totals = int32_t[kTileRows][kGroups][kTotals];
using Sums = float[kTileRows][kGroups][kChannels];

// Sums of `lines` lines of VECTORS strips with rows x, x + stride, ..., to out and each later row's place. The strips
// so far `ahead` come next.
template <size_t ROWS, size_t VECTORS>
void dot(const uint8_t* const* strips, size_t ahead, const uint8_t* x, size_t stride, size_t lines, int32_t* out) {
    Ints total[ROWS][VECTORS];
#pragma GCC unroll 8
    for (size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; ++v) total[r][v] = Ints{};
    const uint8_t *w[VECTORS], *near = x, *far = x + 4 * stride;
    for (size_t v = 0; v < VECTORS; ++v) w[v] = strips[v];
    size_t triple = 3 * stride;
    for (size_t line = 0; line < lines; ++line) {
        asm("" : "+r"(near), "+r"(far), "+r"(triple));  // or every row has a pointer, too many for the registers
        Strip strip[VECTORS];
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; ++v) {
            strip[v] = load_strip(w[v]);
            if (v % kStrips == 0) __builtin_prefetch(w[v] + ahead, 0, kFetchTo);  // of one line once
            w[v] += kInt8LineBytes;
        }
#pragma GCC unroll 8
        for (size_t r = 0; r < ROWS; ++r) {
            const Strip quad = load_quad((r < 4 ? near : far) + (r % 4 == 3 ? triple : r % 4 * stride));
#pragma GCC unroll 4
            for (size_t v = 0; v < VECTORS; ++v) total[r][v] = multiply_add(strip[v], quad, total[r][v]);
        }
        near += kInt8LineDepth * sizeof(Activation);
        far += kInt8LineDepth * sizeof(Activation);
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; ++v)
            std::memcpy(out + r * kGroups * kTotals + v * kLanes, &total[r][v], sizeof total[r][v]);
}

void dot_rows(size_t rows, size_t vectors, const uint8_t* const* strips, size_t ahead, const uint8_t* x, size_t stride,
              size_t lines, int32_t* out) {
    switch (rows) {
        case 1:
            return vectors > 2 ? dot<1, kVectors>(strips, ahead, x, stride, lines, out)
                               : dot<1, 2>(strips, ahead, x, stride, lines, out);
        case 2: return dot<2, 2>(strips, ahead, x, stride, lines, out);
        case 3: return dot<3, 2>(strips, ahead, x, stride, lines, out);
        case 4: return dot<4, 2>(strips, ahead, x, stride, lines, out);
        case 5: return dot<5, 2>(strips, ahead, x, stride, lines, out);
        case 6: return dot<6, 2>(strips, ahead, x, stride, lines, out);
        case 7: return dot<kTileRows < 7 ? 1 : 7, 2>(strips, ahead, x, stride, lines, out);
        case 8: return dot<kTileRows < 8 ? 1 : 8, 2>(strips, ahead, x, stride, lines, out);
    }
}

// Rows of activations, and the channels of some groups that they meet.
struct Tile {
    const PackedArgs& args;
    size_t stride;  // bytes of a row
    size_t row, rows;
    size_t group, count;

    const uint8_t* x() const { return static_cast<const uint8_t*>(args.x) + row * stride; }
};

// The outputs of one group for one row, before the epilogue.
inline void scale_sums(const int32_t* totals, const Int8Tail& tail, const float* scales, float* out) {
    for (size_t c = 0; c < kChannels; c += kLanes) {
        Ints sums;
        if constexpr (kTotals == kChannels) {
            std::memcpy(&sums, totals + c, sizeof sums);
        } else {
            for (size_t i = 0; i < kLanes; ++i) sums[i] = totals[2 * (c + i)] + totals[2 * (c + i) + 1];
        }
        store(out + c, __builtin_convertvector(sums + tail.correction, Floats) * (tail.scale * load(scales + c)));
    }
}

void multiply(const Tile& tile, const Part& part, Sums& sums) {
    const PackedArgs& a = tile.args;
    const size_t lines = a.num_blocks * kInt8Lines, ahead = tile.count * part.group_bytes;
    const uint8_t* groups[kGroups];
    for (size_t g = 0; g < kGroups; ++g)  // what would lie past the last is computed twice
        groups[g] = part.data + (tile.group + (g < tile.count ? g : tile.count - 1)) * part.group_bytes;
    alignas(64) Totals totals;
    const size_t all = tile.count * kStrips, together = tile.rows == 1 && all > 2 ? kVectors : 2;
    for (size_t first = 0; first < all; first += together) {
        const uint8_t* strips[kVectors];
        for (size_t v = 0; v < together; ++v) strips[v] = groups[(first + v) / kStrips] + (first + v) % kStrips * kStripBytes;
        dot_rows(tile.rows, together, strips, ahead, tile.x(), tile.stride, lines, totals[0][0] + first * kLanes);
    }
    for (size_t r = 0; r < tile.rows; ++r) {
        Int8Tail tail;
        std::memcpy(&tail, tile.x() + r * tile.stride + a.depth * sizeof(Activation), sizeof tail);
        for (size_t g = 0; g < tile.count; ++g)
            scale_sums(totals[r][g], tail, reinterpret_cast<const float*>(groups[g] + int8_scales_at(a.num_blocks)),
                       sums[r][g]);
    }
}

void int8_linear(const PackedArgs& a, size_t index, size_t first_group, size_t last_group, void*) {
    const Part& part = a.parts[index];
    const Part* up = a.ups != nullptr ? a.ups + index : nullptr;
    const size_t tiles = (a.num_rows + kTileRows - 1) / kTileRows;
    const size_t together = a.num_rows == 1 ? kGroups : 2;
    Sums sums, ups;
    for (size_t group = first_group; group < last_group; group += together) {
        const size_t count = last_group - group < together ? last_group - group : together;
        const Outputs outputs(a, part, up, group, count);
        for (size_t i = 0; i < tiles; ++i) {  // of even height: a last one of one row would cost as much as one of four
            const size_t row = a.num_rows * i / tiles, rows = a.num_rows * (i + 1) / tiles - row;
            const Tile tile = {a, a.depth * sizeof(Activation) + kTail, row, rows, group, count};
            outputs.fetch(row, rows);
            multiply(tile, part, sums);
            if (up != nullptr) multiply(tile, *up, ups);
            for (size_t r = 0; r < rows; ++r)
                for (size_t g = 0; g < count; ++g)
                    outputs.finish(row + r, g, sums[r][g], ups[r][g]);
        }
    }
}

// Kernels::multiply_adds of this Linear.
double int8_multiply_adds(size_t turns, float* sink) {
    constexpr size_t chains = 12;
    const uint8_t ones[kInt8LineBytes] = {1, 1, 1, 1, 1, 1, 1, 1};
    Strip one = load_strip(ones);
    Ints total[chains] = {};
    for (size_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 12
        for (size_t c = 0; c < chains; ++c) {
            total[c] = multiply_add(one, one, total[c]);
#if defined(__x86_64__)
            asm("" : "+v"(total[c]), "+v"(one));  // or all chains are one, and all products
#elif defined(__aarch64__)
            asm("" : "+w"(total[c]), "+w"(one));
#endif
        }
#pragma GCC unroll 12
    for (size_t c = 0; c < chains; ++c) *sink += static_cast<float>(total[c][0]);
    return static_cast<double>(turns * chains) * 2 * kStripBytes;
}

size_t int8_scratch(size_t) { return 0; }

// One stage of the rotation inside a vector: lanes HALF apart become their sum and their difference.
template <size_t HALF>
inline Floats butterfly(Floats v) {
#if defined(__clang__)
    static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16);
    Floats other{}, sign{};
    for (size_t i = 0; i < kLanes; ++i) other[i] = v[i ^ HALF];
    for (size_t i = 0; i < kLanes; ++i) sign[i] = i & HALF ? -1.0f : 1.0f;
#else
    Ints order{};
    Floats sign{};
    for (size_t i = 0; i < kLanes; ++i) order[i] = static_cast<int>(i ^ HALF);
    for (size_t i = 0; i < kLanes; ++i) sign[i] = i & HALF ? -1.0f : 1.0f;
    const Floats other = __builtin_shuffle(v, order);
#endif
    return fma(v, sign, other);  // exact but for the sum's own rounding
}

constexpr size_t kBlockVectors = kInt8Block / kLanes;

template <size_t HALF>
OCTAVO_FORCED void butterflies(Floats* v) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kBlockVectors; ++i) v[i] = butterfly<HALF>(v[i]);
}

// H v for a block in registers, stage after stage: a vector alone would wait for its own latency.
OCTAVO_FORCED void rotate(Floats* v) {
    butterflies<1>(v);
    butterflies<2>(v);
    if constexpr (kLanes > 4) butterflies<4>(v);
    if constexpr (kLanes > 8) butterflies<8>(v);
#pragma GCC unroll 4
    for (size_t half = 1; half < kBlockVectors; half *= 2)
#pragma GCC unroll 16
        for (size_t i = 0; i < kBlockVectors; ++i)
            if ((i & half) == 0) {
                const Floats a = v[i], b = v[i + half];
                v[i] = a + b;
                v[i + half] = a - b;
            }
}

// The bits of the magnitude, which order as magnitudes do; infinity and NaN are the largest.
inline Ints magnitude(Floats v) { return (Ints)v & 0x7fffffff; }

inline Ints max(Ints a, Ints b) { return a > b ? a : b; }

// One stage across blocks: of P vectors `step` apart.
template <size_t P>
inline void mix(Floats* v, size_t step) {
    Floats sum = v[0];
#pragma GCC unroll 3
    for (size_t j = 1; j < P; ++j) sum += v[j * step];
    if constexpr (P == 2) {
        v[step] = v[0] - v[step];
        v[0] = sum;
    } else {
        sum *= 2.0f / P;
#pragma GCC unroll 3
        for (size_t j = 0; j < P; ++j) v[j * step] -= sum;
    }
}

// Stages of N vectors `step`, step * P, ... apart.
template <size_t N, size_t STEP, size_t P, size_t... REST>
OCTAVO_FORCED void mix_stages(Floats* v) {
#pragma GCC unroll 24
    for (size_t first = 0; first < N; first += P * STEP)
#pragma GCC unroll 24
        for (size_t j = 0; j < STEP; ++j) mix<P>(v + first + j, STEP);
    if constexpr (sizeof...(REST) > 0) mix_stages<N, STEP * P, REST...>(v);
}

// What a pass over a row leaves: the product of the primes of its stages, and the largest magnitudes by lane.
struct Mixed {
    size_t product;
    Ints largest;
};

// Stages that follow each other, in one pass; the first of stride STRIDE, or `stride` where that is 0.
template <size_t STRIDE, size_t... P>
Mixed mix_at(float* values, size_t depth, size_t stride) {
    constexpr size_t n = (P * ...);
    if constexpr (STRIDE != 0) stride = STRIDE;
    Ints largest{};
    for (size_t first = 0; first < depth; first += n * stride)
        for (size_t i = first; i < first + stride; i += kLanes) {
            Floats v[n];
#pragma GCC unroll 24
            for (size_t j = 0; j < n; ++j) v[j] = load(values + i + j * stride);
            mix_stages<n, 1, P...>(v);
#pragma GCC unroll 24
            for (size_t j = 0; j < n; ++j) {
                largest = max(largest, magnitude(v[j]));
                store(values + i + j * stride, v[j]);
            }
        }
    return {n, largest};
}

template <size_t... P>
Mixed mix_pass(float* values, size_t depth, size_t stride) {
    return stride == kInt8Block ? mix_at<kInt8Block, P...>(values, depth, stride)
                                : mix_at<0, P...>(values, depth, stride);
}

// One stage of any p.
Mixed mix_any(float* values, size_t depth, size_t stride, size_t p) {
    const float share = 2.0f / static_cast<float>(p);
    Ints largest{};
    const auto keep = [&](float* to, Floats v) {
        largest = max(largest, magnitude(v));
        store(to, v);
    };
    for (size_t first = 0; first < depth; first += p * stride)
        for (size_t i = first; i < first + stride; i += kLanes) {
            Floats sum = load(values + i);
            for (size_t j = 1; j < p; ++j) sum += load(values + i + j * stride);
            if (p == 2) {
                keep(values + i + stride, load(values + i) - load(values + i + stride));
                keep(values + i, sum);
                continue;
            }
            sum *= share;
            for (size_t j = 0; j < p; ++j) keep(values + i + j * stride, load(values + i + j * stride) - sum);
        }
    return {p, largest};
}

size_t smallest_factor(size_t number) {
    size_t p = 2;
    while (number % p != 0) ++p;
    return p;
}

// The part of the rotation that goes across blocks, as many stages in a pass as fit into the registers. Returns the
// largest magnitudes by lane, where there is more than one block.
Ints mix_blocks(float* values, size_t blocks) {
    const size_t depth = blocks * kInt8Block;
    size_t stride = kInt8Block;
    Mixed mixed = {1, {}};
    for (size_t left = blocks; left > 1; left /= mixed.product, stride *= mixed.product) {
        const size_t p = smallest_factor(left), q = left > p ? smallest_factor(left / p) : 1;
        if (kLanes == 16 && left % 16 == 0)
            mixed = mix_pass<2, 2, 2, 2>(values, depth, stride);
        else if (kLanes == 16 && left % 24 == 0)
            mixed = mix_pass<2, 2, 2, 3>(values, depth, stride);
        else if (p == 2 && q == 2)
            mixed = mix_pass<2, 2>(values, depth, stride);
        else if (p == 2 && q == 3)
            mixed = mix_pass<2, 3>(values, depth, stride);
        else if (p == 3 && q == 3)
            mixed = mix_pass<3, 3>(values, depth, stride);
        else
            mixed = mix_any(values, depth, stride, p);
    }
    return mixed.largest;
}

// Rotates a row of `width` values, padded with zeros to `depth`. Returns the largest magnitudes by lane.
Ints rotate_row(const float* x, size_t width, size_t depth, float* out) {
    Ints largest{};
    for (size_t i = 0; i < depth; i += kInt8Block) {
        Floats block[kBlockVectors];
        const size_t left = i < width ? width - i : 0;
        if (left >= kInt8Block) {
#pragma GCC unroll 16
            for (size_t v = 0; v < kBlockVectors; ++v) block[v] = load(x + i + v * kLanes);
        } else {
            float part[kInt8Block] = {};
            std::memcpy(part, x + i, left * sizeof *x);
            for (size_t v = 0; v < kBlockVectors; ++v) block[v] = load(part + v * kLanes);
        }
        rotate(block);
#pragma GCC unroll 16
        for (size_t v = 0; v < kBlockVectors; ++v) store(out + i + v * kLanes, block[v]);
        if (depth == kInt8Block)
            for (size_t v = 0; v < kBlockVectors; ++v) largest = max(largest, magnitude(block[v]));
    }
    return depth == kInt8Block ? largest : mix_blocks(out, depth / kInt8Block);
}

// The largest of some magnitudes: infinity or NaN where any value is.
inline float largest_lane(Ints largest) {
    int32_t most = 0;
#if defined(__AVX512F__)
    most = _mm512_reduce_max_epi32((__m512i)largest);
#else
    for (size_t lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
#endif
    float value;
    std::memcpy(&value, &most, sizeof value);
    return value;
}

// Codes of rotated values, and their sum.
int32_t round_row(const float* values, size_t depth, float factor, Activation* out) {
#if defined(__AVX512VNNI__)
    const __m512 by = _mm512_set1_ps(factor);
    const __m512i ones = _mm512_set1_epi8(1), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i total = _mm512_setzero_si512();
    for (size_t i = 0; i < depth; i += kInt8Block) {
        __m512i codes[kBlockVectors];
#pragma GCC unroll 4
        for (size_t v = 0; v < kBlockVectors; ++v)
            codes[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i + v * kLanes), by));
        const __m512i halves = _mm512_packs_epi32(codes[0], codes[1]), others = _mm512_packs_epi32(codes[2], codes[3]);
        const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(halves, others));
        total = _mm512_dpbusd_epi32(total, ones, bytes);
        _mm512_storeu_si512(out + i, bytes);
    }
    return _mm512_reduce_add_epi32(total);
#else
    const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    Ints total{};
    for (size_t i = 0; i < depth; i += kLanes) {
        const Ints codes = (Ints)(load(values + i) * factor + shift) - (Ints)shift;
        total += codes;
        store_narrow(out + i, codes);
    }
    int32_t sum = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) sum += total[lane];
    return sum;
#endif
}

// PackedKernels::round_rows. A row is rotated before the one ahead of it is rounded, which waits for its largest value.
void round_int8_rows(const float* x, size_t rows, size_t width, size_t depth, void* out) {
    alignas(64) float rotated[2][kMaxInt8Depth];
    uint8_t* bytes = static_cast<uint8_t*>(out);
    Ints next = rotate_row(x, width, depth, rotated[0]);
    for (size_t row = 0; row < rows; ++row, bytes += depth * sizeof(Activation) + kTail) {
        float* values = rotated[row % 2];
        const float largest = largest_lane(next);
        const bool finite = largest - largest == 0.0f, zero = !(largest > kInt8Smallest);
        const float factor = zero || !finite ? 0.0f : kInt8Largest / largest;
        if (row + 1 < rows) next = rotate_row(x + (row + 1) * width, width, depth, rotated[(row + 1) % 2]);
        if (!finite) std::memset(values, 0, depth * sizeof *values);
        const int32_t sum = round_row(values, depth, factor, reinterpret_cast<Activation*>(bytes));
        const float scale = finite ? (zero ? 0.0f : largest / kInt8Largest) : __builtin_nanf("");
        const Int8Tail tail = {scale, -kInt8Zero * sum};
        std::memcpy(bytes + depth * sizeof(Activation), &tail, sizeof tail);
    }
}

}  // namespace

void look_up_int8(const Part& part, size_t row, size_t width, float* out) {
    const size_t blocks = int8_blocks(width), channel = row % kChannels;
    const uint8_t* group = part.data + row / kChannels * part.group_bytes;
    const uint8_t* line = group + channel * kInt8LineDepth;
    for (size_t k = 0; k < blocks * kInt8Block; k += kInt8LineDepth, line += kInt8LineBytes)
        for (size_t i = 0; i < kInt8LineDepth; ++i) out[k + i] = static_cast<float>(line[i] - kInt8Zero);
    rotate_row(out, blocks * kInt8Block, blocks * kInt8Block, out);
    float scale;
    std::memcpy(&scale, group + int8_scales_at(blocks) + channel * sizeof scale, sizeof scale);
    for (size_t k = 0; k < width; ++k) out[k] *= scale;
}

const PackedKernels int8 = {sizeof(Activation), round_int8_rows, int8_linear,     int8_scratch,
                            kInt8Block,         kTail,           int8_multiply_adds};

}  // namespace octavo::OCTAVO_LEVEL
