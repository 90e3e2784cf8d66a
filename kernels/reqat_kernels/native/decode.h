// The decoder layers of a packed model for one or a few new tokens a row, all in one call.
#pragma once

#include <cstdint>

#include "attention.h"
#include "gemm.h"

namespace reqat {

struct Linear {
    Weight weight;
    const float* bias;  // [N], or null
};

// Weights of norms are float32. Mirrored, field by field, in decode.py.
struct DecodeLayer {
    int64_t hidden, mlp, H, G, D, rotation;
    double eps;
    const float *input_norm, *attention_norm;  // [hidden], before attention and before the MLP
    const float *query_norm, *key_norm;        // [D], a head at a time (Qwen3), or null
    const Linear *query, *key, *value, *out, *gate, *up, *down;
    const Spec* inputs;        // how inputs are rounded, or null: not at all
    float global_scale[4];     // of a static format: inputs of query/key/value, out, gate/up, down
};

// Where a layer's part of the cache lies. The x of `key` and `value`, the query and out of `attention`, and all that
// changes from token to token are set by decode.cpp in copies of its own.
struct DecodeStates {
    const AppendArgs* key;
    const AppendArgs* value;
    const AttentionArgs* attention;
};

// One step of all layers: x [B, T, hidden] in place; cos, sin [B, T, D] with the given stride between rows of the batch.
struct DecodeStep {
    float* x;
    const float *cos, *sin;
    int64_t stride, B, T;
    int64_t length;       // tokens stored before these; there is room for T more
    const uint8_t* mask;  // bool [B, length + T], contiguous, or null; a token sees none after itself
    int64_t half;         // round x to bfloat16 after each layer, as a model of that type does
    int64_t threads;
};

}  // namespace reqat
