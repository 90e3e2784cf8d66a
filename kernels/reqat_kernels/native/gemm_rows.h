// Rows of x in groups that a kernel takes at once: what the kernels of gemm.cpp have in common.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gemm.h"

namespace reqat {
namespace {

template <int N>
using Rows = std::integral_constant<int, N>;

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

// Bring weights from memory while a kernel reads at `codes` and `scales`: of each step two lines, `near` bytes ahead, into
// the first cache; where the schedule has a second distance, two lines into the second cache as well, with their scales.
// (One stream, scales among the codes, was no faster.)
template <int PER>
inline void prefetch_step(const Ahead& ahead, const uint8_t* codes, const uint8_t* scales, int64_t step) {
    __builtin_prefetch(codes + ahead.near);
    __builtin_prefetch(codes + ahead.near + 64);
    if (ahead.far) {
        __builtin_prefetch(codes + ahead.far, 0, 2);
        __builtin_prefetch(codes + ahead.far + 64, 0, 2);
        // A line holds the scales of four blocks, of PER steps each.
        if (step % (4 * PER) == 0) __builtin_prefetch(scales + ahead.far / (8 * PER), 0, 2);
    }
}

// A word of x, which is given to all lanes: four int8 or two bfloat16 values.
using Word = int32_t __attribute__((may_alias, aligned(1)));

}  // namespace
}  // namespace reqat
