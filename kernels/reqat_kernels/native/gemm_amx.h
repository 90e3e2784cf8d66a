// The kernels of gemm.cpp with AMX (tiles.h), which includes this file.
//
// The packed weight is made for it: a register of decoded codes, four columns of all 16 rows of W as bytes (two as
// bfloat16), is one row of operand B. Rows of x are rows of A. So for a block of columns one instruction gives the sums
// of up to 16 rows of x with 16 rows of W; they are stored, and scaled and added in float32 as everywhere else.
//
// Integer sums are exact, so W4A4 and W4A8 are equal bit for bit to the other kernels. Here values of both sides are
// signed, and nothing has to be taken off. Fewer than FEWEST rows go to the AVX-512 kernels, with the same bits.
//
// For x in bfloat16 a block's sum is what TDPBF16PS makes of it: the one path whose bits the instruction decides. A row
// of x does not look at its neighbours there, so any number of rows goes this way, one included, and a row's result
// depends neither on its batch nor on threads. (Had few rows gone to AVX-512, it would have.) One row costs about
// as many operations as there: in place of eight dot products for 16 columns, eight decoded registers are stored.
//
// What bounds it, counted in instructions (no machine with AMX was there to measure on). The unit takes a cycle for a
// row of A, whatever the block: for 32 columns, 16 rows of W and a row of x two cycles with NVFP4, one with MXFP4.
// The sums of each block are stored and loaded again, converted, scaled where x has block scales, multiplied and added:
// three 512-bit operations a block (W4A4), two (W4A8), one (bfloat16). For the 32 columns that makes
//
//                        AVX-512, all instructions            AMX: matrix unit     and 512-bit operations beside it
//     NVFP4  W4A4        8 dot products + 2 * 3 = 14          2                    6
//            W4A8        8 dot products + 2 * 2 = 12          2                    4
//     MXFP4  W4A4        8 dot products + 3 = 11              1                    3
//            W4A8        8 dot products + 2 = 10              1                    2
//
// so what decides is the work on block scales, then the stores of sums, 64 bytes for each row and block. Decoding, 12
// instructions for 16 columns of 16 rows of W (2 loads, 2 shifts, 4 permutations, 4 stores), is done once for up to 64
// rows of x.
#pragma once

#include "common.h"
#include "gemm.h"
#include "gemm_avx512.h"
#include "tiles.h"

#if defined(REQAT_AMX)

#include <vector>

namespace reqat {
namespace {

enum Inputs : int { A4, A8, A16 };  // int8 with block scales, int8 without, bfloat16

constexpr int FEWEST = 8;      // rows of x for which integers go this way
constexpr int MOST_ROWS = 16;  // of a tile
constexpr int MOST_GROUPS = 4;
constexpr int PANEL = 4;  // blocks that are decoded, multiplied and added together, each with a tile C of its own

// M rows of x in groups of a tile: as few as can be, and as even as can be, so that all tiles have one shape. Where
// they do not come out even the last group ends with rows of zeros.
struct Groups {
    int64_t M, count;
    int rows;  // of a group
    explicit Groups(int64_t M) : M(M), count((M + MOST_ROWS - 1) / MOST_ROWS), rows(int((M + count - 1) / count)) {}
    int real(int64_t group) const { return int(M - group * rows < rows ? M - group * rows : rows); }
};

// x [M, K] as operands A, [group][block][rows][columns of a block] in `memory`.
template <class T>
const T* operands(const T* x, const Groups& groups, int64_t K, int64_t block, std::vector<T>& memory) {
    memory.assign(size_t(groups.count * groups.rows * K), T(0));
    for (int64_t m = 0; m < groups.M; m++) {
        T* out = memory.data() + m / groups.rows * groups.rows * K + m % groups.rows * block;
        for (int64_t k = 0; k < K; k += block, out += groups.rows * block)
            std::memcpy(out, x + m * K + k, size_t(block) * sizeof(T));
    }
    return memory.data();
}

// Scales of x [M, blocks] as [panel][M][PANEL], in the order in which they are read.
inline const float* scale_panels(const float* scale, int64_t M, int64_t blocks, std::vector<float>& memory) {
    if (!scale) return nullptr;
    const int64_t panels = (blocks + PANEL - 1) / PANEL;
    memory.resize(size_t(panels * M * PANEL));
    for (int64_t p = 0; p < panels; p++)
        for (int64_t m = 0; m < M; m++) {
            const int64_t count = blocks - p * PANEL < PANEL ? blocks - p * PANEL : PANEL;
            std::memcpy(memory.data() + (p * M + m) * PANEL, scale + m * blocks + p * PANEL, size_t(count) * 4);
        }
    return memory.data();
}

// Sizes of a block of KIND for inputs of a type.
template <int KIND, Inputs INPUTS>
struct Block {
    static constexpr int STEPS = KIND == 0 ? 1 : 2;
    static constexpr int A_BYTES = STEPS * STEP * (INPUTS == A16 ? 2 : 1);  // of a row
    static constexpr int B_ROWS = A_BYTES / 4;
    static constexpr int B_BYTES = 64 * B_ROWS;
    // B[PANEL], decoded blocks, each a tile; and their scales
    struct alignas(64) Panel {
        uint8_t b[PANEL][B_BYTES];
        float scale[PANEL][LANES];
    };
};

template <Inputs INPUTS>
REQAT_AVX512 inline __m512i value_table(const Weight& w) {
    if (INPUTS != A16)
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.values)));
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; i++) values[i] = float_to_bf16(float(w.values[i & 15]));
    return _mm512_load_si512(values);
}

