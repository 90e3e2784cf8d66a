// Matrix products with FP4 weights: y = x W^T for few rows of x, as decoding needs them.
//
// Integer path (W4A4, W4A8). An FP4 value is half an integer from -12 to 12, so the dot product of a block is exact in
// integers. Weights are looked up as unsigned bytes, value + OFFSET, because the instruction multiplies unsigned by signed
// bytes; what that adds, OFFSET times the sum of x, is taken off by where the accumulator starts. Then, for every block,
//
//     acc = fma(float(dot), scale_w * scale_x, acc),       y = acc * (alpha * row_scale) + bias.
//
// Float path (W4A16): block = sum of x * value by fma in the order of the columns, acc = fma(block, scale_w, acc).
//
// All variants do these operations in this order, and so does a row whatever else is in the batch: results are equal
// bit for bit between instruction sets, thread counts and batch sizes. (One exception: for x in bfloat16 AVX-512 adds
// the products of two columns at a time, in its own instruction's way. Batches and threads still change nothing.)
//
// What bounds it: one row of x reads 0.56 bytes a weight and executes about 15 instructions for 256 of them, so memory
// decides; from some 8 rows on it is the byte dot product, one 512-bit instruction a cycle for 64 weights and one row.

#include "gemm.h"

#include <cmath>
#include <vector>

#include "common.h"

namespace reqat {
namespace {

constexpr int PREFETCH = 4096;  // bytes ahead of the codes being read: what memory delivers while one load waits

inline float scale_of(uint8_t bits, int kind) { return kind ? e8m0_to_float(bits) : e4m3_to_float(bits); }

// --- portable -------------------------------------------------------------------------------------------------------

void int_tile_portable(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, int64_t tile,
                       int64_t M, float* out) {  // out [M, 16]
    const int64_t K = w.steps * STEP, blocks = K / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    (void)start;
    for (int64_t m = 0; m < M; m++) {
        float acc[LANES] = {};
        for (int64_t b = 0; b < blocks; b++) {
            int32_t dot[LANES] = {};
            for (int s = 0; s < per; s++) {
                const uint8_t* step = codes + (b * per + s) * STEP_BYTES;
                const int8_t* xs = x + m * K + (b * per + s) * STEP;
                for (int l = 0; l < 2; l++)
                    for (int r = 0; r < LANES; r++)
                        for (int i = 0; i < 4; i++) {
                            const uint8_t byte = step[64 * l + 4 * r + i];
                            dot[r] += int(w.values[byte & 15]) * xs[8 * l + i];
                            dot[r] += int(w.values[byte >> 4]) * xs[8 * l + 4 + i];
                        }
            }
            const float sx = scale_x ? scale_x[m * blocks + b] : 1.0f;
            for (int r = 0; r < LANES; r++)
                acc[r] = std::fma(float(dot[r]), scale_of(scales[b * LANES + r], w.scale_kind) * sx, acc[r]);
        }
        for (int r = 0; r < LANES; r++) out[m * LANES + r] = acc[r];
    }
}

void float_tile_portable(const Weight& w, const float* x, int64_t tile, int64_t M, float* out) {
    const int64_t K = w.steps * STEP, blocks = K / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    for (int64_t m = 0; m < M; m++)
        for (int r = 0; r < LANES; r++) {
            float acc = 0;
            for (int64_t b = 0; b < blocks; b++) {
                float block = 0;
                for (int s = 0; s < per; s++)
                    for (int c = 0; c < STEP; c++) {
                        const uint8_t byte = codes[(b * per + s) * STEP_BYTES + 64 * (c / 8) + 4 * r + c % 4];
                        const float v = float(w.values[(c / 4) % 2 ? byte >> 4 : byte & 15]);
                        block = std::fma(v, x[m * K + (b * per + s) * STEP + c], block);
                    }
                acc = std::fma(block, scale_of(scales[b * LANES + r], w.scale_kind), acc);
            }
            out[m * LANES + r] = acc;
        }
}

#if REQAT_X86

// --- AVX2: a tile is two registers of eight rows ----------------------------------------------------------------------

template <int KIND>
REQAT_AVX2 inline __m256 scales8(const uint8_t* bytes) {
    const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    if (KIND == 0) return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 20)), _mm256_set1_ps(0x1p120f));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(bits, 23), _mm256_set1_epi32(0x400000)));
}

