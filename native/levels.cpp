// Chooses an instruction level: what the processor has, or what a test forces.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace octavo {

namespace portable {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const PackedKernels int8;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const PackedKernels int8;
}
namespace avx512bf16 {
extern const PackedKernels packed;
extern const PackedKernels int8;
extern const KVKernels kv;
double multiply_adds(size_t turns, float* sink);
}
namespace amx {
extern const PackedKernels packed;
extern const KVKernels kv;
PackedKernels int8_on_tiles(PackedKernels dots);
double multiply_adds(size_t turns, float* sink);
}

static bool has_avx2() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned f16c = 1u << 29;  // of cpuid leaf 1, ecx: not every compiler knows the name
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
           (ecx & f16c);
}

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

static bool has_avx512bf16() {
    return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

// Byte dot products without AVX-512: those of its encoding compute the same on machines that have them.
static bool has_avxvnni() {
#if defined(OCTAVO_EVEX_AVXVNNI)
    return has_avx512vnni();
#else
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4);
#endif
}

// Tiles for bf16 and bytes, and leave of the system to use them: their state is large, so that Linux wants to be asked once.
static bool has_amx() {
#if defined(OCTAVO_EMULATE_TILES)
    return has_avx512bf16();
#elif defined(__linux__)
    constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24, int8 = 1u << 25;  // of cpuid leaf 7, edx
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    return (edx & bf16) && (edx & tiles) && (edx & int8) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

// A level with another Linear for int8 weights.
static Kernels with_int8(Kernels kernels, const char* name, const PackedKernels& int8) {
    kernels.name = name;
    kernels.int8 = &int8;
    return kernels;
}

// AVX-512 with another Linear for packed weights, and another attention.
static Kernels avx512_with(const char* name, const PackedKernels& packed, const PackedKernels& int8, const KVKernels& kv,
                           double (*multiply_adds)(size_t, float*)) {
    Kernels kernels = with_int8(avx512::kernels, name, int8);
    kernels.kv = &kv;
    kernels.packed = &packed;
    kernels.multiply_adds = multiply_adds;
    return kernels;
}
#endif

const Kernels* find_kernels(const char* wanted) {
    const bool any = std::strcmp(wanted, "auto") == 0;
#if defined(__x86_64__)
    static const Kernels bf16 = avx512_with("avx512bf16", avx512bf16::packed, avx512bf16::int8, avx512bf16::kv,
                                            avx512bf16::multiply_adds);
    static const PackedKernels int8_tiles = amx::int8_on_tiles(avx512bf16::int8);
    static const Kernels tiles = avx512_with("amx", amx::packed, int8_tiles, amx::kv, amx::multiply_adds);
    if ((any || std::strcmp(wanted, "amx") == 0) && has_amx()) return &tiles;
    if ((any || std::strcmp(wanted, "avx512bf16") == 0) && has_avx512bf16()) return &bf16;
    static const Kernels wide_dots = with_int8(avx512::kernels, "avx512vnni", avx512vnni::int8);
    if ((any || std::strcmp(wanted, "avx512vnni") == 0) && has_avx512vnni()) return &wide_dots;
    if ((any || std::strcmp(wanted, "avx512") == 0) && has_avx512()) return &avx512::kernels;
    static const Kernels dots = with_int8(avx2::kernels, "avxvnni", avxvnni::int8);
    if ((any || std::strcmp(wanted, "avxvnni") == 0) && has_avxvnni()) return &dots;
    if ((any || std::strcmp(wanted, "avx2") == 0) && has_avx2()) return &avx2::kernels;
#endif
    if (any || std::strcmp(wanted, "portable") == 0) return &portable::kernels;
    return nullptr;
}

}  // namespace octavo
