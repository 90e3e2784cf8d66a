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

#ifndef REQAT_FINGERPRINT
#define REQAT_FINGERPRINT unknown
#endif
#define REQAT_STRING_OF(x) #x
#define REQAT_STRING(x) REQAT_STRING_OF(x)

// Of the sources this was built from (fingerprint.py): a stale library is refused, not called.
REQAT_API const char* reqat_fingerprint() { return REQAT_STRING(REQAT_FINGERPRINT); }
REQAT_API int reqat_isa() { return reqat::isa(); }
// Use nothing better than this instruction set from now on (not thread-safe: meant for start-up and tests).
REQAT_API void reqat_limit_isa(int best) { reqat::limit = best; }