template <int MR, int KIND>
REQAT_AVX2 void int_tile_avx2(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, int64_t tile,
                              float* out) {
    const int64_t K = w.steps * STEP, blocks = K / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    alignas(16) uint8_t shifted[16];
    for (int i = 0; i < 16; i++) shifted[i] = uint8_t(w.values[i] + OFFSET);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(shifted)));
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; half++) {
        __m256 acc[MR];
        for (int m = 0; m < MR; m++) acc[m] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; b++) {
            const __m256 sw = scales8<KIND>(scales + b * LANES + 8 * half);
            __m256i dot[MR];
            for (int m = 0; m < MR; m++) dot[m] = _mm256_set1_epi32(start[m * blocks + b]);
            for (int s = 0; s < per; s++)
                for (int l = 0; l < 2; l++) {
                    const int64_t step = b * per + s;
                    const __m256i packed = _mm256_loadu_si256(
                        reinterpret_cast<const __m256i*>(codes + step * STEP_BYTES + 64 * l + 32 * half));
                    const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
                    const __m256i c = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
                    for (int m = 0; m < MR; m++) {
                        int32_t x0, x1;
                        std::memcpy(&x0, x + m * K + step * STEP + 8 * l, 4);
                        std::memcpy(&x1, x + m * K + step * STEP + 8 * l + 4, 4);
                        // Two products of at most 28 * 128 stay far inside 16 bits.
                        const __m256i p = _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi32(x0)), ones);
                        const __m256i q = _mm256_madd_epi16(_mm256_maddubs_epi16(c, _mm256_set1_epi32(x1)), ones);
                        dot[m] = _mm256_add_epi32(dot[m], _mm256_add_epi32(p, q));
                    }
                }
            for (int m = 0; m < MR; m++) {
                const __m256 scale = scale_x ? _mm256_mul_ps(sw, _mm256_set1_ps(scale_x[m * blocks + b])) : sw;
                acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m]), scale, acc[m]);
            }
        }
        for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * LANES + 8 * half, acc[m]);
    }
}

template <int MR, int KIND>
REQAT_AVX2 void float_tile_avx2(const Weight& w, const float* x, int64_t tile, float* out) {
    const int64_t K = w.steps * STEP, blocks = K / w.block;
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
                            block[m] = _mm256_fmadd_ps(v, _mm256_set1_ps(x[m * K + step * STEP + 8 * l + c]), block[m]);
                    }
                }
            const __m256 sw = scales8<KIND>(scales + b * LANES + 8 * half);
            for (int m = 0; m < MR; m++) acc[m] = _mm256_fmadd_ps(block[m], sw, acc[m]);
        }
        for (int m = 0; m < MR; m++) _mm256_storeu_ps(out + m * LANES + 8 * half, acc[m]);
    }
}

// --- AVX-512: a register holds four columns of all 16 rows ------------------------------------------------------------

