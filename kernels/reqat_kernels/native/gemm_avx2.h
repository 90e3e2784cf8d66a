// The kernels of gemm.cpp, which includes this file, with AVX2, and with AVX-VNNI for integers: a tile is two registers
// of eight rows.
#pragma once

#include "common.h"
#include "gemm.h"
#include "gemm_rows.h"

#if REQAT_X86

namespace reqat {
namespace {

template <int KIND>
REQAT_AVX2 inline __m256 scales8(const uint8_t* bytes) {
    const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    if (KIND == 0) return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 20)), _mm256_set1_ps(0x1p120f));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(bits, 23), _mm256_set1_epi32(0x400000)));
}

// Add to acc the products of BLOCKS blocks from b on, in the first PARTS registers of the tile. A sum waits four cycles
// for each of its columns, so there have to be several.
template <int MR, int KIND, int PARTS, int BLOCKS>
REQAT_AVX2 inline void float_blocks(const uint8_t* codes, const uint8_t* scales, const float* x, __m256i table, int64_t b,
                                    __m256 (&acc)[PARTS][MR]) {
    constexpr int PER = KIND == 0 ? 1 : 2;
    const __m256i low = _mm256_set1_epi8(15);
    __m256 block[BLOCKS][PARTS][MR];
    for (auto& parts : block)
        for (auto& rows : parts)
            for (auto& sum : rows) sum = _mm256_setzero_ps();
    for (int s = 0; s < 2 * PER; s++)  // loads of eight columns
        for (int i = 0; i < BLOCKS; i++) {
            const int64_t load = (b + i) * PER * 2 + s;
            const uint8_t* at = codes + load * (STEP_BYTES / 2);
            if (PARTS == 2) __builtin_prefetch(at + 4096);
            for (int half = 0; half < 2; half++)
                for (int p = 0; p < PARTS; p++) {
                    __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * p));
                    if (half) packed = _mm256_srli_epi16(packed, 4);
                    const __m256i bytes = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
                    const __m256i columns[4] = {_mm256_slli_epi32(bytes, 24), _mm256_slli_epi32(bytes, 16),
                                                _mm256_slli_epi32(bytes, 8), bytes};
                    for (int c = 0; c < 4; c++) {
                        const __m256 v = _mm256_cvtepi32_ps(_mm256_srai_epi32(columns[c], 24));
                        for (int m = 0; m < MR; m++) {
                            const float* xs = x + (load / 2 * MR + m) * STEP + load % 2 * 8 + 4 * half;
                            block[i][p][m] = _mm256_fmadd_ps(v, _mm256_set1_ps(xs[c]), block[i][p][m]);
                        }
                    }
                }
        }
    for (int i = 0; i < BLOCKS; i++)
        for (int p = 0; p < PARTS; p++) {
            const __m256 sw = scales8<KIND>(scales + (b + i) * LANES + 8 * p);
            for (int m = 0; m < MR; m++) acc[p][m] = _mm256_fmadd_ps(block[i][p][m], sw, acc[p][m]);
        }
}

template <int MR, int KIND>
REQAT_AVX2 void float_tile_avx2(const Weight& w, const float* x, int64_t tile, float* out) {
    constexpr int PARTS = MR <= 2 ? 2 : 1, BLOCKS = MR == 1 ? 2 : 1;
    const int64_t blocks = w.steps * STEP / w.block;
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values)));
    for (int first = 0; first < 2; first += PARTS) {
        const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES + 32 * first;
        const uint8_t* scales = w.scales + tile * blocks * LANES + 8 * first;
        __m256 acc[PARTS][MR];
        for (auto& rows : acc)
            for (auto& sum : rows) sum = _mm256_setzero_ps();
        int64_t b = 0;
        for (; b + BLOCKS <= blocks; b += BLOCKS)
            float_blocks<MR, KIND, PARTS, BLOCKS>(codes, scales, x, table, b, acc);
        for (; b < blocks; b++) float_blocks<MR, KIND, PARTS, 1>(codes, scales, x, table, b, acc);
        for (int p = 0; p < PARTS; p++)
            for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * LANES + 8 * (first + p), acc[p][m]);
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
