// One decoder layer of a packed model for one new token a row: everything between two residual additions in one call.
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

// One step: x [B, hidden] in place; cos, sin [B, D] with the given stride between rows. The x, T, start and shift of
// `key` and `value` and the query, out and S of `attention` are set here or by the caller as decode.cpp says.
struct DecodeStep {
    float* x;
    const float *cos, *sin;
    int64_t stride, B;
    AppendArgs* key;
    AppendArgs* value;
    AttentionArgs* attention;
    int64_t threads;
};

}  // namespace reqat