// Four int8 values, read as the word that is given to all lanes.
using Four = int32_t __attribute__((may_alias, aligned(1)));

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
    const int64_t K = w.steps * STEP, blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    const __m512i table =
        _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values))),
                        _mm512_set1_epi8(OFFSET));
    __m512 acc[MR];
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512i dot[MR];
        for (int m = 0; m < MR; m++) dot[m] = _mm512_set1_epi32(start[m * blocks + b]);
        for (int s = 0; s < PER; s++) {
            const int64_t step = b * PER + s;
            const uint8_t* at = codes + step * STEP_BYTES;
            const __m512i p0 = _mm512_loadu_si512(at), p1 = _mm512_loadu_si512(at + 64);
            if (MR <= 8) {  // with more rows the weights come slower than memory can bring them
                _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH + 64), _MM_HINT_T0);
            }
            // vpermb looks at six bits of an index, and the table repeats every 16 entries: what the other nibble leaves
            // above the code does no harm.
            const __m512i w0 = _mm512_permutexvar_epi8(p0, table);
            const __m512i w1 = _mm512_permutexvar_epi8(_mm512_srli_epi16(p0, 4), table);
            const __m512i w2 = _mm512_permutexvar_epi8(p1, table);
            const __m512i w3 = _mm512_permutexvar_epi8(_mm512_srli_epi16(p1, 4), table);
            for (int m = 0; m < MR; m++) {
                const Four* xs = reinterpret_cast<const Four*>(x + m * K + step * STEP);
                dot[m] = _mm512_dpbusd_epi32(dot[m], w0, _mm512_set1_epi32(xs[0]));
                dot[m] = _mm512_dpbusd_epi32(dot[m], w1, _mm512_set1_epi32(xs[1]));
                dot[m] = _mm512_dpbusd_epi32(dot[m], w2, _mm512_set1_epi32(xs[2]));
                dot[m] = _mm512_dpbusd_epi32(dot[m], w3, _mm512_set1_epi32(xs[3]));
            }
        }
        const __m512 sw = scales16<KIND>(scales + b * LANES);
        for (int m = 0; m < MR; m++) {
            const __m512 scale = BLOCKS ? _mm512_mul_ps(sw, _mm512_set1_ps(scale_x[m * blocks + b])) : sw;
            acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), scale, acc[m]);
        }
    }
    for (int m = 0; m < MR; m++) _mm512_storeu_ps(out + m * LANES, acc[m]);
}