template <int KIND, Inputs INPUTS>
REQAT_AVX512 inline void decode(const uint8_t* codes, const uint8_t* scales, __m512i table, int near, int count,
                                typename Block<KIND, INPUTS>::Panel& panel) {
    constexpr int STEPS = Block<KIND, INPUTS>::STEPS;
    for (int j = 0; j < count; j++) {
        uint8_t* out = panel.b[j];
        for (int load = 0; load < 2 * STEPS; load++) {
            const uint8_t* at = codes + (2 * STEPS * j + load) * 64;
            const __m512i packed = _mm512_loadu_si512(at);
            __builtin_prefetch(at + near);
            if constexpr (INPUTS == A16) {
                for (int i = 0; i < 4; i++, out += 64)  // in the order of paired()
                    _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4 * i), table));
            } else {
                _mm512_store_si512(out, _mm512_permutexvar_epi8(packed, table));
                _mm512_store_si512(out + 64, _mm512_permutexvar_epi8(_mm512_srli_epi16(packed, 4), table));
                out += 128;
            }
        }
        _mm512_store_ps(panel.scale[j], scales16<KIND>(scales + j * LANES));
    }
}

// Sums of a panel's blocks for a group of rows, int32 or float32.
using Sums = int32_t[PANEL][MOST_ROWS * LANES];

template <int KIND, Inputs INPUTS, int J>
inline void multiply_one(Tiles& tiles, const uint8_t* a, const uint8_t* b) {
    tiles.template zero<J>();
    tiles.template load<4 + J % 2>(a, Block<KIND, INPUTS>::A_BYTES);
    tiles.template load<6 + J % 2>(b, 64);
    if constexpr (INPUTS == A16)
        tiles.template dot_bf16<J, 4 + J % 2, 6 + J % 2>();
    else
        tiles.template dot_int8<J, 4 + J % 2, 6 + J % 2>();
}

// a: the panel's first block of a group, each `stride` bytes.
template <int KIND, Inputs INPUTS>
inline void multiply(Tiles& tiles, const uint8_t* a, int64_t stride,
                     const typename Block<KIND, INPUTS>::Panel& panel, int count, Sums& sums) {
    multiply_one<KIND, INPUTS, 0>(tiles, a, panel.b[0]);
    if (count > 1) multiply_one<KIND, INPUTS, 1>(tiles, a + stride, panel.b[1]);
    if (count > 2) multiply_one<KIND, INPUTS, 2>(tiles, a + 2 * stride, panel.b[2]);
    if (count > 3) multiply_one<KIND, INPUTS, 3>(tiles, a + 3 * stride, panel.b[3]);
    tiles.template store<0>(sums[0], 64);
    if (count > 1) tiles.template store<1>(sums[1], 64);
    if (count > 2) tiles.template store<2>(sums[2], 64);
    if (count > 3) tiles.template store<3>(sums[3], 64);
}

// acc [rows, 16] += the sums of `count` blocks, one after the other. scale_x: [rows][PANEL].
template <Inputs INPUTS>
REQAT_AVX512 inline void add(const Sums& sums, const float (&scale)[PANEL][LANES], const float* scale_x, int count,
                             int rows, float* acc) {
    for (int r = 0; r < rows; r++, acc += LANES) {
        __m512 total = _mm512_load_ps(acc);
        for (int j = 0; j < count; j++) {
            const __m512i sum = _mm512_load_si512(sums[j] + r * LANES);
            __m512 factor = _mm512_load_ps(scale[j]);
            if (INPUTS == A4) factor = _mm512_mul_ps(factor, _mm512_set1_ps(scale_x[r * PANEL + j]));
            total = _mm512_fmadd_ps(INPUTS == A16 ? _mm512_castsi512_ps(sum) : _mm512_cvtepi32_ps(sum), factor, total);
        }
        _mm512_store_ps(acc, total);
    }
}

