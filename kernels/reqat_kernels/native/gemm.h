// The packed weight that the matrix kernels read.
//
// Rows go in tiles of 16 and columns in steps of 16. A step of a tile is 128 bytes of codes, two loads of 64: in load l
// byte 4 * row + i holds the code of column 8 * l + i in its low nibble and that of column 8 * l + 4 + i in the high
// one. So one 512-bit register is four neighbouring columns of all 16 rows, a lane a row, which is what a dot product
// of bytes wants; nothing is shuffled. A tile's steps follow each other; its scales stand in an array of their own, 16
// bytes (a byte a row) for each block of columns. Rows and columns are padded with code 0, blocks with scale 0.
#pragma once

#include <cstdint>
#include <vector>

#include "quantize.h"
#include "team.h"

namespace reqat {

constexpr int LANES = 16;  // rows of a tile, one a lane
constexpr int STEP = 16;   // columns of a step
constexpr int STEP_BYTES = LANES * STEP / 2;
constexpr int OFFSET = 16;  // added to a value so that it is an unsigned byte

struct Weight {
    const uint8_t* codes;   // [tiles][steps][128]
    const uint8_t* scales;  // [tiles][blocks][16], E4M3 or E8M0
    int64_t rows;           // N, not padded
    int64_t steps;          // padded columns / 16
    int32_t block;          // columns that share a scale: 16 or 32
    int32_t scale_kind;     // 0: E4M3, 1: E8M0
    int8_t values[16];      // what each code stands for, doubled for E2M1 and E1M2
    double alpha;           // factor of the result: 1 / g, and 1/2 where values are doubled; rounded to float32 in use
};

// Which loop reads the weights: that of integer or of bfloat16 inputs.
enum Path : int { INTEGERS = 0, BFLOAT16 = 1 };

// How many bytes ahead of the codes being read the next are asked for: `near` into the first cache, `far` into the second
// (0: not at all). What is best depends on the machine and on how many rows of x a pass has, so it is measured
// (prefetch.py) and kept here; results do not depend on it.
struct Ahead {
    int32_t near, far;
};

// The schedule of a path for passes of `rows` (1, 2, 4 or 8) rows of x.
Ahead ahead_of(Path path, int rows);

// Round rows of x [M, K] to an FP4 format whose block is that of the weight and divides K.
//   g: the global scale of a static format; otherwise it follows from x, per tensor or per row, as the format says.
//   values: int8 [M, K], doubled; start: int32 [M, blocks]; scale: float32 [M, blocks], of doubled values.
// False if x holds NaN or infinity.
bool fp4_input(const Spec& format, const float* x, int64_t M, int64_t K, float g, int8_t* values, int32_t* start,
               float* scale);

// The same for some of the rows of a larger x: of a dynamic format, too, g is given.
bool fp4_rows(const Spec& format, const float* x, int64_t M, int64_t K, float g, int8_t* values, int32_t* start,
              float* scale);

// Round rows of x [M, K] to int8: scale = amax / 127 (1 for a row of zeros), value = x / scale to nearest even. Columns
// K to `padded` become 0. False if x holds NaN or infinity.
bool int8_input(const float* x, int64_t M, int64_t K, int64_t padded, int32_t block, int8_t* values, int32_t* start,
                float* row_scale);

// The input of integer products, M rows: int8 [M, 16 * steps]; start: int32 [M, blocks], -OFFSET times the sum of x over
// each block; scale: float32 [M, blocks], or null (then 1).
struct IntRows {
    const int8_t* x;
    const int32_t* start;
    const float* scale;
    int64_t M;
};

// That of products with x float32 [M, 16 * steps], which is not rounded.
struct FloatRows {
    const float* x;
    int64_t M;
};

// Memory for rows in the order in which kernels read them.
struct Arranged {
    std::vector<int8_t> x;
    std::vector<int32_t> start;
    std::vector<float> scale;

    // For up to M rows of up to K columns: nothing is allocated when such rows are arranged.
    void reserve(int64_t M, int64_t K, int64_t block);
};

// Whether kernels read so many rows as they are.
bool read_as_they_are(int64_t M);

// Rows in the order in which the kernels read them, in `memory` unless they are so already: groups of rows that a kernel
// takes at once are interleaved. Weights of one block size may share them.
IntRows arranged(const IntRows& rows, int64_t K, int32_t block, Arranged& memory);
FloatRows arranged(const FloatRows& rows, int64_t K, Arranged& memory);

// The tiles of 16 rows that w has: what the products below share out.
inline int64_t tiles_of(const Weight& w) { return (w.rows + LANES - 1) / LANES; }

// y [M, N] = alpha * sum over blocks of scale_w * scale_x * (integer dot product) + bias, of the tiles that are this
// thread's part. x is arranged; row_scale: float32 [M], or null; bias: float32 [N], or null.
void gemm(const Weight& w, const IntRows& x, const float* row_scale, const float* bias, float* y, int64_t stride_y,
          const Team& team);

// The same with an x that is not rounded.
void gemm(const Weight& w, const FloatRows& x, const float* bias, float* y, int64_t stride_y, const Team& team);

// From rows as they are to the whole y, by so many threads.
void gemm_int(const Weight& w, const IntRows& x, const float* row_scale, const float* bias, float* y, int64_t stride_y,
              int threads);
void gemm_float(const Weight& w, const FloatRows& x, const float* bias, float* y, int64_t stride_y, int threads);

// The same with x bfloat16, for which AVX-512 and AMX have instructions; without them x is widened, and gemm_float
// computes.
void gemm_bf16(const Weight& w, const uint16_t* x, const float* bias, float* y, int64_t M, int64_t stride_y,
               int threads);

}  // namespace reqat
