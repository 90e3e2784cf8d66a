// Attention over a packed FP4 key/value cache: the layout of the cache, and what the entry points take.
//
// A cache of B rows, G key/value heads and head dimension D holds its tokens in tiles of 16, arranged so that neither
// product needs a shuffle or a horizontal sum. One 512-bit load gives 8 x 16 codes; a shift and a table look-up make
// 16 floats of them:
//
//   key codes     [B, G, tiles, D / 8, 16, 4] bytes: lane = token of the tile, its 32 bits = 8 neighbouring channels.
//                 A row's usual packing (low nibble even), its 32-bit words interleaved with those of 15 other tokens.
//   value codes   [B, G, tiles, D / 8, 16, 4] bytes: lane = channel modulo 16. Plane p = token * (D / 16) + channel / 16
//                 is nibble p % 8 of word [p / 8, lane].
//   scales        [B, G, tiles, D / block, 16] bytes: lane = token. E4M3 (block 16) or E8M0 (block 32) bits.
//   global scale  float32 divisor g, strided over [B, G, token]; none for E8M0.
#pragma once

#include <cstdint>

#include "quantize.h"
#include "team.h"

namespace reqat {

constexpr int64_t TILE = 16;       // tokens
constexpr int64_t MAX_HEAD = 1024;  // largest D

enum MaskKind : int64_t { MASK_NONE = 0, MASK_BOOL = 1, MASK_FLOAT = 2 };

// Keys or values of a cache. Mirrored, like the two structures below, field by field in attention.py.
struct PackedStates {
    uint8_t* codes;
    uint8_t* scales;
    float* global_scale;  // null: 1
    int64_t global_b, global_g, global_t;  // strides
    int64_t block;
    int64_t scale;    // ScaleType: E8M0 or E4M3
    int64_t element;  // Element: E2M1 or E1M2
};

struct AttentionArgs {
    const float* query;  // [B, H, T, D]
    float* out;          // [B, H, T, D]
    PackedStates key, value;
    const void* mask;  // bool bytes or float32, strided over [B, H, T, S]
    int64_t mask_kind, mask_b, mask_h, mask_t, mask_s;
    const int64_t* start;  // [B] first token that a row may attend to, or null
    int64_t B, H, G, T, S, D, tiles;
    int64_t threads;
    double scaling;
    int64_t causal;  // query t sees the tokens before S - T + t + 1
};

// New tokens to quantize and store. A dynamic or per-row global scale is computed and written to states.global_scale.
struct AppendArgs {
    const void* x;  // [B, G, T, D], the last axis contiguous
    int64_t dtype, x_b, x_g, x_t;
    const float* shift;  // [G, D], subtracted in float32, or null
    PackedStates states;
    int64_t is_value;  // which of the two layouts
    int64_t B, G, T, D, tiles, start;
    int64_t threads;
    Spec spec;
};

// This thread's part of appending; false if it met something not finite. All of a team have to be done before anyone
// reads what was stored.
bool append(const AppendArgs& args, const Team& team);

// How many floats of memory attention needs for its sums.
int64_t attention_floats(const AttentionArgs& args);

// This thread's part of attention; `memory` is the team's, which has at most args.threads threads. All have to be done
// before anyone reads the result.
void attend(const AttentionArgs& args, float* memory, const Team& team);

}  // namespace reqat
