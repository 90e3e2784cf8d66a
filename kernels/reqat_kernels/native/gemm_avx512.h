// The kernels of gemm.cpp with AVX-512, which includes this file: a register holds four columns of all 16 rows.
#pragma once

#include "common.h"
#include "gemm.h"
#include "gemm_rows.h"

#if REQAT_X86

namespace reqat {
namespace {

// acc += dot products of a word of x with each lane of w. In assembly because the load has to be part of the
// instruction: as compilers split it, 16 rows of weights and 8 of x take 82 cycles a block of 32 instead of 72.
// (The address sanitizer looks only at loads that the compiler makes.)
REQAT_AVX512 inline __m512i dot_int8(__m512i acc, __m512i w, const Word* x) {
#if defined(__SANITIZE_ADDRESS__)
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(*x));
#else
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*x));
    return acc;
#endif
}

REQAT_AVX512 inline __m512 dot_bf16(__m512 acc, __m512i w, const Word* x) {
#if defined(__SANITIZE_ADDRESS__)
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*x));
#else
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*x));
    return acc;
#endif
}

template <int KIND>
REQAT_AVX512 inline __m512 scales16(const uint8_t* bytes) {
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    if (KIND == 0) return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 20)), _mm512_set1_ps(0x1p120f));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(bits, 23), _mm512_set1_epi32(0x400000)));
}

template <int MR, int KIND, bool BLOCKS>
REQAT_AVX512 void int_tile_avx512(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x,
                                  int64_t tile, float* out) {
    constexpr int PER = KIND == 0 ? 1 : 2;
    const Ahead ahead = ahead_of(INTEGERS, MR);
    const int64_t blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    const __m512i table =
        _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values))),
                        _mm512_set1_epi8(OFFSET));
    __m512 acc[MR];
#pragma GCC unroll 8  // or the compiler clears an array in memory as well
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512i dot[MR];
        for (int m = 0; m < MR; m++) dot[m] = _mm512_set1_epi32(start[b * MR + m]);
        for (int s = 0; s < PER; s++) {
            const int64_t step = b * PER + s;
            const uint8_t* at = codes + step * STEP_BYTES;
            const __m512i p0 = _mm512_loadu_si512(at), p1 = _mm512_loadu_si512(at + 64);
            prefetch_step<PER>(ahead, at, scales + b * LANES, step);
            // vpermb looks at six bits of an index, and the table repeats every 16 entries: what the other nibble leaves
            // above the code does no harm.
            const __m512i values[4] = {_mm512_permutexvar_epi8(p0, table),
                                       _mm512_permutexvar_epi8(_mm512_srli_epi16(p0, 4), table),
                                       _mm512_permutexvar_epi8(p1, table),
                                       _mm512_permutexvar_epi8(_mm512_srli_epi16(p1, 4), table)};
            for (int m = 0; m < MR; m++) {
                const Word* xs = reinterpret_cast<const Word*>(x + (step * MR + m) * STEP);
                for (int j = 0; j < 4; j++) dot[m] = dot_int8(dot[m], values[j], xs + j);
            }
        }
        const __m512 sw = scales16<KIND>(scales + b * LANES);
        for (int m = 0; m < MR; m++) {
            const __m512 scale = BLOCKS ? _mm512_mul_ps(sw, _mm512_set1_ps(scale_x[b * MR + m])) : sw;
            acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), scale, acc[m]);
        }
    }
    for (int m = 0; m < MR; m++) _mm512_storeu_ps(out + m * LANES, acc[m]);
}

