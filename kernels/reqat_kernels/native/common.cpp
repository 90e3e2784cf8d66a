#include "common.h"

namespace reqat {

static int detect() {
#if REQAT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
    return PORTABLE;
}

static int detected = detect();
static int limit = AVX512;

int isa() { return detected < limit ? detected : limit; }

}  // namespace reqat

// Bumped with every change of a signature below any REQAT_API, so that a stale library is refused, not called.
REQAT_API int reqat_abi() { return 1; }
REQAT_API int reqat_isa() { return reqat::isa(); }
// Use nothing better than this instruction set from now on (not thread-safe: meant for start-up and tests).
REQAT_API void reqat_limit_isa(int best) { reqat::limit = best; }
