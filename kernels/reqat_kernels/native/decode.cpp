// Decoder layers of the Llama kind, for T new tokens (one, or a few that were guessed) in each of B rows:
//
//     h = rms_norm(x);  q, k, v = h Wq, h Wk, h Wv;  q, k = rope(q), rope(k);  cache <- quantize(k - shift), quantize(v)
//     x += attention(q, cache) Wo;   h = rms_norm(x);   x += (silu(h Wgate) * (h Wup)) Wdown
//
// with every product's input rounded as the precision says. What transformers' modules do in some thirty calls a layer,
// each of which costs more than its work when there is one token, happens here in one for the whole stack. Sums of
// squares are in double, everything else in float32. Each token's numbers are those that it would get in a step of its
// own, to the last bit, where rounding looks at one token at a time (static and row global scales).

#include "decode.h"

#include <cmath>
#include <utility>
#include <vector>

#include "common.h"

REQAT_API int reqat_kv_append(const reqat::AppendArgs* args);
REQAT_API int reqat_kv_attention(const reqat::AttentionArgs* args);

namespace reqat {
namespace {

REQAT_CLONES void rms_norm(const float* x, const float* weight, int64_t n, double eps, float* out) {
    double parts[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; lane++) parts[lane] += double(x[i + lane]) * double(x[i + lane]);
    double sum = 0;
    for (double part : parts) sum += part;
    for (; i < n; i++) sum += double(x[i]) * double(x[i]);
    const float factor = float(1.0 / std::sqrt(sum / double(n) + eps));
    for (int64_t k = 0; k < n; k++) out[k] = weight[k] * (x[k] * factor);
}

// Rotary embedding of one head, halves rotated against each other.
REQAT_CLONES void rope(float* x, const float* cos, const float* sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; i++) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + -b * sin[i];
        x[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

// e^x within 2 ulps for |x| <= 87, in a form that compilers vectorize: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline float exp_clamped(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 0x1.715476p+0f + 0x1.8p23f;
    const float n = shifted - 0x1.8p23f;
    const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float p = 0x1.6ab96ep-10f;
    p = p * r + 0x1.126d1ep-7f;
    p = p * r + 0x1.55589ap-5f;
    p = p * r + 0x1.55540ap-3f;
    p = p * r + 0x1.fffffap-2f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bits_to_float((float_to_bits(shifted) + 127u) << 23);
}

REQAT_CLONES void silu_times(const float* gate, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exp_clamped(-gate[i])) * up[i];
}

// Blocks of n (a power of two) by the normalized Hadamard matrix, in place.
REQAT_CLONES void hadamard(float* x, int64_t length, int64_t n) {
    const float norm = float(1.0 / std::sqrt(double(n)));
    for (float* block = x; block < x + length; block += n) {
        for (int64_t half = 1; half < n; half *= 2)
            for (int64_t i = 0; i < n; i += 2 * half)
                for (int64_t j = i; j < i + half; j++) {
                    const float a = block[j], b = block[j + half];
                    block[j] = a + b;
                    block[j + half] = a - b;
                }
        for (int64_t i = 0; i < n; i++) block[i] *= norm;
    }
}

// Room for what lies between the products of a layer: a thread's own.
struct Scratch {
    std::vector<float> hidden, query, key, value, attended, gate, up, scale;
    std::vector<int8_t> rounded;
    std::vector<int32_t> start;
};

// The input of some products: rotated and rounded once, then multiplied with each weight.
struct Input {
    const DecodeLayer& layer;
    Scratch& scratch;
    float* x;
    int64_t B, K;
    int threads;
    bool finite = true;

    Input(const DecodeLayer& layer, Scratch& scratch, float* x, int64_t B, int64_t K, float g, int threads)
        : layer(layer), scratch(scratch), x(x), B(B), K(K), threads(threads) {
        if (layer.rotation) hadamard(x, B * K, layer.rotation);
        if (!layer.inputs) return;
        scratch.rounded.resize(size_t(B * K));
        scratch.start.resize(size_t(B * K / layer.inputs->block));
        scratch.scale.resize(scratch.start.size());
        finite = fp4_input(*layer.inputs, x, B, K, g, scratch.rounded.data(), scratch.start.data(), scratch.scale.data());
    }

    void times(const Linear& linear, float* y) const {
        const Weight& w = linear.weight;
        if (layer.inputs)
            gemm_int(w, scratch.rounded.data(), scratch.start.data(), scratch.scale.data(), nullptr, linear.bias, y, B,
                     w.rows, threads);
        else
            gemm_float(w, x, linear.bias, y, B, w.rows, threads);
    }
};

// [B, T, H, D] to [B, H, T, D] (or back, T and H exchanged).
void exchange(const float* x, int64_t B, int64_t T, int64_t H, int64_t D, float* out) {
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < H; h++)
                std::memcpy(out + ((b * H + h) * T + t) * D, x + ((b * T + t) * H + h) * D, size_t(D) * sizeof(float));
}

