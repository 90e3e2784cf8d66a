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
// decides; from some 8 rows on it is the unit that multiplies, one 512-bit instruction a cycle. For 512 weights and a row
// of x it has 8 byte dot products and, for every scale (one of MXFP4's, two of NVFP4's), one multiply-add, and one
// multiplication more where x is FP4 too: 9 and 10 cycles for W4A8, 10 and 12 for W4A4.

#include "gemm.h"

#include <cmath>
#include <type_traits>
#include <vector>

#include "common.h"

namespace reqat {
namespace {

constexpr int PREFETCH = 4096;  // bytes ahead of the codes being read, where one distance is enough

// Bring weights from memory while a kernel reads at `codes` and `scales`. What is best was measured: one row of x keeps
// pace with memory and wants it plain; more leave gaps, in which the second cache is filled far ahead (two rows take a
// quarter less time). One stream, scales among the codes, was no faster.
template <int MR>
inline void prefetch_step(const uint8_t* codes, const uint8_t* scales, bool with_scales) {
    if (MR == 1) {
        __builtin_prefetch(codes + PREFETCH);
        __builtin_prefetch(codes + PREFETCH + 64);
    } else {
        __builtin_prefetch(codes + 512);
        __builtin_prefetch(codes + 512 + 64);
        __builtin_prefetch(codes + 2 * PREFETCH, 0, 2);
        __builtin_prefetch(codes + 2 * PREFETCH + 64, 0, 2);
        if (with_scales) __builtin_prefetch(scales + PREFETCH / 4, 0, 2);
    }
}

REQAT_CLONES void widen(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = bf16_to_float(x[i]);
}

template <int N>
using Rows = std::integral_constant<int, N>;

inline float scale_of(uint8_t bits, int kind) { return kind ? e8m0_to_float(bits) : e4m3_to_float(bits); }

// --- portable -------------------------------------------------------------------------------------------------------

void int_row_portable(const Weight& w, const int8_t* x, const int32_t*, const float* scale_x, int64_t tile, float* out) {
    const int64_t blocks = w.steps * STEP / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    float acc[LANES] = {};
    for (int64_t b = 0; b < blocks; b++) {
        int32_t dot[LANES] = {};
        for (int s = 0; s < per; s++) {
            const uint8_t* step = codes + (b * per + s) * STEP_BYTES;
            const int8_t* xs = x + (b * per + s) * STEP;
            for (int l = 0; l < 2; l++)
                for (int r = 0; r < LANES; r++)
                    for (int i = 0; i < 4; i++) {
                        const uint8_t byte = step[64 * l + 4 * r + i];
                        dot[r] += int(w.values[byte & 15]) * xs[8 * l + i];
                        dot[r] += int(w.values[byte >> 4]) * xs[8 * l + 4 + i];
                    }
        }
        const float sx = scale_x ? scale_x[b] : 1.0f;
        for (int r = 0; r < LANES; r++)
            acc[r] = std::fma(float(dot[r]), scale_of(scales[b * LANES + r], w.scale_kind) * sx, acc[r]);
    }
    std::memcpy(out, acc, sizeof(acc));
}

void float_row_portable(const Weight& w, const float* x, int64_t tile, float* out) {
    const int64_t blocks = w.steps * STEP / w.block;
    const int per = w.block / STEP;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    for (int r = 0; r < LANES; r++) {
        float acc = 0;
        for (int64_t b = 0; b < blocks; b++) {
            float block = 0;
            for (int s = 0; s < per; s++)
                for (int c = 0; c < STEP; c++) {
                    const uint8_t byte = codes[(b * per + s) * STEP_BYTES + 64 * (c / 8) + 4 * r + c % 4];
                    const float v = float(w.values[(c / 4) % 2 ? byte >> 4 : byte & 15]);
                    block = std::fma(v, x[(b * per + s) * STEP + c], block);
                }
            acc = std::fma(block, scale_of(scales[b * LANES + r], w.scale_kind), acc);
        }
        out[r] = acc;
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
    const int64_t blocks = w.steps * STEP / w.block;
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
                        // Two products of at most 28 * 128 stay far inside 16 bits.
                        const __m256i p = _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi32(x0)), ones);
                        const __m256i q = _mm256_madd_epi16(_mm256_maddubs_epi16(c, _mm256_set1_epi32(x1)), ones);
                        dot[m] = _mm256_add_epi32(dot[m], _mm256_add_epi32(p, q));
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

// --- AVX-512: a register holds four columns of all 16 rows ------------------------------------------------------------

// A word of x, which is given to all lanes: four int8 or two bfloat16 values.
using Word = int32_t __attribute__((may_alias, aligned(1)));

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
            prefetch_step<MR>(at, scales + b * LANES, step % (4 * PER) == 0);
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
                if (MR <= 2) _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH), _MM_HINT_T0);
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
        for (int s = 0; s < PER; s++)
            for (int l = 0; l < 2; l++) {
                const int64_t step = b * PER + s;
                const uint8_t* at = codes + step * STEP_BYTES + 64 * l;
                const __m512i packed = _mm512_loadu_si512(at);
                _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH), _MM_HINT_T0);
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

