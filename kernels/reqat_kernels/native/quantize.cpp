// Quantization of whole tensors: one pass for the largest magnitudes, one that rounds; rows or pieces over threads.
#include "quantize.h"

#include <atomic>
#include <memory>
#include <new>

#include "team.h"

namespace reqat {

// Elements handled at a time: the buffers of a piece (25 KiB) stay in a core's first-level cache.
constexpr int64_t PIECE = 2048;
constexpr int64_t MAX_BLOCKS = PIECE / 16;

// A tensor [rows, n] and what to make of it. `fake` is in the type of x.
struct Job {
    Spec spec;
    const void* x;
    int64_t rows, n, block;
    void* fake;
    RowOut out;
};

using RoundBlocks = void (*)(const float*, int64_t, int64_t, const float*, const float*, float*);

struct Loops {
    bool (*blocks[3])(const Job&, int64_t row, int64_t first, int64_t nb, float g, const int32_t* amax);
    int32_t (*amax[3])(const void* x, int64_t n);
    int32_t (*block_amax[3])(const void* x, int64_t first, int64_t nb, int64_t block, bool with_signs, int32_t* amax);
};

}  // namespace reqat

#define REQAT_VARIANT portable
#define REQAT_TARGET
#define REQAT_LEVEL 0
#include "quantize_variant.h"
#undef REQAT_VARIANT
#undef REQAT_TARGET
#undef REQAT_LEVEL

#if REQAT_X86
#define REQAT_VARIANT avx2
#define REQAT_TARGET REQAT_AVX2
#define REQAT_LEVEL 1
#include "quantize_variant.h"
#undef REQAT_VARIANT
#undef REQAT_TARGET
#undef REQAT_LEVEL

#define REQAT_VARIANT avx512
#define REQAT_TARGET REQAT_AVX512
#define REQAT_LEVEL 2
#include "quantize_variant.h"
#undef REQAT_VARIANT
#undef REQAT_TARGET
#undef REQAT_LEVEL
#endif

