// What the machine can do at most, as a yardstick for the profile.
#include "level.h"
#include "simd.h"
#include "tiles.h"

namespace octavo::OCTAVO_LEVEL {

void read_all(const float* values, size_t count, float* sink) {
    constexpr size_t chains = 8;
    Floats total[chains] = {};
    for (size_t i = 0; i + chains * kLanes <= count; i += chains * kLanes)
        for (size_t c = 0; c < chains; ++c) total[c] += load(values + i + c * kLanes);
    for (size_t c = 0; c < chains; ++c) *sink += sum(total[c]);
}

#if defined(__AMX_BF16__) && !defined(OCTAVO_EMULATE_TILES)
namespace {

// Numbers as varied as real ones: on zeros the unit runs a fifth faster and more.
template <bool BYTES>
double tile_multiply_adds(size_t turns, float* sink) {
    TileConfig config;
    for (size_t tile = 0; tile < 8; ++tile) config.set(tile, kTileMaxRows);
    configure_tiles(config);
    alignas(64) uint16_t numbers[2][kTileMaxRows * kTileRowBytes / 2];
    uint32_t random = 1;
    for (auto& tile : numbers)
        for (uint16_t& number : tile) {
            random = random * 1664525u + 1013904223u;
            const uint32_t high = random >> 16;
            number = static_cast<uint16_t>(BYTES ? high : 0x3f00u | (high & 0x80ffu));  // bf16: magnitudes from 0.5 to 2
        }
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    load_tile<4>(numbers[0], kTileRowBytes);
    load_tile<5>(numbers[1], kTileRowBytes);
    load_tile<6>(numbers[1], kTileRowBytes);
    load_tile<7>(numbers[0], kTileRowBytes);
    for (size_t turn = 0; turn < turns; ++turn)
        if constexpr (BYTES) {
            multiply_byte_tiles<0, 4, 6>();
            multiply_byte_tiles<1, 4, 7>();
            multiply_byte_tiles<2, 5, 6>();
            multiply_byte_tiles<3, 5, 7>();
        } else {
            multiply_tiles<0, 4, 6>();
            multiply_tiles<1, 4, 7>();
            multiply_tiles<2, 5, 6>();
            multiply_tiles<3, 5, 7>();
        }
    alignas(64) float sums[kTileMaxRows * 16];
    store_tile<0>(sums, kTileRowBytes);
    release_tiles();
    *sink += sums[0];
    return static_cast<double>(turns) * 4 * 2 * kTileMaxRows * 16 * (kTileRowBytes / (BYTES ? 1 : 2));
}

}  // namespace

double byte_tile_multiply_adds(size_t turns, float* sink) { return tile_multiply_adds<true>(turns, sink); }
#endif

// As many chains as hide the latency of two multiply-adds a cycle. The empty asm hides the operands' values, so that
// nothing is folded.
double multiply_adds(size_t turns, float* sink) {
    [[maybe_unused]] constexpr size_t chains = 12;
#if defined(__AMX_BF16__) && !defined(OCTAVO_EMULATE_TILES)
    return tile_multiply_adds<false>(turns, sink);
#elif defined(__AVX512BF16__)
    __m512i factor = _mm512_set1_epi32(0x3f803f80);
    asm("" : "+v"(factor));
    __m512 total[chains] = {};
    for (size_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 12
        for (size_t c = 0; c < chains; ++c) {
            total[c] = _mm512_dpbf16_ps(total[c], (__m512bh)factor, (__m512bh)factor);
            asm("" : "+v"(total[c]));
        }
#pragma GCC unroll 12  // or the array lives in memory, above as well
    for (size_t c = 0; c < chains; ++c) *sink += _mm512_reduce_add_ps(total[c]);
    return static_cast<double>(turns * chains) * 64;
#else
    Floats factor = splat(1e-3f), total[chains] = {};
    for (size_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 12
        for (size_t c = 0; c < chains; ++c) {
            total[c] = fma(factor, factor, total[c]);
#if defined(__x86_64__)
            asm("" : "+x"(total[c]));
#elif defined(__aarch64__)
            asm("" : "+w"(total[c]));
#endif
        }
#pragma GCC unroll 12
    for (size_t c = 0; c < chains; ++c) *sink += sum(total[c]);
    return static_cast<double>(turns * chains) * 2 * kLanes;
#endif
}

}  // namespace octavo::OCTAVO_LEVEL
