// Intel's matrix unit (AMX): eight tile registers of up to 16 rows of 64 bytes, which a thread configures before it
// uses them, and products C += A B of tiles.
//
//   A [m][4 k bytes]: m rows of a matrix,   B [k][4 n bytes]: four (two) rows of the other interleaved,   C [m][n]
//   dot_int8: C int32, A and B signed bytes, four to a word: C[i][j] += sum over w, b of A[i][4 w + b] * B[w][4 j + b]
//   dot_bf16: C float32, A and B bfloat16, two to a word
//
// `Tiles` is either the instructions or, where REQAT_TILE_TWIN is defined, the same in C++, so that everything around
// them can be tested, also with sanitizers, on CPUs without. A thread makes one, works, and ends it: the constructor
// configures, the destructor releases. Kernels name tiles by template arguments, because instructions do.
#pragma once

#include "common.h"

#if defined(REQAT_AMX)

#include <cstdlib>

namespace reqat {
namespace {

// Rows and bytes of a row of every tile: C in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
struct TileShape {
    int rows;   // of x, in A and C: 1 to 16
    int bytes;  // of a row of A, four times the rows of B: 4 to 64
};

#if !defined(REQAT_TILE_TWIN)

class Tiles {
  public:
    explicit Tiles(const TileShape& shape) {
        // What ldtilecfg reads: Intel 64 and IA-32 Architectures Software Developer's Manual, "Intel AMX", tile
        // configuration. Palette 1 is the only one that there is.
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        static_assert(sizeof(config) == 64, "as the instruction has it");
        for (int t = 0; t < 8; t++) {
            config.bytes[t] = uint16_t(t == 4 || t == 5 ? shape.bytes : 64);
            config.rows[t] = uint8_t(t < 6 ? shape.rows : shape.bytes / 4);
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T>
    void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(T));
    }
    template <int T>
    void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B>
    void dot_int8() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
    template <int C, int A, int B>
    void dot_bf16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};

#else

// What the manual's pseudo-code says, with its conditions on shapes: the process ends where the CPU would raise #UD.
class Tiles {
  public:
    explicit Tiles(const TileShape& shape) {
        for (int t = 0; t < 8; t++) {
            tiles[t].bytes = t == 4 || t == 5 ? shape.bytes : 64;
            tiles[t].rows = t < 6 ? shape.rows : shape.bytes / 4;
            require(tiles[t].rows >= 1 && tiles[t].rows <= 16 && tiles[t].bytes >= 4 && tiles[t].bytes <= 64);
        }
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T>
    void zero() {
        std::memset(tiles[T].data, 0, sizeof(tiles[T].data));
    }
    template <int T>
    void load(const void* from, int64_t stride) {
        zero<T>();
        for (int r = 0; r < tiles[T].rows; r++)
            std::memcpy(tiles[T].data[r], static_cast<const char*>(from) + r * stride, size_t(tiles[T].bytes));
    }
    template <int T>
    void store(void* to, int64_t stride) {
        for (int r = 0; r < tiles[T].rows; r++)
            std::memcpy(static_cast<char*>(to) + r * stride, tiles[T].data[r], size_t(tiles[T].bytes));
    }

    template <int C, int A, int B>
    void dot_int8() {
        require_shapes<C, A, B>();
        for (int m = 0; m < tiles[C].rows; m++)
            for (int n = 0; n < tiles[C].bytes / 4; n++) {
                int32_t sum;
                std::memcpy(&sum, tiles[C].data[m] + 4 * n, 4);
                for (int k = 0; k < tiles[A].bytes / 4; k++)
                    for (int i = 0; i < 4; i++)
                        sum += int8_t(tiles[A].data[m][4 * k + i]) * int8_t(tiles[B].data[k][4 * n + i]);
                std::memcpy(tiles[C].data[m] + 4 * n, &sum, 4);
            }
    }

    // Intel's manual, TDPBF16PS, "Operation": the even and the odd elements of the words are two chains of fused
    // multiply-adds, which start at zero; their sum is added to C. To nearest even, subnormals are zero on both ends.
    template <int C, int A, int B>
    REQAT_AVX512 void dot_bf16() {
        require_shapes<C, A, B>();
        for (int m = 0; m < tiles[C].rows; m++)
            for (int n = 0; n < tiles[C].bytes / 4; n++) {
                float chains[2] = {};
                for (int k = 0; k < tiles[A].bytes / 4; k++)
                    for (int i = 0; i < 2; i++)
                        chains[i] =
                            flushed(__builtin_fmaf(element<A>(m, 2 * k + i), element<B>(k, 2 * n + i), chains[i]));
                float sum;
                std::memcpy(&sum, tiles[C].data[m] + 4 * n, 4);
                sum = flushed(flushed(sum) + flushed(chains[0] + chains[1]));
                std::memcpy(tiles[C].data[m] + 4 * n, &sum, 4);
            }
    }

  private:
    struct Tile {
        int rows, bytes;
        uint8_t data[16][64];
    };
    Tile tiles[8] = {};

    static void require(bool condition) {
        if (!condition) std::abort();
    }
    template <int C, int A, int B>
    void require_shapes() const {
        require(C != A && C != B && A != B && tiles[C].rows == tiles[A].rows && tiles[C].bytes == tiles[B].bytes &&
                tiles[A].bytes == 4 * tiles[B].rows);
    }
    static float flushed(float x) {
        return (float_to_bits(x) & 0x7F800000) ? x : bits_to_float(float_to_bits(x) & 1u << 31);
    }
    template <int T>
    float element(int row, int i) const {
        uint16_t bits;
        std::memcpy(&bits, tiles[T].data[row] + 2 * i, 2);
        return flushed(bf16_to_float(bits));
    }
};

#endif

}  // namespace
}  // namespace reqat

#endif
