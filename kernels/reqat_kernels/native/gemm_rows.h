// Rows of x in groups that a kernel takes at once: what the kernels of gemm.cpp have in common.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

}  // namespace
}  // namespace reqat
