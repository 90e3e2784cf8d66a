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
// the products of two columns at a time and AMX those of a block, each in its own instruction's way. Batches and threads
// still change nothing.)
//
// What bounds it: one row of x reads 0.56 bytes a weight and executes about 15 instructions for 256 of them, so memory
// decides; from some 8 rows on it is the units that multiply, one 512-bit instruction a cycle (Zen 4) or two (Zen 5). For
// 512 weights and a row of x they have 8 byte dot products and, for every scale (one of MXFP4's, two of NVFP4's), one
// multiply-add, and one multiplication more where x is FP4 too: 9 and 10 for W4A8, 10 and 12 for W4A4.

#include "gemm.h"

#include <vector>

#include "common.h"
#include "gemm_amx.h"
#include "gemm_avx2.h"
#include "gemm_avx512.h"
#include "gemm_portable.h"
#include "gemm_rows.h"

namespace reqat {
namespace {

REQAT_CLONES void widen(const uint16_t* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = bf16_to_float(x[i]);
}

// y from kernel(t, m, rows, out), which leaves the sums of `rows` rows of x from m on with tile t in out [rows, 16].
template <int MOST, class Kernel>
void all_tiles(const Weight& w, const float* row_scale, const float* bias, float* y, int64_t M, int64_t stride_y,
               const Team& team, const Kernel& kernel) {
    team.each(tiles_of(w), [&](int64_t t) {
        alignas(64) float out[MOST * LANES];
        by_groups<MOST>(0, M, [&](int64_t m, auto rows) {
            kernel(t, m, rows, out);
            const float* scale = row_scale ? row_scale + m : nullptr;
#if REQAT_X86
            if (isa() >= AVX512) return store_avx512<rows()>(w, t, out, scale, bias, y + m * stride_y, stride_y);
#endif
            store<rows()>(w, t, out, scale, bias, y + m * stride_y, stride_y);
        });
    });
}

template <int KIND>
void gemm_int_of(const Weight& w, const IntRows& x, const float* row_scale, const float* bias, float* y,
                 int64_t stride_y, const Team& team) {
    const int64_t K = w.steps * STEP, blocks = K / w.block;
    const auto compute = [&](auto most, const auto& kernel) {
        all_tiles<decltype(most)::value>(
            w, row_scale, bias, y, x.M, stride_y, team, [&](int64_t t, int64_t m, auto rows, float* out) {
                kernel(rows, x.x + m * K, x.start + m * blocks, x.scale ? x.scale + m * blocks : nullptr, t, out);
            });
    };
#if REQAT_X86
#if defined(REQAT_AMX)
    if (isa() >= AMX && x.M >= FEWEST) return gemm_int_amx<KIND>(w, x, row_scale, bias, y, stride_y, team);
#endif
    if (isa() >= AVX512 && x.scale)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { int_tile_avx512<rows(), KIND, true>(w, rest...); });
    if (isa() >= AVX512)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { int_tile_avx512<rows(), KIND, false>(w, rest...); });
#if defined(REQAT_AVXVNNI)
    if (isa() >= AVXVNNI && x.scale)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { avxvnni::int_tile<rows(), KIND, true>(w, rest...); });
    if (isa() >= AVXVNNI)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { avxvnni::int_tile<rows(), KIND, false>(w, rest...); });
#endif
    if (isa() >= AVX2 && x.scale)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { avx2::int_tile<rows(), KIND, true>(w, rest...); });
    if (isa() >= AVX2)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { avx2::int_tile<rows(), KIND, false>(w, rest...); });
#endif
    compute(Rows<1>(), [&](auto, auto... rest) { int_row_portable(w, rest...); });
}

template <int KIND>
void gemm_float_of(const Weight& w, const FloatRows& x, const float* bias, float* y, int64_t stride_y, const Team& team) {
    const int64_t K = w.steps * STEP;
    const auto compute = [&](auto most, const auto& kernel) {
        all_tiles<decltype(most)::value>(
            w, nullptr, bias, y, x.M, stride_y, team,
            [&](int64_t t, int64_t m, auto rows, float* out) { kernel(rows, x.x + m * K, t, out); });
    };
#if REQAT_X86
    if (isa() >= AVX512)
        return compute(Rows<8>(), [&](auto rows, auto... rest) { float_tile_avx512<rows(), KIND>(w, rest...); });
    if (isa() >= AVX2)
        return compute(Rows<32>(), [&](auto rows, auto... rest) { float_tile_avx2<rows(), KIND>(w, rest...); });
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
    together(threads, [&](const Team& team) {
        all_tiles<8>(w, nullptr, bias, y, M, stride_y, team, [&](int64_t t, int64_t m, auto rows, float* out) {
            bf16_tile_avx512<rows(), KIND>(w, xs + m * pairs, t, out);
        });
    });
}

#endif

// Rows that the kernels of the instruction set in use take at once, of integers and of float32 (two registers a row of x,
// block and sum, and one for each column's values: eight at most with AVX-512; with AVX2 more than four keep their sums in
// memory). 1: rows are read as they are.
int most_int_rows() { return isa() >= AVX2 ? 8 : 1; }
int most_float_rows() { return isa() >= AVX512 ? 8 : isa() >= AVX2 ? 32 : 1; }

}  // namespace

