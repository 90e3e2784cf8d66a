#include "common.h"

#include <atomic>

#if REQAT_X86
#include <cpuid.h>
#endif
#if defined(REQAT_AMX) && !defined(REQAT_TILE_TWIN)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace reqat {

#if REQAT_X86

struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    Leaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

// Registers that the operating system saves. Only where it uses XSAVE, as it does wherever AVX2 is supported.
static uint64_t saved_state() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

static Lack lack_of_amx() {
    if (lack(AVX512)) return NO_CPU;  // the same kernels use both
#if defined(REQAT_TILE_TWIN)
    return NOTHING;
#elif !defined(REQAT_AMX)
    return NO_COMPILER;
#else
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if ((Leaf(7, 0).edx & wanted) != wanted) return NO_CPU;
    const uint64_t tiles = 3u << 17;  // their configuration and their data
    if ((saved_state() & tiles) != tiles) return NO_STATE;
    // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Linux 5.16 and later.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? NOTHING : NO_PERMISSION;
#endif
}

static Lack lack_of_avxvnni() {
#if !defined(REQAT_AVXVNNI)
    return NO_COMPILER;
#else
    return lack(AVX2) || !(Leaf(7, 1).eax & 1u << 4) ? NO_CPU : NOTHING;
#endif
}

static bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
}

static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16");
}

Lack lack(int isa) {
    switch (isa) {
        case AVX2: {
            static const Lack found = has_avx2() ? NOTHING : NO_CPU;
            return found;
        }
        case AVXVNNI: {
            static const Lack found = lack_of_avxvnni();
            return found;
        }
        case AVX512: {
            static const Lack found = has_avx512() ? NOTHING : NO_CPU;
            return found;
        }
        case AMX: {
            static const Lack found = lack_of_amx();
            return found;
        }
        default:
            return isa == PORTABLE ? NOTHING : NO_CPU;
    }
}

#else

Lack lack(int isa) { return isa == PORTABLE ? NOTHING : NO_CPU; }

#endif

static std::atomic<int> limit{AMX}, chosen{-1};  // -1: not chosen yet

int isa() {
    int best = chosen.load(std::memory_order_relaxed);
    if (best >= 0) return best;
    for (best = limit.load(); lack(best);) best--;
    chosen.store(best, std::memory_order_relaxed);
    return best;
}

}  // namespace reqat

#ifndef REQAT_FINGERPRINT
#define REQAT_FINGERPRINT unknown
#endif
#define REQAT_STRING_OF(x) #x
#define REQAT_STRING(x) REQAT_STRING_OF(x)

// Of the sources this was built from (fingerprint.py): a stale library is refused, not called.
REQAT_API const char* reqat_fingerprint() { return REQAT_STRING(REQAT_FINGERPRINT); }
REQAT_API int reqat_isa() { return reqat::isa(); }
// A Lack: why this instruction set, 0 to AMX, cannot be used, whatever the limit.
REQAT_API int reqat_lack(int isa) { return reqat::lack(isa); }
// Whether tile instructions are computed in C++ (tiles.h): a build for tests.
REQAT_API int reqat_tile_twin() {
#if defined(REQAT_TILE_TWIN)
    return 1;
#else
    return 0;
#endif
}
// Use nothing better than this instruction set from now on (not thread-safe: meant for start-up and tests).
REQAT_API void reqat_limit_isa(int best) {
    reqat::limit = best < reqat::PORTABLE ? reqat::PORTABLE : best > reqat::AMX ? reqat::AMX : best;
    reqat::chosen = -1;
}