// --- all rows of x against all tiles -----------------------------------------------------------------------------------

// Call function(m, rows) for groups of rows from m on: as many of MOST as there are, then one each of half as many.
template <int MOST, class Function>
void by_groups(int64_t m, int64_t M, const Function& function) {
    for (; M - m >= MOST; m += MOST) function(m, Rows<MOST>());
    if constexpr (MOST > 1) by_groups<MOST / 2>(m, M, function);
}

// x [M, length] with the rows of each group interleaved, [length / piece][rows][piece], in `memory` (x itself where that
// is the same). Row after row, the words of one step would stand K bytes apart: for a K of 2048 and its multiples all in
// the same few sets of the first cache, from which loads then come at half the pace.
template <int MOST, class T>
const T* interleaved(const T* x, int64_t M, int64_t length, int64_t piece, std::vector<T>& memory) {
    if (MOST == 1 || M == 1 || !x) return x;
    memory.resize(size_t(M * length));
    by_groups<MOST>(0, M, [&](int64_t m, auto rows) {
        T* out = memory.data() + m * length;
        for (int64_t i = 0; i < length; i += piece)
            for (int r = 0; r < rows; r++, out += piece)
                std::memcpy(out, x + (m + r) * length + i, size_t(piece) * sizeof(T));
    });
    return memory.data();
}

// out [rows, 16], the sums of a tile, scaled and moved to its columns of y.
template <int ROWS>
void store(const Weight& w, int64_t tile, const float* out, const float* row_scale, const float* bias, float* y,
           int64_t stride_y) {
    const int64_t first = tile * LANES, count = w.rows - first < LANES ? w.rows - first : LANES;
    for (int m = 0; m < ROWS; m++, out += LANES) {
        const float alpha = float(w.alpha), factor = row_scale ? alpha * row_scale[m] : alpha;
        float* to = y + m * stride_y + first;
        for (int64_t r = 0; r < count; r++) to[r] = bias ? out[r] * factor + bias[first + r] : out[r] * factor;
    }
}

#if REQAT_X86

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

#endif

// y from kernel(t, m, rows, out), which leaves the sums of `rows` rows of x from m on with tile t in out [rows, 16].
template <int MOST, class Kernel>
void all_tiles(const Weight& w, const float* row_scale, const float* bias, float* y, int64_t M, int64_t stride_y,
               int threads, const Kernel& kernel) {
    const int64_t tiles = (w.rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const FloatMode mode;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; t++) {
            alignas(64) float out[MOST * LANES];
            by_groups<MOST>(0, M, [&](int64_t m, auto rows) {
                kernel(t, m, rows, out);
                const float* scale = row_scale ? row_scale + m : nullptr;
#if REQAT_X86
                if (isa() == AVX512) return store_avx512<rows()>(w, t, out, scale, bias, y + m * stride_y, stride_y);
#endif
                store<rows()>(w, t, out, scale, bias, y + m * stride_y, stride_y);
            });
        }
    }
}

template <int KIND>
void gemm_int_of(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, const float* row_scale,
                 const float* bias, float* y, int64_t M, int64_t stride_y, int threads) {
    const int64_t K = w.steps * STEP, blocks = K / w.block;
    std::vector<int8_t> x_memory;
    std::vector<int32_t> start_memory;
    std::vector<float> scale_memory;
    const auto compute = [&](auto most, const auto& kernel) {
        constexpr int MOST = decltype(most)::value;
        const int8_t* xs = interleaved<MOST>(x, M, K, STEP, x_memory);
        const int32_t* starts = interleaved<MOST>(start, M, blocks, 1, start_memory);
        const float* scales = interleaved<MOST>(scale_x, M, blocks, 1, scale_memory);
        all_tiles<MOST>(w, row_scale, bias, y, M, stride_y, threads, [&](int64_t t, int64_t m, auto rows, float* out) {
            kernel(rows, xs + m * K, starts + m * blocks, scales ? scales + m * blocks : nullptr, t, out);
        });
    };
#if REQAT_X86
    if (isa() == AVX512 && scale_x)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { int_tile_avx512<rows(), KIND, true>(w, rest...); });
    if (isa() == AVX512)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { int_tile_avx512<rows(), KIND, false>(w, rest...); });
    if (isa() == AVX2)
        return compute(Rows<4>(), [&](auto rows, auto... rest) { int_tile_avx2<rows(), KIND>(w, rest...); });
#endif
    compute(Rows<1>(), [&](auto, auto... rest) { int_row_portable(w, rest...); });
}

template <int KIND>
void gemm_float_of(const Weight& w, const float* x, const float* bias, float* y, int64_t M, int64_t stride_y,
                   int threads) {
    const int64_t K = w.steps * STEP;
    std::vector<float> memory;
    const auto compute = [&](auto most, const auto& kernel) {
        constexpr int MOST = decltype(most)::value;
        const float* xs = interleaved<MOST>(x, M, K, STEP, memory);
        all_tiles<MOST>(w, nullptr, bias, y, M, stride_y, threads,
                        [&](int64_t t, int64_t m, auto rows, float* out) { kernel(rows, xs + m * K, t, out); });
    };
#if REQAT_X86
    // Two registers a row of x (block and sum), and one for each column's values: eight rows at most.
    if (isa() == AVX512)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { float_tile_avx512<rows(), KIND>(w, rest...); });
    if (isa() == AVX2)
        return compute(Rows<4>(), [&](auto rows, auto... rest) { float_tile_avx2<rows(), KIND>(w, rest...); });