void Arranged::reserve(int64_t M, int64_t K, int64_t block) {
    if (M == 0) return;
    int64_t rows = M;
#if defined(REQAT_AMX)
    const Groups groups(M);
    rows = groups.count * groups.rows;
#endif
    x.reserve(size_t(rows * K));
    start.reserve(size_t(M * (K / block)));
    scale.reserve(size_t(M * K));  // of float32 inputs: these themselves
}

bool read_as_they_are(int64_t M) { return M <= 1; }

IntRows arranged(const IntRows& rows, int64_t K, int32_t block, Arranged& memory) {
    const int64_t M = rows.M, blocks = K / block;
#if defined(REQAT_AMX)
    if (isa() >= AMX && M >= FEWEST)
        return {operands(rows.x, Groups(M), K, block, memory.x), nullptr, scale_panels(rows.scale, M, blocks, memory.scale),
                M};
#endif
    if (most_int_rows() == 1) return rows;
    return {interleaved<8>(rows.x, M, K, STEP, memory.x), interleaved<8>(rows.start, M, blocks, 1, memory.start),
            interleaved<8>(rows.scale, M, blocks, 1, memory.scale), M};
}

FloatRows arranged(const FloatRows& rows, int64_t K, Arranged& memory) {
    const int most = most_float_rows();
    const float* x = most == 8    ? interleaved<8>(rows.x, rows.M, K, STEP, memory.scale)
                     : most == 32 ? interleaved<32>(rows.x, rows.M, K, STEP, memory.scale)
                                  : rows.x;
    return {x, rows.M};
}

void gemm(const Weight& w, const IntRows& x, const float* row_scale, const float* bias, float* y, int64_t stride_y,
          const Team& team) {
    (w.scale_kind == 0 ? gemm_int_of<0> : gemm_int_of<1>)(w, x, row_scale, bias, y, stride_y, team);
}

void gemm(const Weight& w, const FloatRows& x, const float* bias, float* y, int64_t stride_y, const Team& team) {
    (w.scale_kind == 0 ? gemm_float_of<0> : gemm_float_of<1>)(w, x, bias, y, stride_y, team);
}

void gemm_int(const Weight& w, const IntRows& x, const float* row_scale, const float* bias, float* y, int64_t stride_y,
              int threads) {
    Arranged memory;
    const IntRows rows = arranged(x, w.steps * STEP, w.block, memory);
    together(threads, [&](const Team& team) { gemm(w, rows, row_scale, bias, y, stride_y, team); });
}

void gemm_float(const Weight& w, const FloatRows& x, const float* bias, float* y, int64_t stride_y, int threads) {
    Arranged memory;
    const FloatRows rows = arranged(x, w.steps * STEP, memory);
    together(threads, [&](const Team& team) { gemm(w, rows, bias, y, stride_y, team); });
}

void gemm_bf16(const Weight& w, const uint16_t* x, const float* bias, float* y, int64_t M, int64_t stride_y,
               int threads) {
#if REQAT_X86
#if defined(REQAT_AMX)
    if (isa() >= AMX)
        return (w.scale_kind == 0 ? gemm_bf16_amx<0> : gemm_bf16_amx<1>)(w, x, bias, y, M, stride_y, threads);
#endif
    if (isa() >= AVX512)
        return (w.scale_kind == 0 ? gemm_bf16_of<0> : gemm_bf16_of<1>)(w, x, bias, y, M, stride_y, threads);
#endif
    std::vector<float> wide(size_t(M * w.steps * STEP));
    widen(x, M * w.steps * STEP, wide.data());
    gemm_float(w, {wide.data(), M}, bias, y, stride_y, threads);
}

}  // namespace reqat

using namespace reqat;

REQAT_API int reqat_gemm_int(const Weight* w, const int8_t* x, const int32_t* start, const float* scale_x,
                             const float* row_scale, const float* bias, float* y, int64_t M, int64_t stride_y,
                             int threads) {
    return guarded([&] {
        gemm_int(*w, {x, start, scale_x, M}, row_scale, bias, y, stride_y, threads);
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
        gemm_float(*w, {x, M}, bias, y, stride_y, threads);
        return OK;
    });
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
            gemm_float(w, {x, p->M}, nullptr, p->y, w.rows, threads);
            continue;
        }
        values.resize(size_t(count));
        start.resize(size_t(blocks));
        scale.resize(size_t(p->format ? blocks : p->M));
        const bool finite =
            p->format ? fp4_input(*p->format, x, p->M, K, p->g, values.data(), start.data(), scale.data())
                      : int8_input(x, p->M, K, K, w.block, values.data(), start.data(), scale.data());
        if (!finite) return NOT_FINITE;
        gemm_int(w, {values.data(), start.data(), p->format ? scale.data() : nullptr, p->M},
                 p->format ? nullptr : scale.data(), nullptr, p->y, w.rows, threads);
    }
    return OK;
}

}  // namespace

// Several linear layers after each other, as a decoder step runs them: the input of each is rounded anew. A Status.
REQAT_API int reqat_products(const Product* first, int64_t n, int threads) {
    return guarded([&] { return products(first, n, threads); });
}