template <int MR, int KIND>
REQAT_AVX512 void float_tile_avx512(const Weight& w, const float* x, int64_t tile, float* out) {
    constexpr int PER = KIND == 0 ? 1 : 2;
    const int64_t K = w.steps * STEP, blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    alignas(64) float values[16];
    for (int i = 0; i < 16; i++) values[i] = w.values[i];
    const __m512 table = _mm512_load_ps(values);
    __m512 acc[MR];
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512 block[MR];
        for (int m = 0; m < MR; m++) block[m] = _mm512_setzero_ps();
        for (int s = 0; s < PER; s++) {
            const int64_t step = b * PER + s;
            for (int l = 0; l < 2; l++) {
                const uint8_t* at = codes + step * STEP_BYTES + 64 * l;
                const __m512i packed = _mm512_loadu_si512(at);
                if (MR <= 2) _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH), _MM_HINT_T0);
                const float* xs = x + step * STEP + 8 * l;
                // vpermps looks at four bits of an index.
#define REQAT_COLUMN(c, shift)                                                                      \
    {                                                                                               \
        const __m512 v = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, shift), table);            \
        for (int m = 0; m < MR; m++) block[m] = _mm512_fmadd_ps(v, _mm512_set1_ps(xs[m * K + c]), block[m]); \
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
    const int64_t pairs = w.steps * STEP / 2, blocks = w.steps / PER;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = float_to_bf16(float(w.values[i & 15]));
    const __m512i table = _mm512_load_si512(values);
    __m512 acc[MR];
    for (int m = 0; m < MR; m++) acc[m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512 block[MR];
        for (int m = 0; m < MR; m++) block[m] = _mm512_setzero_ps();
        for (int s = 0; s < PER; s++)
            for (int l = 0; l < 2; l++) {
                const int64_t step = b * PER + s;
                const uint8_t* at = codes + step * STEP_BYTES + 64 * l;
                const __m512i packed = _mm512_loadu_si512(at);
                if (MR <= 8) _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH), _MM_HINT_T0);
                // vpermw looks at five bits of an index, and the table repeats after four.
                const __m512i v[4] = {_mm512_permutexvar_epi16(packed, table),
                                      _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table),
                                      _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table),
                                      _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table)};
                for (int m = 0; m < MR; m++) {
                    const uint32_t* xs = x + m * pairs + step * (STEP / 2) + 4 * l;
                    for (int j = 0; j < 4; j++)
                        block[m] = _mm512_dpbf16_ps(block[m], (__m512bh)v[j], (__m512bh)_mm512_set1_epi32(int(xs[j])));
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

#endif  // REQAT_X86

// --- all rows of x against one tile ------------------------------------------------------------------------------------

// Rows of x are taken in groups of 16, 8, 4, 2, 1, whose accumulators fit into registers.
#define REQAT_BY_ROWS(CALL)                                    \
    for (int64_t m = 0; m < M;) {                              \
        const int64_t left = M - m;                            \
        if (left >= 16) { CALL(16); m += 16; }                 \
        else if (left >= 8) { CALL(8); m += 8; }               \
        else if (left >= 4) { CALL(4); m += 4; }               \
        else if (left >= 2) { CALL(2); m += 2; }               \
        else { CALL(1); m += 1; }                              \
    }

template <int KIND>
void int_tile(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, int64_t tile, int64_t M,
              float* out) {
#if REQAT_X86
    const int64_t K = w.steps * STEP, blocks = K / w.block;
    if (isa() == AVX512) {
#define CALL(MR)                                                                                                  \
    (scale_x ? int_tile_avx512<MR, KIND, true>(w, x + m * K, start + m * blocks, scale_x + m * blocks, tile,      \
                                               out + m * LANES)                                                   \
             : int_tile_avx512<MR, KIND, false>(w, x + m * K, start + m * blocks, nullptr, tile, out + m * LANES))
        REQAT_BY_ROWS(CALL)
#undef CALL
        return;
    }
    if (isa() == AVX2) {
        for (int64_t m = 0; m < M;) {
            const float* s = scale_x ? scale_x + m * blocks : nullptr;
            if (M - m >= 4) {
                int_tile_avx2<4, KIND>(w, x + m * K, start + m * blocks, s, tile, out + m * LANES);
                m += 4;
            } else {
                int_tile_avx2<1, KIND>(w, x + m * K, start + m * blocks, s, tile, out + m * LANES);
                m += 1;
            }
        }
        return;
    }
#endif
    int_tile_portable(w, x, start, scale_x, tile, M, out);
}

template <int KIND>
void float_tile(const Weight& w, const float* x, int64_t tile, int64_t M, float* out) {
#if REQAT_X86
    const int64_t K = w.steps * STEP;
    if (isa() == AVX512) {
        // Two registers a row of x (block and sum), and one for each column's values: eight rows at most.
        for (int64_t m = 0; m < M;) {
            const int64_t left = M - m;
            if (left >= 8) { float_tile_avx512<8, KIND>(w, x + m * K, tile, out + m * LANES); m += 8; }
            else if (left >= 4) { float_tile_avx512<4, KIND>(w, x + m * K, tile, out + m * LANES); m += 4; }
            else if (left >= 2) { float_tile_avx512<2, KIND>(w, x + m * K, tile, out + m * LANES); m += 2; }
            else { float_tile_avx512<1, KIND>(w, x + m * K, tile, out + m * LANES); m += 1; }
        }
        return;
    }
    if (isa() == AVX2) {
        for (int64_t m = 0; m < M;) {
            if (M - m >= 4) { float_tile_avx2<4, KIND>(w, x + m * K, tile, out + m * LANES); m += 4; }
            else { float_tile_avx2<1, KIND>(w, x + m * K, tile, out + m * LANES); m += 1; }
        }
        return;
    }
#endif
    float_tile_portable(w, x, tile, M, out);
}

void store(const Weight& w, int64_t tile, int64_t M, const float* out, const float* row_scale, const float* bias,
           float* y, int64_t stride_y) {
    const int64_t first = tile * LANES, count = w.rows - first < LANES ? w.rows - first : LANES;
    for (int64_t m = 0; m < M; m++) {
        const float factor = row_scale ? w.alpha * row_scale[m] : w.alpha;
        for (int64_t r = 0; r < count; r++) {
            const float value = out[m * LANES + r] * factor;
            y[m * stride_y + first + r] = bias ? value + bias[first + r] : value;
        }
    }
}

constexpr int64_t ROWS_AT_ONCE = 64;  // rows of x whose results wait on the stack

}  // namespace

void gemm_int(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, const float* row_scale,
              const float* bias, float* y, int64_t M, int64_t stride_y, int threads) {
    const int64_t tiles = (w.rows + LANES - 1) / LANES, K = w.steps * STEP, blocks = K / w.block;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        alignas(64) float out[ROWS_AT_ONCE * LANES];
        for (int64_t m = 0; m < M; m += ROWS_AT_ONCE) {
            const int64_t rows = M - m < ROWS_AT_ONCE ? M - m : ROWS_AT_ONCE;
            const float* s = scale_x ? scale_x + m * blocks : nullptr;
            if (w.scale_kind == 0) int_tile<0>(w, x + m * K, start + m * blocks, s, tile, rows, out);
            else int_tile<1>(w, x + m * K, start + m * blocks, s, tile, rows, out);
            store(w, tile, rows, out, row_scale ? row_scale + m : nullptr, bias, y + m * stride_y, stride_y);
        }
    }
}

