// y = x W^T with W in float32, bfloat16 or int8, for the few rows of x that decoding has: the output head.
//
// Reads the weight once, at the speed of memory; torch's own bfloat16 product takes two to three times as long for one
// row. Products and sums are float32: x is not rounded. int8 has a scale for each row of W, by which the sum is
// multiplied. Where x is int8 too the sums are integers, exact, and the same bits from every instruction set.

#include <cmath>

#include "common.h"
#include "team.h"

namespace reqat {
namespace {

constexpr int64_t ROWS = 4;  // rows of x at a time

// How a type of weight becomes float32: one number, eight, sixteen.
struct Bf16 {
    using Type = uint16_t;
    static float one(Type w) { return bf16_to_float(w); }
#if REQAT_X86
    REQAT_AVX2 static inline __m256 eight(const Type* w) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    }
    REQAT_AVX512 static inline __m512 sixteen(const Type* w) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
#endif
};

struct F32 {
    using Type = float;
    static float one(Type w) { return w; }
#if REQAT_X86
    REQAT_AVX2 static inline __m256 eight(const Type* w) { return _mm256_loadu_ps(w); }
    REQAT_AVX512 static inline __m512 sixteen(const Type* w) { return _mm512_loadu_ps(w); }
#endif
};

struct Int8 {
    using Type = int8_t;
    static float one(Type w) { return float(w); }
#if REQAT_X86
    REQAT_AVX2 static inline __m256 eight(const Type* w) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
    }
    REQAT_AVX512 static inline __m512 sixteen(const Type* w) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
    }
#endif
};

template <class W>
void rows_portable(const typename W::Type* w, const float* x, float* out, int64_t M, int64_t K) {
    for (int64_t m = 0; m < M; m++) {
        float sum = 0;
        for (int64_t k = 0; k < K; k++) sum = std::fma(W::one(w[k]), x[m * K + k], sum);
        out[m] = sum;
    }
}

#if REQAT_X86

template <class W, int MR>
REQAT_AVX2 void rows_avx2(const typename W::Type* w, const float* x, float* out, int64_t K) {
    __m256 even[MR], odd[MR];  // two chains: one alone would wait for its own additions
    for (int m = 0; m < MR; m++) even[m] = odd[m] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        const __m256 v0 = W::eight(w + k), v1 = W::eight(w + k + 8);
        for (int m = 0; m < MR; m++) {
            even[m] = _mm256_fmadd_ps(v0, _mm256_loadu_ps(x + m * K + k), even[m]);
            odd[m] = _mm256_fmadd_ps(v1, _mm256_loadu_ps(x + m * K + k + 8), odd[m]);
        }
    }
    for (int m = 0; m < MR; m++) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, _mm256_add_ps(even[m], odd[m]));
        float sum = 0;
        for (float lane : lanes) sum += lane;
        for (int64_t i = k; i < K; i++) sum = std::fma(W::one(w[i]), x[m * K + i], sum);
        out[m] = sum;
    }
}

template <class W, int MR>
REQAT_AVX512 void rows_avx512(const typename W::Type* w, const float* x, float* out, int64_t K) {
    __m512 even[MR], odd[MR];
    for (int m = 0; m < MR; m++) even[m] = odd[m] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
        if (MR > 1) {  // with one row the loads themselves are far enough ahead, and prefetches cost a quarter of the pace
            __builtin_prefetch(w + k + 512);
            __builtin_prefetch(w + k + 8192, 0, 2);
        }
        const __m512 v0 = W::sixteen(w + k), v1 = W::sixteen(w + k + 16);
        for (int m = 0; m < MR; m++) {
            even[m] = _mm512_fmadd_ps(v0, _mm512_loadu_ps(x + m * K + k), even[m]);
            odd[m] = _mm512_fmadd_ps(v1, _mm512_loadu_ps(x + m * K + k + 16), odd[m]);
        }
    }
    for (int m = 0; m < MR; m++) {
        float sum = _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m]));
        for (int64_t i = k; i < K; i++) sum = std::fma(W::one(w[i]), x[m * K + i], sum);
        out[m] = sum;
    }
}

#endif

template <class W>
void rows(const typename W::Type* w, const float* x, float* out, int64_t M, int64_t K) {
#if REQAT_X86
    if (isa() >= AVX512) {
        if (M == 4) return rows_avx512<W, 4>(w, x, out, K);
        if (M == 3) return rows_avx512<W, 3>(w, x, out, K);
        if (M == 2) return rows_avx512<W, 2>(w, x, out, K);
        return rows_avx512<W, 1>(w, x, out, K);
    }
    if (isa() >= AVX2) {
        if (M == 4) return rows_avx2<W, 4>(w, x, out, K);
        if (M == 3) return rows_avx2<W, 3>(w, x, out, K);
        if (M == 2) return rows_avx2<W, 2>(w, x, out, K);
        return rows_avx2<W, 1>(w, x, out, K);
    }
#endif
    rows_portable<W>(w, x, out, M, K);
}