// acc [rows of these groups, 16] = x times a tile of W. Additions are one (panel, group) behind the products: the unit
// has answered by then, and sums are read from the first cache, not from stores that are still under way.
//   a: the first group's operands; scale_x: its scales, a panel of all M rows after the other.
template <int KIND, Inputs INPUTS>
REQAT_AVX512 void tile_amx(Tiles& tiles, const Weight& w, const Groups& groups, const uint8_t* a, const float* scale_x,
                           int64_t tile, int64_t first, int64_t last, float* acc) {
    using Sizes = Block<KIND, INPUTS>;
    const int64_t blocks = w.steps / Sizes::STEPS, stride = groups.rows * Sizes::A_BYTES;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES;
    const uint8_t* scales = w.scales + tile * blocks * LANES;
    const __m512i table = value_table<INPUTS>(w);
    const int near = ahead_of(INPUTS == A16 ? BFLOAT16 : INTEGERS, FEWEST).near;
    typename Sizes::Panel panels[2];
    alignas(64) Sums sums[2];
    std::memset(acc, 0, size_t((last - first) * groups.rows * LANES) * sizeof(float));

    int64_t at_b = -1, at_group = 0;  // of the products that are not added yet
    int turn = 0;
    const auto add_them = [&](const Sums& those) REQAT_AVX512 {
        const int64_t panel = at_b / PANEL, m = at_group * groups.rows;
        const float* factors = scale_x ? scale_x + (panel * groups.M + m) * PANEL : nullptr;
        const int count = int(blocks - at_b < PANEL ? blocks - at_b : PANEL);
        float* to = acc + (at_group - first) * groups.rows * LANES;
        if (count == PANEL)
            add<INPUTS>(those, panels[panel % 2].scale, factors, PANEL, groups.real(at_group), to);
        else
            add<INPUTS>(those, panels[panel % 2].scale, factors, count, groups.real(at_group), to);
    };
    for (int64_t b = 0; b < blocks; b += PANEL) {
        auto& panel = panels[b / PANEL % 2];
        const int count = int(blocks - b < PANEL ? blocks - b : PANEL);
        decode<KIND, INPUTS>(codes + b * Sizes::STEPS * STEP_BYTES, scales + b * LANES, table, near, count, panel);
        for (int64_t g = first; g < last; g++, turn ^= 1) {
            multiply<KIND, INPUTS>(tiles, a + (g * blocks + b) * stride, stride, panel, count, sums[turn]);
            if (at_b >= 0) add_them(sums[turn ^ 1]);
            at_b = b, at_group = g;
        }
    }
    if (at_b >= 0) add_them(sums[turn ^ 1]);
}

// y = x W^T of the tiles that are this thread's part. x: operands() of int8, or of pairs of bfloat16.
template <int KIND, Inputs INPUTS>
void all_tiles_amx(const Weight& w, const Groups& groups, const void* x, const float* scale_x, const float* row_scale,
                   const float* bias, float* y, int64_t stride_y, const Team& team) {
    Tiles unit({groups.rows, Block<KIND, INPUTS>::A_BYTES});
    team.each(tiles_of(w), [&](int64_t t) {
        for (int64_t first = 0; first < groups.count; first += MOST_GROUPS) {
            const int64_t last = first + MOST_GROUPS < groups.count ? first + MOST_GROUPS : groups.count;
            alignas(64) float acc[MOST_GROUPS * MOST_ROWS * LANES];
            tile_amx<KIND, INPUTS>(unit, w, groups, static_cast<const uint8_t*>(x), scale_x, t, first, last, acc);
            const int64_t end = last * groups.rows < groups.M ? last * groups.rows : groups.M;
            for (int64_t m = first * groups.rows, i = 0; m < end; m++, i++)
                store_avx512<1>(w, t, acc + i * LANES, row_scale ? row_scale + m : nullptr, bias, y + m * stride_y,
                                stride_y);
        }
    });
}

// x: arranged().
template <int KIND>
void gemm_int_amx(const Weight& w, const IntRows& x, const float* row_scale, const float* bias, float* y,
                  int64_t stride_y, const Team& team) {
    (x.scale ? all_tiles_amx<KIND, A4> : all_tiles_amx<KIND, A8>)(w, Groups(x.M), x.x, x.scale, row_scale, bias, y,
                                                                 stride_y, team);
}

template <int KIND>
void gemm_bf16_amx(const Weight& w, const uint16_t* x, const float* bias, float* y, int64_t M, int64_t stride_y,
                   int threads) {
    if (M == 0) return;
    const int64_t pairs = w.steps * STEP / 2;
    const Groups groups(M);
    std::vector<uint32_t> paired_x(size_t(M * pairs)), memory;
    for (int64_t m = 0; m < M; m++) paired(x + 2 * m * pairs, 2 * pairs, paired_x.data() + m * pairs);
    const uint32_t* a = operands(paired_x.data(), groups, pairs, w.block / 2, memory);
    together(threads, [&](const Team& team) {
        all_tiles_amx<KIND, A16>(w, groups, a, nullptr, nullptr, bias, y, stride_y, team);
    });
}

}  // namespace
}  // namespace reqat

#endif