void gemm_float(const Weight& w, const float* x, const float* bias, float* y, int64_t M, int64_t stride_y,
                int threads) {
    const int64_t tiles = (w.rows + LANES - 1) / LANES, K = w.steps * STEP;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        alignas(64) float out[ROWS_AT_ONCE * LANES];
        for (int64_t m = 0; m < M; m += ROWS_AT_ONCE) {
            const int64_t rows = M - m < ROWS_AT_ONCE ? M - m : ROWS_AT_ONCE;
            if (w.scale_kind == 0) float_tile<0>(w, x + m * K, tile, rows, out);
            else float_tile<1>(w, x + m * K, tile, rows, out);
            store(w, tile, rows, out, nullptr, bias, y + m * stride_y, stride_y);
        }
    }
}

void gemm_bf16(const Weight& w, const uint16_t* x, const float* bias, float* y, int64_t M, int64_t stride_y,
               int threads) {
    const int64_t tiles = (w.rows + LANES - 1) / LANES, K = w.steps * STEP;
#if REQAT_X86
    if (isa() == AVX512) {
        std::vector<uint32_t> pairs(size_t(M * K / 2));
        for (int64_t m = 0; m < M; m++) paired(x + m * K, K, pairs.data() + m * K / 2);
        const uint32_t* xs = pairs.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t tile = 0; tile < tiles; tile++) {
            alignas(64) float out[8 * LANES];
            for (int64_t m = 0; m < M;) {
                const int64_t left = M - m, rows = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                const uint32_t* at = xs + m * K / 2;
#define CALL(MR)                                                                       \
    (w.scale_kind == 0 ? bf16_tile_avx512<MR, 0>(w, at, tile, out) : bf16_tile_avx512<MR, 1>(w, at, tile, out))
                if (rows == 8) CALL(8);
                else if (rows == 4) CALL(4);
                else if (rows == 2) CALL(2);
                else CALL(1);
#undef CALL
                store(w, tile, rows, out, nullptr, bias, y + m * stride_y, stride_y);
                m += rows;
            }
        }
        return;
    }
#endif
    std::vector<float> wide(size_t(M * K));
    for (int64_t i = 0; i < M * K; i++) wide[size_t(i)] = bf16_to_float(x[i]);
    gemm_float(w, wide.data(), bias, y, M, stride_y, threads);
}

bool fp4_input(const Spec& format, const float* x, int64_t M, int64_t K, float g, int8_t* values, int32_t* start,
               float* scale) {
    const int64_t block = format.block, blocks = K / block;
    if (format.global_scale == DYNAMIC) {
        const int32_t top = amax_bits(x, DTYPE_F32, M * K);
        if (top >= 0x7F800000) return false;
        g = global_scale_of(format, bits_to_float(uint32_t(top)));
    }
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
        for (int64_t b = 0; b < blocks; b++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < block; i++) sum += values[m * K + b * block + i];
            start[m * blocks + b] = -OFFSET * sum;
            scale[m * blocks + b] *= 0.5f;
        }
    }
    return true;
}

}  // namespace reqat

using namespace reqat;

REQAT_API int reqat_fp4_input(const Spec* format, const float* x, int64_t M, int64_t K, float g, int8_t* values,
                              int32_t* start, float* scale) {
    return fp4_input(*format, x, M, K, g, values, start, scale);
}

REQAT_API void reqat_gemm_int(const Weight* w, const int8_t* x, const int32_t* start, const float* scale_x,
                              const float* row_scale, const float* bias, float* y, int64_t M, int64_t stride_y,
                              int threads) {
    gemm_int(*w, x, start, scale_x, row_scale, bias, y, M, stride_y, threads);
}

REQAT_API int reqat_gemm_bf16(const Weight* w, const uint16_t* x, const float* bias, float* y, int64_t M,
                              int64_t stride_y, int threads) {
    return guarded([&] {
        gemm_bf16(*w, x, bias, y, M, stride_y, threads);
        return OK;
    });
}

