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

// The values of four neighbouring columns of eight rows, whose codes stand in the low nibbles of `codes`: out[c] has
// those of column c, a lane a row.
REQAT_AVX2 inline void four_columns(__m256i codes, __m256i table, __m256* out) {
    const __m256i bytes = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
    const __m256i tops[4] = {_mm256_slli_epi32(bytes, 24), _mm256_slli_epi32(bytes, 16), _mm256_slli_epi32(bytes, 8),
                             bytes};
    for (int c = 0; c < 4; c++) out[c] = _mm256_cvtepi32_ps(_mm256_srai_epi32(tops[c], 24));
}

// Add to acc the products of BLOCKS blocks from b on, in the first PARTS registers of the tile. A sum waits four cycles
// for each of its columns, so there have to be several.
template <int MR, int KIND, int PARTS, int BLOCKS>
REQAT_AVX2 inline void float_blocks(const uint8_t* codes, const uint8_t* scales, const float* x, __m256i table, int64_t b,
                                    __m256 (&acc)[PARTS][MR]) {
    constexpr int PER = KIND == 0 ? 1 : 2;
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
                    __m256 values[4];
                    four_columns(packed, table, values);
                    for (int c = 0; c < 4; c++)
                        for (int m = 0; m < MR; m++) {
                            const float* xs = x + (load / 2 * MR + m) * STEP + load % 2 * 8 + 4 * half;
                            block[i][p][m] = _mm256_fmadd_ps(values[c], _mm256_set1_ps(xs[c]), block[i][p][m]);
                        }
                }
        }
    for (int i = 0; i < BLOCKS; i++)
        for (int p = 0; p < PARTS; p++) {
            const __m256 sw = scales8<KIND>(scales + (b + i) * LANES + 8 * p);
            for (int m = 0; m < MR; m++) acc[p][m] = _mm256_fmadd_ps(block[i][p][m], sw, acc[p][m]);
        }
}

// For up to four rows of x: each pass decodes the weights anew, and sums stay in registers.
template <int MR, int KIND>
REQAT_AVX2 void few_rows(const Weight& w, const float* x, int64_t tile, float* out) {
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

// The values of eight columns, which begin at `at`, of all 16 rows of a tile: out [8, 16].
REQAT_AVX2 inline void decode_load(const uint8_t* at, __m256i table, float* out) {
    for (int p = 0; p < 2; p++) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * p));
        for (int half = 0; half < 2; half++) {
            __m256 values[4];
            four_columns(half ? _mm256_srli_epi16(packed, 4) : packed, table, values);
            for (int c = 0; c < 4; c++) _mm256_store_ps(out + (4 * half + c) * LANES + 8 * p, values[c]);
        }
    }
}

// For many rows of x: a block of weights is decoded once for all of them, and the sums are kept in `out`, which is
// aligned to a cache line.
template <int MR, int KIND>
REQAT_AVX2 void many_rows(const Weight& w, const float* x, int64_t tile, float* out) {
    constexpr int PER = KIND == 0 ? 1 : 2, SIDE_BY_SIDE = 4;
    const int64_t blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values)));
    alignas(32) float values[PER * STEP * LANES];
    std::memset(out, 0, MR * LANES * sizeof(float));
    for (int64_t b = 0; b < blocks; b++) {
        for (int load = 0; load < 2 * PER; load++)
            decode_load(codes + (b * PER * 2 + load) * (STEP_BYTES / 2), table, values + load * 8 * LANES);
        const __m256 scale[2] = {scales8<KIND>(scales + b * LANES), scales8<KIND>(scales + b * LANES + 8)};
        for (int first = 0; first < MR; first += SIDE_BY_SIDE) {
            __m256 sums[SIDE_BY_SIDE][2];
            for (auto& parts : sums) parts[0] = parts[1] = _mm256_setzero_ps();
            for (int s = 0; s < PER; s++) {
                const float* xs = x + ((b * PER + s) * MR + first) * STEP;
                for (int c = 0; c < STEP; c++) {
                    const float* column = values + (s * STEP + c) * LANES;
                    const __m256 v0 = _mm256_load_ps(column), v1 = _mm256_load_ps(column + 8);
                    for (int m = 0; m < SIDE_BY_SIDE; m++) {
                        const __m256 one = _mm256_set1_ps(xs[m * STEP + c]);
                        sums[m][0] = _mm256_fmadd_ps(v0, one, sums[m][0]);
                        sums[m][1] = _mm256_fmadd_ps(v1, one, sums[m][1]);
                    }
                }
            }
            for (int m = 0; m < SIDE_BY_SIDE; m++)
                for (int p = 0; p < 2; p++) {
                    float* at = out + (first + m) * LANES + 8 * p;
                    _mm256_store_ps(at, _mm256_fmadd_ps(sums[m][p], scale[p], _mm256_load_ps(at)));
                }
        }
    }
}

template <int MR, int KIND>
REQAT_AVX2 void float_tile_avx2(const Weight& w, const float* x, int64_t tile, float* out) {
    if constexpr (MR > 4)
        many_rows<MR, KIND>(w, x, tile, out);
    else
        few_rows<MR, KIND>(w, x, tile, out);
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