int one_layer(const DecodeLayer& layer, const DecodeStates& states, const DecodeStep& s) {
    thread_local Scratch scratch;
    // Every token is a row of the products.
    const int64_t T = s.T, B = s.B * T, hidden = layer.hidden, D = layer.D, H = layer.H, G = layer.G;
    const int threads = int(s.threads);
    scratch.hidden.resize(size_t(B * (hidden > layer.mlp ? hidden : layer.mlp)));
    scratch.query.resize(size_t(B * H * D));
    scratch.key.resize(size_t(B * G * D));
    scratch.value.resize(size_t(B * G * D));
    scratch.attended.resize(size_t(B * H * D));
    scratch.gate.resize(size_t(B * layer.mlp));
    scratch.up.resize(size_t(B * layer.mlp));
    float *h = scratch.hidden.data(), *q = scratch.query.data(), *k = scratch.key.data(), *v = scratch.value.data();

    for (int64_t b = 0; b < B; b++) rms_norm(s.x + b * hidden, layer.input_norm, hidden, layer.eps, h + b * hidden);
    {
        const Input input(layer, scratch, h, B, hidden, layer.global_scale[0], threads);
        if (!input.finite) return 3;
        input.times(*layer.query, q);
        input.times(*layer.key, k);
        input.times(*layer.value, v);
    }
    for (int64_t b = 0; b < B; b++) {
        const int64_t at = b / T * s.stride + b % T * D;
        const float *cos = s.cos + at, *sin = s.sin + at;
        for (int64_t i = 0; i < H; i++) {
            float* head = q + (b * H + i) * D;
            if (layer.query_norm) rms_norm(head, layer.query_norm, D, layer.eps, head);
            rope(head, cos, sin, D);
        }
        for (int64_t i = 0; i < G; i++) {
            float* head = k + (b * G + i) * D;
            if (layer.key_norm) rms_norm(head, layer.key_norm, D, layer.eps, head);
            rope(head, cos, sin, D);
        }
    }
    // Copies: what changes from call to call is this call's own, so that threads may share a model.
    AppendArgs appended[2] = {*states.key, *states.value};
    for (int i = 0; i < 2; i++) {
        AppendArgs& append = appended[i];
        append.x = i == 0 ? k : v;
        append.start = s.length;
        append.dtype = DTYPE_F32;
        append.x_b = T * G * D, append.x_g = D, append.x_t = G * D;
        append.T = T;
        if (const int error = reqat_kv_append(&append)) return error == NOT_FINITE ? 4 + i : error;
    }
    AttentionArgs attention = *states.attention;
    float* attended = scratch.attended.data();
    if (T > 1) {
        exchange(q, s.B, T, H, D, attended);
        std::swap(q, attended);
    }
    attention.query = q;
    attention.out = attended;
    attention.T = T;
    attention.causal = T > 1;
    attention.S = s.length + T;
    attention.mask = s.mask;
    attention.mask_kind = s.mask ? MASK_BOOL : MASK_NONE;
    attention.mask_b = s.length + T, attention.mask_h = attention.mask_t = 0, attention.mask_s = 1;
    attention.threads = s.attention_threads;
    if (const int error = reqat_kv_attention(&attention)) return error;
    if (T > 1) {
        exchange(attended, s.B, H, T, D, q);
        std::swap(q, attended);
    }
    {
        const Input input(layer, scratch, attended, B, H * D, layer.global_scale[1], threads);
        if (!input.finite) return 6;
        input.times(*layer.out, h);
    }
    for (int64_t i = 0; i < B * hidden; i++) s.x[i] += h[i];

    for (int64_t b = 0; b < B; b++) rms_norm(s.x + b * hidden, layer.attention_norm, hidden, layer.eps, h + b * hidden);
    {
        const Input input(layer, scratch, h, B, hidden, layer.global_scale[2], threads);
        if (!input.finite) return 7;
        input.times(*layer.gate, scratch.gate.data());
        input.times(*layer.up, scratch.up.data());
    }
    silu_times(scratch.gate.data(), scratch.up.data(), B * layer.mlp, scratch.gate.data());
    {
        const Input input(layer, scratch, scratch.gate.data(), B, layer.mlp, layer.global_scale[3], threads);
        if (!input.finite) return 8;
        input.times(*layer.down, h);
    }
    for (int64_t i = 0; i < B * hidden; i++) s.x[i] += h[i];
    return 0;
}

int all_layers(const DecodeLayer* layers, const DecodeStates* states, int64_t count, const DecodeStep& s) {
    for (int64_t i = 0; i < count; i++) {
        if (const int error = one_layer(layers[i], states[i], s)) return error == NO_MEMORY ? error : int(16 * i) + error;
        if (s.half)
            for (int64_t k = 0; k < s.B * s.T * layers[i].hidden; k++) s.x[k] = bf16_to_float(float_to_bf16(s.x[k]));
    }
    return 0;
}

}  // namespace
}  // namespace reqat

// 0; NO_MEMORY; 16 * layer + 3 to 8: something is not finite, in the order in which the parts come (decode.py names
// them).
REQAT_API int reqat_decode(const reqat::DecodeLayer* layers, const reqat::DecodeStates* states, int64_t count,
                           const reqat::DecodeStep* step) {
    return reqat::guarded([&] { return reqat::all_layers(layers, states, count, *step); });
}