REQAT_API int reqat_gemm_float(const Weight* w, const float* x, const float* bias, float* y, int64_t M,
                               int64_t stride_y, int threads) {
    gemm_float(*w, x, bias, y, M, stride_y, threads);
    return OK;
}

// Round rows of x [M, K] to int8: scale = amax / 127 (1 for a row of zeros), value = x / scale to nearest even. Columns
// K to `padded` become 0. Returns 0 if x holds NaN or infinity.
REQAT_API int reqat_int8_input(const float* x, int64_t M, int64_t K, int64_t padded, int32_t block, int8_t* values,
                               int32_t* start, float* row_scale) {
    for (int64_t m = 0; m < M; m++) {
        const float* row = x + m * K;
        uint32_t top = 0;
        for (int64_t k = 0; k < K; k++) {
            const uint32_t bits = float_to_bits(row[k]) & 0x7FFFFFFF;
            top = bits > top ? bits : top;
        }
        if (top >= 0x7F800000) return 0;
        const float scale = top ? bits_to_float(top) / 127.0f : 1.0f;
        int8_t* out = values + m * padded;
        for (int64_t k = 0; k < K; k++) {
            // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits. (amax / scale may be 127 and a bit.)
            const float y = row[k] / scale + 0x1.8p23f;
            out[k] = int8_t(int32_t(float_to_bits(y)) - 0x4B400000);
        }
        for (int64_t k = K; k < padded; k++) out[k] = 0;
        for (int64_t b = 0; b < padded / block; b++) {
            int32_t sum = 0;
            for (int32_t i = 0; i < block; i++) sum += out[b * block + i];
            start[m * (padded / block) + b] = -OFFSET * sum;
        }
        row_scale[m] = scale;
    }
    return 1;
}

// One linear layer from its unrounded input to its output. Mirrored in gemm.py.
struct Product {
    const Weight* weight;
    const void* x;       // [M, 16 * steps], bfloat16 or float32
    float* y;            // [M, rows]
    const Spec* format;  // of the input, or null
    int64_t M;
    int32_t bf16;   // the type of x
    int32_t int8;   // round x to int8 by rows; only without a format
    float g;        // the global scale of a static format
};

namespace {

int products(const Product* first, int64_t n, int threads) {
    thread_local std::vector<float> wide, scale;
    thread_local std::vector<int8_t> values;
    thread_local std::vector<int32_t> start;
    for (const Product* p = first; p < first + n; p++) {
        const Weight& w = *p->weight;
        const int64_t K = w.steps * STEP, count = p->M * K, blocks = count / w.block;
        const bool rounds = p->format || p->int8;
        if (!rounds && p->bf16) {
            gemm_bf16(w, static_cast<const uint16_t*>(p->x), nullptr, p->y, p->M, w.rows, threads);
            continue;
        }
        const float* x = static_cast<const float*>(p->x);
        if (p->bf16) {
            wide.resize(size_t(count));
            for (int64_t i = 0; i < count; i++) wide[size_t(i)] = bf16_to_float(static_cast<const uint16_t*>(p->x)[i]);
            x = wide.data();
        }
        if (!rounds) {
            gemm_float(w, x, nullptr, p->y, p->M, w.rows, threads);
            continue;
        }
        values.resize(size_t(count));
        start.resize(size_t(blocks));
        scale.resize(size_t(p->format ? blocks : p->M));
        const bool finite =
            p->format ? fp4_input(*p->format, x, p->M, K, p->g, values.data(), start.data(), scale.data())
                      : reqat_int8_input(x, p->M, K, K, w.block, values.data(), start.data(), scale.data());
        if (!finite) return NOT_FINITE;
        gemm_int(w, values.data(), start.data(), p->format ? scale.data() : nullptr,
                 p->format ? nullptr : scale.data(), nullptr, p->y, p->M, w.rows, threads);
    }
    return OK;
}

}  // namespace

// Several linear layers after each other, as a decoder step runs them: the input of each is rounded anew. A Status.
REQAT_API int reqat_products(const Product* first, int64_t n, int threads) {
    return guarded([&] { return products(first, n, threads); });
}
