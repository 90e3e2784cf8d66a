// y = x W^T with W in bfloat16, for the few rows of x that decoding has: the output head, which is never quantized.
//
// Reads the weight once, at the speed of memory; torch's own bfloat16 product takes two to three times as long for one
// row. Products and sums are float32: x is not rounded.

#include <cmath>

#include "common.h"

namespace reqat {
namespace {

constexpr int64_t ROWS = 4;  // rows of x at a time

void rows_portable(const uint16_t* w, const float* x, float* out, int64_t M, int64_t K) {
    for (int64_t m = 0; m < M; m++) {
        float sum = 0;
        for (int64_t k = 0; k < K; k++) sum = std::fma(bf16_to_float(w[k]), x[m * K + k], sum);
        out[m] = sum;
    }
}

#if REQAT_X86

template <int MR>
REQAT_AVX2 void rows_avx2(const uint16_t* w, const float* x, float* out, int64_t K) {
    __m256 acc[MR];
    for (int m = 0; m < MR; m++) acc[m] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= K; k += 8) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k)));
        const __m256 v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
        for (int m = 0; m < MR; m++) acc[m] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + m * K + k), acc[m]);
    }
    for (int m = 0; m < MR; m++) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, acc[m]);
        float sum = 0;
        for (float lane : lanes) sum += lane;
        for (int64_t i = k; i < K; i++) sum = std::fma(bf16_to_float(w[i]), x[m * K + i], sum);
        out[m] = sum;
    }
}

template <int MR>
REQAT_AVX512 void rows_avx512(const uint16_t* w, const float* x, float* out, int64_t K) {
    __m512 even[MR], odd[MR];  // two chains: one alone would wait for its own additions
    for (int m = 0; m < MR; m++) even[m] = odd[m] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
        if (MR > 1) {  // with one row the loads themselves are far enough ahead, and prefetches cost a quarter of the pace
            __builtin_prefetch(w + k + 512);
            __builtin_prefetch(w + k + 8192, 0, 2);
        }
        const __m512i b0 = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k)));
        const __m512i b1 = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k + 16)));
        const __m512 v0 = _mm512_castsi512_ps(_mm512_slli_epi32(b0, 16));
        const __m512 v1 = _mm512_castsi512_ps(_mm512_slli_epi32(b1, 16));
        for (int m = 0; m < MR; m++) {
            even[m] = _mm512_fmadd_ps(v0, _mm512_loadu_ps(x + m * K + k), even[m]);
            odd[m] = _mm512_fmadd_ps(v1, _mm512_loadu_ps(x + m * K + k + 16), odd[m]);
        }
    }
    for (int m = 0; m < MR; m++) {
        float sum = _mm512_reduce_add_ps(_mm512_add_ps(even[m], odd[m]));
        for (int64_t i = k; i < K; i++) sum = std::fma(bf16_to_float(w[i]), x[m * K + i], sum);
        out[m] = sum;
    }
}

#endif

void rows(const uint16_t* w, const float* x, float* out, int64_t M, int64_t K) {
#if REQAT_X86
    if (isa() >= AVX512) {
        if (M == 4) return rows_avx512<4>(w, x, out, K);
        if (M == 3) return rows_avx512<3>(w, x, out, K);
        if (M == 2) return rows_avx512<2>(w, x, out, K);
        return rows_avx512<1>(w, x, out, K);
    }
    if (isa() >= AVX2) {
        if (M == 4) return rows_avx2<4>(w, x, out, K);
        if (M == 3) return rows_avx2<3>(w, x, out, K);
        if (M == 2) return rows_avx2<2>(w, x, out, K);
        return rows_avx2<1>(w, x, out, K);
    }
#endif
    rows_portable(w, x, out, M, K);
}

}  // namespace
}  // namespace reqat

// w: bfloat16 [N, K], x: float32 [M, K], y: float32 [M, N], all contiguous.
REQAT_API void reqat_dense_bf16(const uint16_t* w, const float* x, float* y, int64_t M, int64_t N, int64_t K,
                                int threads) {
    using namespace reqat;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FloatMode mode;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            for (int64_t m = 0; m < M; m += ROWS) {
                const int64_t count = M - m < ROWS ? M - m : ROWS;
                float out[ROWS];
                rows(w + n * K, x + m * K, out, count, K);
                for (int64_t i = 0; i < count; i++) y[(m + i) * N + n] = out[i];
            }
    }
}
