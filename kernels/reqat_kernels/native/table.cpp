// Piecewise-linear tables: y = slopes[k] x + intercepts[k], with k the number of breakpoints that are not above x.
//
// k is found by a binary search without branches, one comparison for each doubling of the table. Up to 16 entries are
// a register of AVX-512 (32 are two), so a step is a permutation, a comparison and a masked addition for 16 numbers at
// once; AVX2 holds 16 entries in two registers. Larger tables are read by gathers. The product is rounded, then the sum:
// all variants, and PyTorch, give the same bits.
//
// Beside it stand libm's vectorized functions as glibc has them (libmvec), for the benchmark. They are looked up when
// asked for: a machine without them needs none.
#include <limits>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "common.h"
#include "team.h"

namespace reqat {
namespace {

constexpr int MOST = 256;

// A table whose size is a power of two, 16 at least: absent entries repeat the last one behind breakpoints of infinity.
struct Padded {
    int size = 16;
    alignas(64) float breakpoints[MOST + 32], slopes[MOST], intercepts[MOST];

    Padded(const float* d, const float* s, const float* t, int entries) {
        while (size < entries) size *= 2;
        for (int i = 0; i < size; i++) {
            slopes[i] = s[i < entries ? i : entries - 1];
            intercepts[i] = t[i < entries ? i : entries - 1];
        }
        for (int i = 0; i < size + 32; i++)  // a step's register may begin behind the middle
            breakpoints[i] = i < entries - 1 ? d[i] : std::numeric_limits<float>::infinity();
    }
};

void values_portable(const Padded& table, const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int k = 0;
        for (int step = table.size / 2; step; step /= 2) k += table.breakpoints[k + step - 1] <= x[i] ? step : 0;
        y[i] = table.slopes[k] * x[i] + table.intercepts[k];
    }
}

#if REQAT_X86

// SIZE numbers, looked up by their index.
template <int SIZE>
struct Held512 {  // by gathers
    const float* from;
    REQAT_AVX512 explicit Held512(const float* from) : from(from) {}
    REQAT_AVX512 __m512 at(__m512i k) const { return _mm512_i32gather_ps(k, from, 4); }
};
template <>
struct Held512<16> {
    __m512 a;
    REQAT_AVX512 explicit Held512(const float* from) : a(_mm512_loadu_ps(from)) {}
    REQAT_AVX512 __m512 at(__m512i k) const { return _mm512_permutexvar_ps(k, a); }
};
template <>
struct Held512<32> {
    __m512 a, b;
    REQAT_AVX512 explicit Held512(const float* from) : a(_mm512_loadu_ps(from)), b(_mm512_loadu_ps(from + 16)) {}
    REQAT_AVX512 __m512 at(__m512i k) const { return _mm512_permutex2var_ps(a, k, b); }
};

// One step of the search, and those after it: k grows by STEP where x is not below the breakpoint k + STEP - 1, whose
// place is 0 in the register of this step.
template <int SIZE, int STEP>
struct Search512 {
    Held512<SIZE> d;
    Search512<SIZE, STEP / 2> rest;
    REQAT_AVX512 explicit Search512(const float* breakpoints) : d(breakpoints + STEP - 1), rest(breakpoints) {}
    REQAT_AVX512 __m512i from(__m512i k, __m512 x) const {
        const __mmask16 above = _mm512_cmp_ps_mask(d.at(k), x, _CMP_LE_OQ);
        return rest.from(_mm512_mask_add_epi32(k, above, k, _mm512_set1_epi32(STEP)), x);
    }
};
template <int SIZE>
struct Search512<SIZE, 0> {
    REQAT_AVX512 explicit Search512(const float*) {}
    REQAT_AVX512 __m512i from(__m512i k, __m512) const { return k; }
};

template <int SIZE>
REQAT_AVX512 void values_avx512(const Padded& table, const float* x, float* y, int64_t n) {
    const __m512 middle = _mm512_set1_ps(table.breakpoints[SIZE / 2 - 1]);
    const Search512<SIZE, SIZE / 4> search(table.breakpoints);
    const Held512<SIZE> s(table.slopes), t(table.intercepts);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 here = n - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - i)) - 1);
        const __m512 v = _mm512_maskz_loadu_ps(here, x + i);
        const __mmask16 above = _mm512_cmp_ps_mask(middle, v, _CMP_LE_OQ);
        const __m512i k = search.from(_mm512_maskz_set1_epi32(above, SIZE / 2), v);
        _mm512_mask_storeu_ps(y + i, here, _mm512_add_ps(_mm512_mul_ps(s.at(k), v), t.at(k)));
    }
}

template <int SIZE>
struct Held256 {
    const float* from;
    REQAT_AVX2 explicit Held256(const float* from) : from(from) {}
    REQAT_AVX2 __m256 at(__m256i k) const { return _mm256_i32gather_ps(from, k, 4); }
};
template <>
struct Held256<16> {
    __m256 a, b;
    REQAT_AVX2 explicit Held256(const float* from) : a(_mm256_loadu_ps(from)), b(_mm256_loadu_ps(from + 8)) {}
    REQAT_AVX2 __m256 at(__m256i k) const {
        const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(k, 28));  // bit 3 of the index becomes the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(a, k), _mm256_permutevar8x32_ps(b, k), high);
    }
};