// Call function(n, m, count) for each row n of w with each piece of up to ROWS rows of x, from row m on.
template <class Function>
void by_pieces(int64_t M, int64_t N, int threads, const Function& function) {
    together(threads, [&](const Team& team) {
        team.each(N, [&](int64_t n) {
            for (int64_t m = 0; m < M; m += ROWS) function(n, m, M - m < ROWS ? M - m : ROWS);
        });
    });
}

// scale: of each row of w, or null.
template <class W>
void product(const typename W::Type* w, const float* scale, const float* x, float* y, int64_t M, int64_t N, int64_t K,
             int threads) {
    by_pieces(M, N, threads, [&](int64_t n, int64_t m, int64_t count) {
        float out[ROWS];
        rows<W>(w + n * K, x + m * K, out, count, K);
        for (int64_t i = 0; i < count; i++) y[(m + i) * N + n] = scale ? out[i] * scale[n] : out[i];
    });
}

// Integer sums of products of w [K] with rows of x: |sum| <= 128 * 127 * K stays inside 32 bits for K <= 2^17.
void dots_portable(const int8_t* w, const int8_t* x, int32_t* out, int64_t M, int64_t first, int64_t K) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = first; k < K; k++) out[m] += int32_t(w[k]) * int32_t(x[m * K + k]);
}

#if REQAT_X86

REQAT_AVX2 inline __m256i words(const int8_t* bytes) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

template <int MR>
REQAT_AVX2 void dots_avx2(const int8_t* w, const int8_t* x, int32_t* out, int64_t K) {
    __m256i acc[MR];
    for (int m = 0; m < MR; m++) acc[m] = _mm256_setzero_si256();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        const __m256i v = words(w + k);
        for (int m = 0; m < MR; m++) acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(v, words(x + m * K + k)));
    }
    for (int m = 0; m < MR; m++) {
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), acc[m]);
        out[m] = 0;
        for (int32_t lane : lanes) out[m] += lane;
    }
    dots_portable(w, x, out, MR, k, K);
}

template <int MR>
REQAT_AVX512 void dots_avx512(const int8_t* w, const int8_t* x, int32_t* out, int64_t K) {
    __m512i acc[MR];
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
        const __m512i v = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k)));
        for (int m = 0; m < MR; m++) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + m * K + k));
            acc[m] = _mm512_dpwssd_epi32(acc[m], v, _mm512_cvtepi8_epi16(bytes));
        }
    }
    for (int m = 0; m < MR; m++) out[m] = _mm512_reduce_add_epi32(acc[m]);
    dots_portable(w, x, out, MR, k, K);
}

#endif

void dots(const int8_t* w, const int8_t* x, int32_t* out, int64_t M, int64_t K) {
#if REQAT_X86
    if (isa() >= AVX512) {
        if (M == 4) return dots_avx512<4>(w, x, out, K);
        if (M == 3) return dots_avx512<3>(w, x, out, K);
        if (M == 2) return dots_avx512<2>(w, x, out, K);
        return dots_avx512<1>(w, x, out, K);
    }
    if (isa() >= AVX2) {
        if (M == 4) return dots_avx2<4>(w, x, out, K);
        if (M == 3) return dots_avx2<3>(w, x, out, K);
        if (M == 2) return dots_avx2<2>(w, x, out, K);
        return dots_avx2<1>(w, x, out, K);
    }
#endif
    for (int64_t m = 0; m < M; m++) out[m] = 0;
    dots_portable(w, x, out, M, 0, K);
}

}  // namespace
}  // namespace reqat

// w: bfloat16 [N, K], x: float32 [M, K], y: float32 [M, N], all contiguous.
REQAT_API void reqat_dense_bf16(const uint16_t* w, const float* x, float* y, int64_t M, int64_t N, int64_t K,
                                int threads) {
    reqat::product<reqat::Bf16>(w, nullptr, x, y, M, N, K, threads);
}

// The same with w float32 [N, K].
REQAT_API void reqat_dense_f32(const float* w, const float* x, float* y, int64_t M, int64_t N, int64_t K, int threads) {
    reqat::product<reqat::F32>(w, nullptr, x, y, M, N, K, threads);
}

// The same with w int8 [N, K] and the scale [N] of its rows.
REQAT_API void reqat_dense_int8(const int8_t* w, const float* scale, const float* x, float* y, int64_t M, int64_t N,
                                int64_t K, int threads) {
    reqat::product<reqat::Int8>(w, scale, x, y, M, N, K, threads);
}

// The same with x int8 [M, K] and the scale [M] of its rows.
REQAT_API void reqat_dense_int8_a8(const int8_t* w, const float* scale, const int8_t* x, const float* row_scale,
                                   float* y, int64_t M, int64_t N, int64_t K, int threads) {
    using namespace reqat;
    by_pieces(M, N, threads, [&](int64_t n, int64_t m, int64_t count) {
        int32_t sums[ROWS];
        dots(w + n * K, x + m * K, sums, count, K);
        for (int64_t i = 0; i < count; i++) y[(m + i) * N + n] = float(sums[i]) * (scale[n] * row_scale[m + i]);
    });
}