template <int MR, int KIND>
REQAT_AVX512 void float_tile_avx512(const Weight& w, const float* x, int64_t tile, float* out) {
    constexpr int PER = KIND == 0 ? 1 : 2;
    const int64_t blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    alignas(64) float values[16];
    for (int i = 0; i < 16; i++) values[i] = w.values[i];
    const __m512 table = _mm512_load_ps(values);
    __m512 acc[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512 block[MR];
        for (int m = 0; m < MR; m++) block[m] = _mm512_setzero_ps();
        for (int s = 0; s < PER; s++) {
            const int64_t step = b * PER + s;
            for (int l = 0; l < 2; l++) {
                const uint8_t* at = codes + step * STEP_BYTES + 64 * l;
                const __m512i packed = _mm512_loadu_si512(at);
                if (MR <= 2) _mm_prefetch(reinterpret_cast<const char*>(at + 4096), _MM_HINT_T0);
                const float* xs = x + step * MR * STEP + 8 * l;
                // vpermps looks at four bits of an index.
#define REQAT_COLUMN(c, shift)                                                                      \
    {                                                                                               \
        const __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, shift), table);            \
        for (int m = 0; m < MR; m++) block[m] = _mm512_fmadd_ps(v, _mm512_set1_ps(xs[m * STEP + c]), block[m]); \
    }
                REQAT_COLUMN(0, 0)
                REQAT_COLUMN(1, 8)
                REQAT_COLUMN(2, 16)
                REQAT_COLUMN(3, 24)
                REQAT_COLUMN(4, 4)
                REQAT_COLUMN(5, 12)
                REQAT_COLUMN(6, 20)
                REQAT_COLUMN(7, 28)
#undef REQAT_COLUMN
            }
        }
        const __m512 sw = scales16<KIND>(scales + b * LANES);
        for (int m = 0; m < MR; m++) acc[m] = _mm512_fmadd_ps(block[m], sw, acc[m]);
    }
    for (int m = 0; m < MR; m++) _mm512_storeu_ps(out + m * LANES, acc[m]);
}

// x: pairs of bfloat16 in the order of paired().
template <int MR, int KIND>
REQAT_AVX512 void bf16_tile_avx512(const Weight& w, const uint32_t* x, int64_t tile, float* out) {
    constexpr int PER = KIND == 0 ? 1 : 2;
    const Ahead ahead = ahead_of(BFLOAT16, MR);
    const int64_t blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = float_to_bf16(float(w.values[i & 15]));
    const __m512i table = _mm512_load_si512(values);
    __m512 acc[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512 block[MR];
        for (int m = 0; m < MR; m++) block[m] = _mm512_setzero_ps();
        for (int s = 0; s < PER; s++) {
            const int64_t step = b * PER + s;
            prefetch_step<PER>(ahead, codes + step * STEP_BYTES, scales + b * LANES, step);
            for (int l = 0; l < 2; l++) {
                const uint8_t* at = codes + step * STEP_BYTES + 64 * l;
                const __m512i packed = _mm512_loadu_si512(at);
                // vpermw looks at five bits of an index, and the table repeats after four.
                const __m512i v[4] = {_mm512_permutexvar_epi16(packed, table),
                                      _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table),
                                      _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table),
                                      _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table)};
                for (int m = 0; m < MR; m++) {
                    const Word* xs = reinterpret_cast<const Word*>(x + (step * MR + m) * (STEP / 2)) + 4 * l;
                    for (int j = 0; j < 4; j++) block[m] = dot_bf16(block[m], v[j], xs + j);
                }
            }
        }
        const __m512 sw = scales16<KIND>(scales + b * LANES);
        for (int m = 0; m < MR; m++) acc[m] = _mm512_fmadd_ps(block[m], sw, acc[m]);
    }
    for (int m = 0; m < MR; m++) _mm512_storeu_ps(out + m * LANES, acc[m]);
}

// Nibble j of a lane's two 16-bit halves belongs to these two columns of a load.
constexpr int PAIRS[4][2] = {{0, 2}, {4, 6}, {1, 3}, {5, 7}};

void paired(const uint16_t* x, int64_t columns, uint32_t* out) {
    for (int64_t load = 0; load < columns / 8; load++)
        for (int j = 0; j < 4; j++)
            out[4 * load + j] = x[8 * load + PAIRS[j][0]] | uint32_t(x[8 * load + PAIRS[j][1]]) << 16;
}

template <int ROWS>
REQAT_AVX512 void store_avx512(const Weight& w, int64_t tile, const float* out, const float* row_scale,
                               const float* bias, float* y, int64_t stride_y) {
    const int64_t first = tile * LANES, count = w.rows - first < LANES ? w.rows - first : LANES;
    const __mmask16 mask = __mmask16((1u << count) - 1);
    for (int m = 0; m < ROWS; m++, out += LANES) {
        const float alpha = float(w.alpha);
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(out), _mm512_set1_ps(row_scale ? alpha * row_scale[m] : alpha));
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + first));
        _mm512_mask_storeu_ps(y + m * stride_y + first, mask, value);
    }
}

}  // namespace
}  // namespace reqat

#endif