template <int SIZE, int STEP>
struct Search256 {
    Held256<SIZE> d;
    Search256<SIZE, STEP / 2> rest;
    REQAT_AVX2 explicit Search256(const float* breakpoints) : d(breakpoints + STEP - 1), rest(breakpoints) {}
    REQAT_AVX2 __m256i from(__m256i k, __m256 x) const {
        const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(d.at(k), x, _CMP_LE_OQ));
        return rest.from(_mm256_or_si256(k, _mm256_and_si256(above, _mm256_set1_epi32(STEP))), x);
    }
};
template <int SIZE>
struct Search256<SIZE, 0> {
    REQAT_AVX2 explicit Search256(const float*) {}
    REQAT_AVX2 __m256i from(__m256i k, __m256) const { return k; }
};

template <int SIZE>
REQAT_AVX2 void values_avx2(const Padded& table, const float* x, float* y, int64_t n) {
    const __m256 middle = _mm256_set1_ps(table.breakpoints[SIZE / 2 - 1]);
    const Search256<SIZE, SIZE / 4> search(table.breakpoints);
    const Held256<SIZE> s(table.slopes), t(table.intercepts);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(middle, v, _CMP_LE_OQ));
        const __m256i k = search.from(_mm256_and_si256(above, _mm256_set1_epi32(SIZE / 2)), v);
        _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_mul_ps(s.at(k), v), t.at(k)));
    }
    values_portable(table, x + i, y + i, n - i);
}

#endif

using Values = void (*)(const Padded&, const float*, float*, int64_t);

Values best_values(int size) {
#if REQAT_X86
    // By log2(size) - 4.
    constexpr Values of_avx512[] = {values_avx512<16>, values_avx512<32>, values_avx512<64>, values_avx512<128>,
                                    values_avx512<256>};
    constexpr Values of_avx2[] = {values_avx2<16>, values_avx2<32>, values_avx2<64>, values_avx2<128>,
                                  values_avx2<256>};
    int at = 0;
    while ((16 << at) < size) at++;
    if (isa() >= AVX512) return of_avx512[at];
    if (isa() >= AVX2) return of_avx2[at];
#endif
    return values_portable;
}

constexpr int64_t PIECE = 1 << 14;  // numbers that a thread takes at a time

// Functions of libmvec, named by the vector ABI: d takes 8 numbers, e 16.

void* symbol(const char* name) {
#if defined(__linux__) && defined(__x86_64__)
    static void* const libmvec = dlopen("libmvec.so.1", RTLD_LAZY | RTLD_LOCAL);
    return libmvec ? dlsym(libmvec, name) : nullptr;
#else
    return nullptr;
#endif
}

#if REQAT_X86
REQAT_AVX512 void libm_avx512(void* function, const float* x, float* y, int64_t n) {
    const auto f = reinterpret_cast<__m512 (*)(__m512)>(function);
    for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(y + i, f(_mm512_loadu_ps(x + i)));
}
REQAT_AVX2 void libm_avx2(void* function, const float* x, float* y, int64_t n) {
    const auto f = reinterpret_cast<__m256 (*)(__m256)>(function);
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(y + i, f(_mm256_loadu_ps(x + i)));
}
#endif

}  // namespace
}  // namespace reqat

// x, y [n]; breakpoints [entries - 1], slopes and intercepts [entries], 1 to 256 entries. y may be x.
REQAT_API void reqat_table(const float* x, float* y, int64_t n, const float* breakpoints, const float* slopes,
                           const float* intercepts, int32_t entries, int32_t threads) {
    using namespace reqat;
    in_float_mode([&] {
        const Padded table(breakpoints, slopes, intercepts, entries);
        const Values values = best_values(table.size);
        const int64_t pieces = (n + PIECE - 1) / PIECE;
        auto piece = [&](int64_t p) {
            const int64_t at = p * PIECE;
            values(table, x + at, y + at, n - at < PIECE ? n - at : PIECE);
        };
        together(threads, [&](const Team& team) { team.each(pieces, piece); });
        return 0;
    });
}

// libmvec's function of this name ("expf") over x [n], n a multiple of 16, on one thread. 0 where there is none.
REQAT_API int32_t reqat_libmvec(const char* name, const float* x, float* y, int64_t n) {
    using namespace reqat;
#if REQAT_X86
    const int level = isa();
    if (level == PORTABLE) return 0;
    char mangled[64];
    int at = 0;
    for (const char* c = level >= AVX512 ? "_ZGVeN16v_" : "_ZGVdN8v_"; *c; c++) mangled[at++] = *c;
    for (const char* c = name; *c && at < 63; c++) mangled[at++] = *c;
    mangled[at] = 0;
    void* function = symbol(mangled);
    if (!function) return 0;
    if (n) level >= AVX512 ? libm_avx512(function, x, y, n) : libm_avx2(function, x, y, n);
    return 1;
#else
    return 0;
#endif
}