namespace reqat {

static const Loops& best_loops() {
#if REQAT_X86
    if (isa() >= AVX512) return avx512::loops;
    if (isa() >= AVX2) return avx2::loops;
#endif
    return portable::loops;
}

static int64_t item_size(int32_t dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

// Blocks of a row a piece at a time.
static bool run_row(const Loops& loops, const Job& job, int32_t dtype, int64_t row, float g) {
    const int64_t blocks = job.n / job.block, step = job.block < PIECE ? PIECE / job.block : 1;
    for (int64_t b = 0; b < blocks; b += step)
        if (!loops.blocks[dtype](job, row, b, blocks - b < step ? blocks - b : step, g, nullptr)) return false;
    return true;
}

int32_t amax_bits(const void* x, int32_t dtype, int64_t n) { return best_loops().amax[dtype](x, n); }

bool quantize_row(const Spec& f, const void* x, int32_t dtype, int64_t n, float g, const RowOut& out) {
    const Job job = {f, x, 1, n, block_of(f, n), nullptr, out};
    return n == 0 || run_row(best_loops(), job, dtype, 0, g);
}

// The smallest g lets the largest block scale, 448 / g, still be a float32.
static bool valid_global_scale(float g) { return g > float(1.01 * 448.0 / double(FLOAT_MAX)) && g <= FLOAT_MAX; }

static int32_t quantize_tensor(Job job, int32_t dtype, const float* given, int64_t n_given, float* g_out, int threads) {
    const Spec& f = job.spec;
    const Loops& loops = best_loops();
    for (int64_t i = 0; i < n_given; i++)
        if (!valid_global_scale(given[i])) return BAD_GLOBAL_SCALE;
    const bool per_row = n_given > 1 || (n_given == 0 && f.global_scale == ROW);
    if (job.rows == 0 || job.n == 0) {
        if (g_out && !per_row) *g_out = n_given ? *given : 1.0f;
        if (g_out && per_row)
            for (int64_t r = 0; r < job.rows; r++) g_out[r] = n_given ? given[r] : 1.0f;
        return OK;
    }
    std::atomic<int32_t> status{OK};

    if (per_row || f.block == 0) {  // a row at a time: its numbers stay in the cache between its passes
        const char* x = static_cast<const char*>(job.x);
        const int64_t row_bytes = job.n * item_size(dtype);
        auto row = [&](int64_t r) {
            float g = n_given ? given[n_given > 1 ? r : 0] : 1.0f;
            if (n_given == 0 && f.global_scale != NO_GLOBAL) {
                const int32_t top = loops.amax[dtype](x + r * row_bytes, job.n);
                if (top >= 0x7F800000) return status.store(NOT_FINITE, std::memory_order_relaxed);
                g = global_scale_of(f, bits_to_float(uint32_t(top)));
            }
            if (g_out && per_row) g_out[r] = g;
            if (!run_row(loops, job, dtype, r, g)) status.store(NOT_FINITE, std::memory_order_relaxed);
        };
        together(threads, [&](const Team& team) { team.each(job.rows, row); });
        return status.load();
    }

    // One g for all, or none: blocks know nothing of rows, so take the tensor as one row and cut it anywhere.
    job.n *= job.rows, job.rows = 1;
    const int64_t blocks = job.n / job.block, step = PIECE / job.block, pieces = (blocks + step - 1) / step;
    const int64_t signs = signs_of(f);
    float g = n_given ? *given : 1.0f;
    std::unique_ptr<int32_t[]> amax;
    auto size_of = [&](int64_t p) { return blocks - p * step < step ? blocks - p * step : step; };
    if (n_given == 0 && f.global_scale != NO_GLOBAL) {
        amax.reset(new (std::nothrow) int32_t[size_t(blocks * signs)]);
        if (!amax) return NO_MEMORY;
        int32_t top = 0;
        together(threads, [&](const Team& team) {
            int32_t mine = 0;
            team.each(pieces, [&](int64_t p) {
                const int32_t here = loops.block_amax[dtype](job.x, p * step, size_of(p), job.block, f.asymmetric,
                                                             amax.get() + p * step * signs);
                mine = here > mine ? here : mine;
            });
            mine = team.largest(mine);
            if (team.rank == 0) top = mine;
        });
        if (top >= 0x7F800000) return NOT_FINITE;
        g = global_scale_of(f, bits_to_float(uint32_t(top)));
    }
    if (g_out) *g_out = g;
    auto piece = [&](int64_t p) {
        if (!loops.blocks[dtype](job, 0, p * step, size_of(p), g, amax ? amax.get() + p * step * signs : nullptr))
            status.store(NOT_FINITE, std::memory_order_relaxed);
    };
    together(threads, [&](const Team& team) { team.each(pieces, piece); });
    return status.load();
}

}  // namespace reqat

// x [rows, n] contiguous, n a multiple of the block. `given`: n_given (0, 1, rows) global scales. `fake`, in x's type,
// and the others are written where not null. Returns reqat::Status; on an error the outputs are undefined.
REQAT_API int32_t reqat_quantize(
    const reqat::Spec* spec, int32_t dtype, const void* x, int64_t rows, int64_t n, const float* given, int64_t n_given,
    int32_t threads, void* fake, uint8_t* codes, uint8_t* packed, void* scales, float* g_out) {
    reqat::RowOut out;
    out.codes = codes, out.packed = packed, out.scales = scales;
    const reqat::Job job = {*spec, x, rows, n, reqat::block_of(*spec, n), fake, out};
    return reqat::in_float_mode([&] { return reqat::quantize_tensor(job, dtype, given, n_given, g_out, threads); });
}

// quantize_row(), for tests: the outputs that reqat_quantize() does not offer.
REQAT_API int32_t reqat_quantize_row(
    const reqat::Spec* spec, int32_t dtype, const void* x, int64_t n, float g, uint8_t* packed, int8_t* doubled,
    void* scales, float* effective, float* dequantized) {
    reqat::RowOut out;
    out.packed = packed, out.doubled = doubled, out.scales = scales, out.effective = effective;
    out.dequantized = dequantized;
    return reqat::in_float_mode(
        [&] { return int32_t(reqat::quantize_row(*spec, x, dtype, n, g, out) ? reqat::OK : reqat::NOT_FINITE); });
}
