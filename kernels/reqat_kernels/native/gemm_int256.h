// The integer kernel of registers of 256 bits. gemm_avx2.h includes this file once an instruction set: REQAT_VARIANT
// names it, REQAT_TARGET is its attribute, and REQAT_VNNI says whether it multiplies and adds bytes in one instruction.
//
// A register holds four columns of eight rows, so a tile is two. With one or two rows of x both are computed in one pass
// over the codes, whole lines as memory delivers them; with more, registers are too few, and the second pass finds the
// tile in the first or second cache.

namespace reqat {
namespace {
namespace REQAT_VARIANT {

// acc += dot products of a step's 16 columns (w, four of them a register) with x, in each lane.
REQAT_TARGET inline __m256i dot_step(__m256i acc, const __m256i* w, const Word* x) {
#if REQAT_VNNI
    for (int j = 0; j < 4; j++) acc = _mm256_dpbusd_avx_epi32(acc, w[j], _mm256_set1_epi32(x[j]));
    return acc;
#else
    // Eight products of at most 28 * 128 in a lane of 16 bits: 28672 at most.
    const __m256i a = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(x[0]));
    const __m256i b = _mm256_maddubs_epi16(w[1], _mm256_set1_epi32(x[1]));
    const __m256i c = _mm256_maddubs_epi16(w[2], _mm256_set1_epi32(x[2]));
    const __m256i d = _mm256_maddubs_epi16(w[3], _mm256_set1_epi32(x[3]));
    const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
#endif
}

template <int MR, int KIND, bool BLOCKS>
REQAT_TARGET void int_tile(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, int64_t tile,
                           float* out) {
    constexpr int PER = KIND == 0 ? 1 : 2, PARTS = MR <= 2 ? 2 : 1;
    const Ahead ahead = ahead_of(INTEGERS, MR);
    const int64_t blocks = w.steps / PER;
    const __m256i table = _mm256_add_epi8(
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values))), _mm256_set1_epi8(OFFSET));
    const __m256i low = _mm256_set1_epi8(15);
    for (int first = 0; first < 2; first += PARTS) {
        const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES + 32 * first;
        const uint8_t* scales = w.scales + tile * blocks * LANES + 8 * first;
        __m256 acc[PARTS][MR];
        for (int p = 0; p < PARTS; p++)
            for (int m = 0; m < MR; m++) acc[p][m] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; b++) {
            __m256i dot[PARTS][MR];
            for (int p = 0; p < PARTS; p++)
                for (int m = 0; m < MR; m++) dot[p][m] = _mm256_set1_epi32(start[b * MR + m]);
            for (int s = 0; s < PER; s++) {
                const int64_t step = b * PER + s;
                const uint8_t* at = codes + step * STEP_BYTES;
                if (first == 0) prefetch_step<PER>(ahead, at, scales + b * LANES, step);
                for (int p = 0; p < PARTS; p++) {
                    const __m256i p0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * p));
                    const __m256i p1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * p + 64));
                    const __m256i values[4] = {
                        _mm256_shuffle_epi8(table, _mm256_and_si256(p0, low)),
                        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(p0, 4), low)),
                        _mm256_shuffle_epi8(table, _mm256_and_si256(p1, low)),
                        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(p1, 4), low))};
                    for (int m = 0; m < MR; m++)
                        dot[p][m] = dot_step(dot[p][m], values, reinterpret_cast<const Word*>(x + (step * MR + m) * STEP));
                }
            }
            for (int p = 0; p < PARTS; p++) {
                const __m256 sw = scales8<KIND>(scales + b * LANES + 8 * p);
                for (int m = 0; m < MR; m++) {
                    const __m256 scale = BLOCKS ? _mm256_mul_ps(sw, _mm256_set1_ps(scale_x[b * MR + m])) : sw;
                    acc[p][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[p][m]), scale, acc[p][m]);
                }
            }
        }
        for (int p = 0; p < PARTS; p++)
            for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * LANES + 8 * (first + p), acc[p][m]);
    }
}

}  // namespace REQAT_VARIANT
}  // namespace
}  // namespace reqat