#endif
    compute(Rows<1>(), [&](auto, auto... rest) { float_row_portable(w, rest...); });
}

#if REQAT_X86

template <int KIND>
void gemm_bf16_of(const Weight& w, const uint16_t* x, const float* bias, float* y, int64_t M, int64_t stride_y,
                  int threads) {
    const int64_t pairs = w.steps * STEP / 2;
    std::vector<uint32_t> paired_x(size_t(M * pairs)), memory;
    for (int64_t m = 0; m < M; m++) paired(x + 2 * m * pairs, 2 * pairs, paired_x.data() + m * pairs);
    const uint32_t* xs = interleaved<8>(paired_x.data(), M, pairs, STEP / 2, memory);
    all_tiles<8>(w, nullptr, bias, y, M, stride_y, threads, [&](int64_t t, int64_t m, auto rows, float* out) {
        bf16_tile_avx512<rows(), KIND>(w, xs + m * pairs, t, out);
    });
}

#endif

}  // namespace

void gemm_int(const Weight& w, const int8_t* x, const int32_t* start, const float* scale_x, const float* row_scale,
              const float* bias, float* y, int64_t M, int64_t stride_y, int threads) {
    (w.scale_kind == 0 ? gemm_int_of<0> : gemm_int_of<1>)(w, x, start, scale_x, row_scale, bias, y, M, stride_y, threads);
}

void gemm_float(const Weight& w, const float* x, const float* bias, float* y, int64_t M, int64_t stride_y,
                int threads) {
    (w.scale_kind == 0 ? gemm_float_of<0> : gemm_float_of<1>)(w, x, bias, y, M, stride_y, threads);
}

void gemm_bf16(const Weight& w, const uint16_t* x, const float* bias, float* y, int64_t M, int64_t stride_y,
               int threads) {
#if REQAT_X86
    if (isa() == AVX512)
        return (w.scale_kind == 0 ? gemm_bf16_of<0> : gemm_bf16_of<1>)(w, x, bias, y, M, stride_y, threads);
#endif
    std::vector<float> wide(size_t(M * w.steps * STEP));
    widen(x, M * w.steps * STEP, wide.data());
    gemm_float(w, wide.data(), bias, y, M, stride_y, threads);
}

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
    if (isa() == AVX512 && (block == 16 || block == 32)) return block_starts_avx512(x, K, block, start);
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
        block_starts(values + m * K, K, format.block, start + m * blocks);
    }
    for (int64_t i = 0; i < M * blocks; i++) scale[i] *= 0.5f;
    return true;
}

}  // namespace reqat

using namespace reqat;

REQAT_API int reqat_fp4_input(const Spec* format, const float* x, int64_t M, int64_t K, float g, int8_t* values,
                              int32_t* start, float* scale) {
    return in_float_mode([&] { return int(fp4_input(*format, x, M, K, g, values, start, scale)); });
}

REQAT_API int reqat_gemm_int(const Weight* w, const int8_t* x, const int32_t* start, const float* scale_x,
                             const float* row_scale, const float* bias, float* y, int64_t M, int64_t stride_y,
                             int threads) {
    return guarded([&] {
        gemm_int(*w, x, start, scale_x, row_scale, bias, y, M, stride_y, threads);
        return OK;
    });
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
    return guarded([&] {
        gemm_float(*w, x, bias, y, M, stride_y, threads);
        return OK;
    });
}

// Round rows of x [M, K] to int8: scale = amax / 127 (1 for a row of zeros), value = x / scale to nearest even. Columns
// K to `padded` become 0. Returns 0 if x holds NaN or infinity.
static int int8_input(const float* x, int64_t M, int64_t K, int64_t padded, int32_t block, int8_t* values, int32_t* start,
                      float* row_scale) {
    for (int64_t m = 0; m < M; m++) {
        const uint32_t top = largest_bits(x + m * K, K);
        if (top >= 0x7F800000) return 0;
        const float scale = top ? bits_to_float(top) / 127.0f : 1.0f;
        int8_t* out = values + m * padded;
        round_to_int8(x + m * K, K, scale, out);
        for (int64_t k = K; k < padded; k++) out[k] = 0;
        block_starts(out, padded, block, start + m * (padded / block));
        row_scale[m] = scale;
    }
    return 1;
}

REQAT_API int reqat_int8_input(const float* x, int64_t M, int64_t K, int64_t padded, int32_t block, int8_t* values,
                               int32_t* start, float* row_scale) {
    return in_float_mode([&] { return int8_input(x, M, K, padded, block, values, start, row_scale); });
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
            widen(static_cast<const uint16_t*>(p->x), count, wide.data());
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
                      : int8_input(x, p->M, K, K, w.block, values.data(), start.data(), scale.data());
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
