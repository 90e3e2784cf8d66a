// The kernels of gemm.cpp in portable C++, which includes this file: a row of x at a time.
#pragma once

#include <cmath>

#include "common.h"
#include "gemm.h"

namespace reqat {
namespace {

inline float scale_of(uint8_t bits, int kind) { return kind ? e8m0_to_float(bits) : e4m3_to_float(bits); }

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

}  // namespace
}  // namespace reqat
