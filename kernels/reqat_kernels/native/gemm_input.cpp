// Rounding the inputs of the products in integers (gemm.h): to FP4 as a format says, or to int8 by rows.

#include "common.h"
#include "gemm.h"

namespace reqat {
namespace {

// start [K / block] = -OFFSET times the sums of x [K] over blocks.
void block_starts_portable(const int8_t* x, int64_t K, int32_t block, int32_t* start) {
    for (int64_t b = 0; b < K / block; b++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < block; i++) sum += x[b * block + i];
        start[b] = -OFFSET * sum;
    }
}

#if REQAT_X86

// The same for blocks of 16 or 32.
REQAT_AVX512 void block_starts_avx512(const int8_t* x, int64_t K, int32_t block, int32_t* start) {
    const int64_t blocks = K / block;
    const int each = 64 / block;
    const __m512i offset = _mm512_set1_epi8(OFFSET);
    for (int64_t b = 0; b < blocks; b += each) {
        const int64_t left = K - b * block;
        const __mmask64 some = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, _mm512_maskz_loadu_epi8(some, x + b * block));
        sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_CDAB));  // of 8
        sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));  // of 16, in every lane of four
        if (block == 32) sums = _mm512_add_epi32(sums, _mm512_shuffle_i32x4(sums, sums, 0xB1));
        sums = _mm512_sub_epi32(_mm512_setzero_si512(), sums);
        const __mmask16 firsts = __mmask16(block == 32 ? 0x0101 : 0x1111);
        const int64_t count = blocks - b < each ? blocks - b : each;
        _mm512_mask_storeu_epi32(start + b, __mmask16((1u << count) - 1), _mm512_maskz_compress_epi32(firsts, sums));
    }
}

#endif

void block_starts(const int8_t* x, int64_t K, int32_t block, int32_t* start) {
#if REQAT_X86
    if (isa() >= AVX512 && (block == 16 || block == 32)) return block_starts_avx512(x, K, block, start);
#endif
    block_starts_portable(x, K, block, start);
}

REQAT_CLONES uint32_t largest_bits(const float* x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7FFFFFFF;
        top = bits > top ? bits : top;
    }
    return top;
}

// Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits. (amax / scale may be 127 and a bit.)
REQAT_CLONES void round_to_int8(const float* x, int64_t n, float scale, int8_t* out) {
    for (int64_t i = 0; i < n; i++) out[i] = int8_t(int32_t(float_to_bits(x[i] / scale + 0x1.8p23f)) - 0x4B400000);
}

}  // namespace

bool fp4_rows(const Spec& format, const float* x, int64_t M, int64_t K, float g, int8_t* values, int32_t* start,
              float* scale) {
    const int64_t blocks = K / format.block;
    for (int64_t m = 0; m < M; m++) {
        if (format.global_scale == ROW) {
            const int32_t top = amax_bits(x + m * K, DTYPE_F32, K);
            if (top >= 0x7F800000) return false;
            g = global_scale_of(format, bits_to_float(uint32_t(top)));
        }
        RowOut out;
        out.doubled = values + m * K;
        out.effective = scale + m * blocks;
        if (!quantize_row(format, x + m * K, DTYPE_F32, K, g, out)) return false;
        block_starts(values + m * K, K, format.block, start + m * blocks);
    }
    for (int64_t i = 0; i < M * blocks; i++) scale[i] *= 0.5f;
    return true;
}

bool fp4_input(const Spec& format, const float* x, int64_t M, int64_t K, float g, int8_t* values, int32_t* start,
               float* scale) {
    if (format.global_scale == DYNAMIC) {
        const int32_t top = amax_bits(x, DTYPE_F32, M * K);
        if (top >= 0x7F800000) return false;
        g = global_scale_of(format, bits_to_float(uint32_t(top)));
    }
    return fp4_rows(format, x, M, K, g, values, start, scale);
}

bool int8_input(const float* x, int64_t M, int64_t K, int64_t padded, int32_t block, int8_t* values, int32_t* start,
                float* row_scale) {
    for (int64_t m = 0; m < M; m++) {
        const uint32_t top = largest_bits(x + m * K, K);
        if (top >= 0x7F800000) return false;
        const float scale = top ? bits_to_float(top) / 127.0f : 1.0f;
        int8_t* out = values + m * padded;
        round_to_int8(x + m * K, K, scale, out);
        for (int64_t k = K; k < padded; k++) out[k] = 0;
        block_starts(out, padded, block, start + m * (padded / block));
        row_scale[m] = scale;
    }
    return true;
}

}  // namespace reqat

using namespace reqat;

REQAT_API int reqat_fp4_input(const Spec* format, const float* x, int64_t M, int64_t K, float g, int8_t* values,
                              int32_t* start, float* scale) {
    return in_float_mode([&] { return int(fp4_input(*format, x, M, K, g, values, start, scale)); });
}

REQAT_API int reqat_int8_input(const float* x, int64_t M, int64_t K, int64_t padded, int32_t block, int8_t* values,
                               int32_t* start, float* row_scale) {
    return in_float_mode([&] { return int(int8_input(x, M, K, padded, block, values, start, row_scale)); });
}
