// The kernels of gemm.cpp, which includes this file, with AVX2, and with AVX-VNNI for integers: a tile is two registers
// of eight rows.
#pragma once

#include "common.h"
#include "gemm.h"

#if REQAT_X86

namespace reqat {
namespace {

template <int KIND>
REQAT_AVX2 inline __m256 scales8(const uint8_t* bytes) {
    const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    if (KIND == 0) return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 20)), _mm256_set1_ps(0x1p120f));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(bits, 23), _mm256_set1_epi32(0x400000)));
}

template <int MR, int KIND>
REQAT_AVX2 void float_tile_avx2(const Weight& w, const float* x, int64_t tile, float* out) {
    const int64_t blocks = w.steps * STEP / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    float lower[8], upper[8];
    for (int i = 0; i < 8; i++) lower[i] = w.values[i], upper[i] = w.values[i + 8];
    const __m256 table0 = _mm256_loadu_ps(lower), table1 = _mm256_loadu_ps(upper);
    for (int half = 0; half < 2; half++) {
        __m256 acc[MR];
        for (int m = 0; m < MR; m++) acc[m] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; b++) {
            __m256 block[MR];
            for (int m = 0; m < MR; m++) block[m] = _mm256_setzero_ps();
            for (int s = 0; s < per; s++)
                for (int l = 0; l < 2; l++) {
                    const int64_t step = b * per + s;
                    const __m256i packed = _mm256_loadu_si256(
                        reinterpret_cast<const __m256i*>(codes + step * STEP_BYTES + 64 * l + 32 * half));
                    for (int c = 0; c < 8; c++) {  // column 8 l + c: byte c % 4, its low nibble for c < 4
                        const __m256i code = _mm256_srl_epi32(packed, _mm_cvtsi32_si128(8 * (c % 4) + (c < 4 ? 0 : 4)));
                        const __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
                        const __m256 v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table0, code),
                                                          _mm256_permutevar8x32_ps(table1, code), is_upper);
                        for (int m = 0; m < MR; m++)
                            block[m] = _mm256_fmadd_ps(v, _mm256_set1_ps(x[(step * MR + m) * STEP + 8 * l + c]), block[m]);
                    }
                }
            const __m256 sw = scales8<KIND>(scales + b * LANES + 8 * half);
            for (int m = 0; m < MR; m++) acc[m] = _mm256_fmadd_ps(block[m], sw, acc[m]);
        }
        for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * LANES + 8 * half, acc[m]);
    }
}

}  // namespace
}  // namespace reqat

#define REQAT_VARIANT avx2
#define REQAT_TARGET REQAT_AVX2
#define REQAT_VNNI 0
#include "gemm_int256.h"
#undef REQAT_VARIANT
#undef REQAT_TARGET
#undef REQAT_VNNI

#if defined(REQAT_AVXVNNI)
#define REQAT_VARIANT avxvnni
#define REQAT_TARGET REQAT_AVXVNNI
#define REQAT_VNNI 1
#include "gemm_int256.h"
#undef REQAT_VARIANT
#undef REQAT_TARGET
#undef REQAT_VNNI
#endif

#endif
