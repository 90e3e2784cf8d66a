// The integer kernel of registers of 256 bits. gemm_avx2.h includes this file once an instruction set: REQAT_VARIANT
// names it, REQAT_TARGET is its attribute, and REQAT_VNNI says whether it multiplies and adds bytes in one instruction.

namespace reqat {
namespace {
namespace REQAT_VARIANT {

// acc += dot products of four unsigned bytes of w with four signed ones of x, in each lane.
REQAT_TARGET inline __m256i dot_int8(__m256i acc, __m256i w, __m256i x) {
#if REQAT_VNNI
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
    // Two products of at most 28 * 128 stay far inside 16 bits.
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}

template <int MR, int KIND>
REQAT_TARGET void int_tile(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, int64_t tile,
                           float* out) {
    const int64_t blocks = w.steps * STEP / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    alignas(16) uint8_t shifted[16];
    for (int i = 0; i < 16; i++) shifted[i] = uint8_t(w.values[i] + OFFSET);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(shifted)));
    const __m256i low = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; half++) {
        __m256 acc[MR];
        for (int m = 0; m < MR; m++) acc[m] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; b++) {
            const __m256 sw = scales8<KIND>(scales + b * LANES + 8 * half);
            __m256i dot[MR];
            for (int m = 0; m < MR; m++) dot[m] = _mm256_set1_epi32(start[b * MR + m]);
            for (int s = 0; s < per; s++)
                for (int l = 0; l < 2; l++) {
                    const int64_t step = b * per + s;
                    const __m256i packed = _mm256_loadu_si256(
                        reinterpret_cast<const __m256i*>(codes + step * STEP_BYTES + 64 * l + 32 * half));
                    const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
                    const __m256i c = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
                    for (int m = 0; m < MR; m++) {
                        int32_t x0, x1;
                        std::memcpy(&x0, x + (step * MR + m) * STEP + 8 * l, 4);
                        std::memcpy(&x1, x + (step * MR + m) * STEP + 8 * l + 4, 4);
                        dot[m] = dot_int8(dot[m], a, _mm256_set1_epi32(x0));
                        dot[m] = dot_int8(dot[m], c, _mm256_set1_epi32(x1));
                    }
                }
            for (int m = 0; m < MR; m++) {
                const __m256 scale = scale_x ? _mm256_mul_ps(sw, _mm256_set1_ps(scale_x[b * MR + m])) : sw;
                acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m]), scale, acc[m]);
            }
        }
        for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * LANES + 8 * half, acc[m]);
    }
}

}  // namespace REQAT_VARIANT
}  // namespace
}  // namespace reqat
