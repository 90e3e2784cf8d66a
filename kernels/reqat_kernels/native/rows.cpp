// Rows of a packed weight as numbers: the look-up of embeddings that are stored in four bits.

#include "common.h"
#include "gemm.h"

namespace reqat {
namespace {

constexpr float LARGEST = 0x1.fffffep127f;

// The numbers of formats/tensors.py: value * S with S = s / g (or s * (1 / g)), saturating.
void one_row(const Weight& w, int64_t row, int64_t columns, float g, bool reciprocal, float* out) {
    const int64_t tile = row / LANES, lane = row % LANES, blocks = w.steps * STEP / w.block;
    const uint8_t* codes = w.codes + tile * w.steps * STEP_BYTES + 4 * lane;
    const uint8_t* scales = w.scales + tile * blocks * LANES + lane;
    float S = 0;
    for (int64_t k = 0; k < columns; k++) {
        if (k % w.block == 0) {
            const uint8_t bits = scales[k / w.block * LANES];
            const float s = w.scale_kind ? e8m0_to_float(bits) : e4m3_to_float(bits);
            S = w.scale_kind ? s : reciprocal ? s * (1.0f / g) : s / g;
        }
        const uint8_t byte = codes[k / 8 * (STEP_BYTES / 2) + k % 4];
        const float product = 0.5f * float(w.values[k / 4 % 2 ? byte >> 4 : byte & 15]) * S;
        out[k] = product > LARGEST ? LARGEST : product < -LARGEST ? -LARGEST : product;
    }
}

}  // namespace
}  // namespace reqat

// out: float32 [n, columns], rows `ids` [n] of w; the caller has checked that they are there.
REQAT_API void reqat_fp4_rows(const reqat::Weight* w, const int64_t* ids, int64_t n, int64_t columns, float g,
                              int reciprocal, float* out) {
    reqat::in_float_mode([&] {
        for (int64_t i = 0; i < n; i++) reqat::one_row(*w, ids[i], columns, g, reciprocal != 0, out + i * columns);
        return reqat::OK;
    });
}
