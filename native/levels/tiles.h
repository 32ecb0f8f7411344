// AMX tiles: the few instructions that Linear and attention need, by tile number.
//
// Written as asm that names memory: the intrinsics of some compilers do not tell what they read, and stores before
// them are then moved or dropped. With -DOCTAVO_EMULATE_TILES, plain code does the same in the order of the hardware
// (per 32 k: one fma chain over the even and one over the odd k from zero, their sum added to the accumulator), so that
// the kernels are tested on any machine with AVX-512 BF16.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace octavo::OCTAVO_LEVEL {
namespace {

constexpr size_t kTileRowBytes = 64;
constexpr size_t kTileMaxRows = 16;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(size_t tile, size_t num_rows, size_t bytes = kTileRowBytes) {
        rows[tile] = static_cast<uint8_t>(num_rows);
        row_bytes[tile] = static_cast<uint16_t>(num_rows == 0 ? 0 : bytes);
    }
};

#if defined(OCTAVO_EMULATE_TILES)

struct EmulatedTiles {
    TileConfig config;
    uint8_t bytes[8][kTileMaxRows][kTileRowBytes];
};
thread_local EmulatedTiles emulated;

inline void configure_tiles(const TileConfig& config) {
    emulated.config = config;
    std::memset(emulated.bytes, 0, sizeof emulated.bytes);
}
inline void release_tiles() {}

template <int TILE>
inline void zero_tile() {
    std::memset(emulated.bytes[TILE], 0, sizeof emulated.bytes[TILE]);
}

template <int TILE>
inline void load_tile(const void* from, size_t stride) {
    zero_tile<TILE>();
    for (size_t row = 0; row < emulated.config.rows[TILE]; ++row)
        std::memcpy(emulated.bytes[TILE][row], static_cast<const char*>(from) + row * stride,
                    emulated.config.row_bytes[TILE]);
}

template <int TILE>
inline void load_tile_once(const void* from, size_t stride) {
    load_tile<TILE>(from, stride);
}

template <int TILE>
inline void store_tile(void* to, size_t stride) {
    for (size_t row = 0; row < emulated.config.rows[TILE]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, emulated.bytes[TILE][row],
                    emulated.config.row_bytes[TILE]);
}

// As the processor does.
template <int C, int A, int B>
inline void check_shapes() {
    const TileConfig& c = emulated.config;
    if (c.rows[A] != c.rows[C] || c.row_bytes[A] != 4 * c.rows[B] || c.row_bytes[B] != c.row_bytes[C]) __builtin_trap();
}

template <int C, int A, int B>
inline void multiply_tiles() {
    const auto number = [](int tile, size_t row, size_t k) {
        uint32_t bits = 0;
        std::memcpy(reinterpret_cast<char*>(&bits) + 2, emulated.bytes[tile][row] + 2 * k, 2);
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    };
    check_shapes<C, A, B>();
    for (size_t row = 0; row < emulated.config.rows[C]; ++row) {
        for (size_t column = 0; column < kTileRowBytes / 4; ++column) {
            float even = 0.0f, odd = 0.0f, total;
            for (size_t k = 0; k < emulated.config.rows[B]; ++k) {
                even = fmaf(number(A, row, 2 * k), number(B, k, 2 * column), even);
                odd = fmaf(number(A, row, 2 * k + 1), number(B, k, 2 * column + 1), odd);
            }
            std::memcpy(&total, emulated.bytes[C][row] + 4 * column, sizeof total);
            total += even + odd;
            std::memcpy(emulated.bytes[C][row] + 4 * column, &total, sizeof total);
        }
    }
}

// The same of bytes, of types OF_A and OF_B, into int32.
template <int C, int A, int B, class OF_A = int8_t, class OF_B = uint8_t>
inline void multiply_byte_tiles() {
    check_shapes<C, A, B>();
    for (size_t row = 0; row < emulated.config.rows[C]; ++row)
        for (size_t column = 0; column < kTileRowBytes / 4; ++column) {
            int32_t total;
            std::memcpy(&total, emulated.bytes[C][row] + 4 * column, sizeof total);
            for (size_t k = 0; k < 4 * emulated.config.rows[B]; ++k)
                total += static_cast<OF_A>(emulated.bytes[A][row][k]) *
                         static_cast<OF_B>(emulated.bytes[B][k / 4][4 * column + k % 4]);
            std::memcpy(emulated.bytes[C][row] + 4 * column, &total, sizeof total);
        }
}

#else

inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

template <int TILE>
inline void load_tile(const void* from, size_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(stride) : "memory");
}

// The same, as a hint that it will not be read again soon.
template <int TILE>
inline void load_tile_once(const void* from, size_t stride) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(stride) : "memory");
}

template <int TILE>
inline void store_tile(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(to), "r"(stride) : "memory");
}

// C += A * B, bf16 pairs into float32.
template <int C, int A, int B>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// C += A * B, bytes of types OF_A and OF_B into int32.
template <int C, int A, int B, class OF_A = int8_t, class OF_B = uint8_t>
inline void multiply_byte_tiles() {
    if constexpr (!std::is_signed_v<OF_A>)
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    else if constexpr (std::is_signed_v<OF_B>)
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    else
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace octavo::OCTAVO_LEVEL
