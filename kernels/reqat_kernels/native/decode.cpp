// Decoder layers of the Llama kind, for T new tokens (one, or a few that were guessed) in each of B rows:
//
//     h = rms_norm(x);  q, k, v = h Wq, h Wk, h Wv;  q, k = rope(q), rope(k);  cache <- quantize(k - shift), quantize(v)
//     x += attention(q, cache) Wo;   h = rms_norm(x);   x += (silu(h Wgate) * (h Wup)) Wdown
//
// with every product's input rounded as the precision says. What transformers' modules do in some thirty calls a layer,
// each of which costs more than its work when there is one token, happens here in one for the whole stack. Sums of
// squares are in double, everything else in float32. Each token's numbers are those that it would get in a step of its
// own, to the last bit, where rounding looks at one token at a time (static and row global scales).
//
// One team of threads does it from the first layer to the last (team.h): a layer is a dozen pieces of a few microseconds.

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "common.h"

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

// What a layer writes down for all threads of the team.
struct Scratch {
    std::vector<float> hidden, query, key, value, attended, gate, up, scale, sums;
    std::vector<int8_t> rounded;
    std::vector<int32_t> start;
    Arranged memory;
    IntRows integers;  // the input of the next products, arranged
    FloatRows floats;
    std::atomic<int> failed;  // 0, or the part that is not finite

    // Before the team is there: nothing is allocated any more after this. `rows`: tokens of all rows of the batch.
    void reserve(const DecodeLayer* layers, const DecodeStates* states, int64_t count, const DecodeStep& s, int64_t rows) {
        int64_t inner = 0, queries = 0, keys = 0, mlp = 0, floats = 0, block = STEP;  // the smallest
        for (const DecodeLayer* layer = layers; layer < layers + count; layer++) {
            queries = std::max(queries, layer->H * layer->D);
            keys = std::max(keys, layer->G * layer->D);
            mlp = std::max(mlp, layer->mlp);
            inner = std::max({inner, layer->hidden, layer->mlp, queries});
            floats = std::max(floats, attention_floats(attention_of(states[layer - layers], s)));
        }
        hidden.resize(size_t(rows * inner));
        query.resize(size_t(rows * queries));
        key.resize(size_t(rows * keys));
        value.resize(key.size());
        attended.resize(query.size());
        gate.resize(size_t(rows * mlp));
        up.resize(gate.size());
        sums.resize(size_t(floats));
        rounded.resize(size_t(rows * inner));
        start.resize(size_t(rows * (inner / block)));
        scale.resize(start.size());
        memory.reserve(rows, inner, block);
        failed.store(0, std::memory_order_relaxed);
    }

    static AttentionArgs attention_of(const DecodeStates& states, const DecodeStep& s) {
        AttentionArgs attention = *states.attention;
        attention.T = s.T;
        attention.threads = s.threads;
        attention.causal = s.T > 1;
        attention.S = s.length + s.T;
        attention.mask = s.mask;
        attention.mask_kind = s.mask ? MASK_BOOL : MASK_NONE;
        attention.mask_b = attention.S, attention.mask_h = attention.mask_t = 0, attention.mask_s = 1;
        return attention;
    }
};

// One layer, as each thread of a team runs it. `failed` is written in some parts and read at the beginning of the next,
// in which nobody writes it, so all threads read the same and leave together.
class Layer {
  public:
    Layer(const DecodeLayer& layer, const DecodeStates& states, const DecodeStep& s, Scratch& scratch, const Team& team)
        : layer(layer), states(states), s(s), scratch(scratch), team(team), rows(s.B * s.T) {}

    // 0, or the part that is not finite.
    int run() const {
        float *h = scratch.hidden.data(), *q = scratch.query.data(), *k = scratch.key.data(), *v = scratch.value.data();
        float *gate = scratch.gate.data(), *up = scratch.up.data();
        const int64_t hidden = layer.hidden;
        if (!input(h, hidden, 0, 3, [&](int64_t b) { norm(layer.input_norm, h, b); })) return failure();
        times(*layer.query, q);
        times(*layer.key, k);
        times(*layer.value, v);
        team.wait();
        rotate(q, k);
        team.wait();
        append(k, v);
        team.wait();
        if (failure()) return failure();
        float* attended = attention(q);
        if (!input(attended, layer.H * layer.D, 1, 6, [](int64_t) {})) return failure();
        add(*layer.out, h, false);
        team.wait();

        if (!input(h, hidden, 2, 7, [&](int64_t b) { norm(layer.attention_norm, h, b); })) return failure();
        times(*layer.gate, gate);
        times(*layer.up, up);
        const Part mine = columns(*layer.gate);  // those that this thread has just computed
        for (int64_t b = 0; b < rows; b++) {
            float* row = gate + b * layer.mlp;
            silu_times(row + mine.begin, up + b * layer.mlp + mine.begin, mine.end - mine.begin, row + mine.begin);
        }
        team.wait();
        if (!input(gate, layer.mlp, 3, 8, [](int64_t) {})) return failure();
        add(*layer.down, h, s.half != 0);
        team.wait();
        return 0;
    }

  private:
    int failure() const { return scratch.failed.load(std::memory_order_relaxed); }
    // Of several parts that fail at once, the first.
    void fail(int part) const {
        int before = failure();
        while ((before == 0 || before > part) &&
               !scratch.failed.compare_exchange_weak(before, part, std::memory_order_relaxed)) {
        }
    }

    void norm(const float* weight, float* h, int64_t b) const {
        rms_norm(s.x + b * layer.hidden, weight, layer.hidden, layer.eps, h + b * layer.hidden);
    }

    // Columns of the output that are this thread's.
    Part columns(const Linear& linear) const {
        const Part tiles = team.part(tiles_of(linear.weight));
        return {tiles.begin * LANES, std::min(tiles.end * LANES, linear.weight.rows)};
    }

    // The input of some products, x [rows, K]: made a row at a time by `make(b)`, rotated, rounded and arranged.
    // `which`: its global scale. False, for all threads, if it is not finite.
    template <class Make>
    bool input(float* x, int64_t K, int which, int part, const Make& make) const {
        const Part mine = team.part(rows);
        for (int64_t b = mine.begin; b < mine.end; b++) {
            make(b);
            if (layer.rotation) hadamard(x + b * K, K, layer.rotation);
        }
        if (!layer.inputs)
            return publish(FloatRows{x, rows}, scratch.floats,
                           [&](const FloatRows& plain) { return arranged(plain, K, scratch.memory); });
        const Spec& format = *layer.inputs;
        const int64_t blocks = K / format.block, first = mine.begin, count = mine.end - mine.begin;
        float g = layer.global_scale[which];
        bool finite = true;
        if (format.global_scale == DYNAMIC) {
            const int32_t top = team.largest(amax_bits(x + first * K, DTYPE_F32, count * K));
            finite = top < 0x7F800000;
            g = finite ? global_scale_of(format, bits_to_float(uint32_t(top))) : 1.0f;
        }
        int8_t* values = scratch.rounded.data();
        int32_t* start = scratch.start.data();
        float* scale = scratch.scale.data();
        finite = finite && fp4_rows(format, x + first * K, count, K, g, values + first * K, start + first * blocks,
                                    scale + first * blocks);
        if (!finite) fail(part);
        return publish(IntRows{values, start, scale, rows}, scratch.integers,
                       [&](const IntRows& plain) { return arranged(plain, K, format.block, scratch.memory); });
    }

    // When all threads have made their rows: the rows, arranged, to all threads. False if some are not finite.
    template <class Rows, class Arrange>
    bool publish(const Rows& plain, Rows& rows_of_all, const Arrange& arrange) const {
        if (team.rank == 0) rows_of_all = plain;
        team.wait();
        if (failure()) return false;
        if (!read_as_they_are(rows)) {
            if (team.rank == 0) rows_of_all = arrange(plain);
            team.wait();
        }
        return true;
    }

    void times(const Linear& linear, float* y) const {
        const Weight& w = linear.weight;
        if (layer.inputs)
            gemm(w, scratch.integers, nullptr, linear.bias, y, w.rows, team);
        else
            gemm(w, scratch.floats, linear.bias, y, w.rows, team);
    }

    // The residual stream gets this thread's part of a product.
    void add(const Linear& linear, float* y, bool half) const {
        times(linear, y);
        const Part mine = columns(linear);
        for (int64_t b = 0; b < rows; b++) {
            float* x = s.x + b * layer.hidden;
            const float* h = y + b * layer.hidden;
            for (int64_t i = mine.begin; i < mine.end; i++) x[i] += h[i];
            if (half)
                for (int64_t i = mine.begin; i < mine.end; i++) x[i] = bf16_to_float(float_to_bf16(x[i]));
        }
    }

    void rotate(float* q, float* k) const {
        const int64_t H = layer.H, G = layer.G, D = layer.D;
        team.each(rows * (H + G), [&](int64_t i) {
            const int64_t b = i / (H + G), head = i % (H + G), at = b / s.T * s.stride + b % s.T * D;
            float* x = head < H ? q + (b * H + head) * D : k + (b * G + head - H) * D;
            const float* weight = head < H ? layer.query_norm : layer.key_norm;
            if (weight) rms_norm(x, weight, D, layer.eps, x);
            rope(x, s.cos + at, s.sin + at, D);
        });
    }

    void append(const float* k, const float* v) const {
        for (int i = 0; i < 2; i++) {
            // A copy: what changes from call to call is this call's own, so that threads may share a model.
            AppendArgs append = i == 0 ? *states.key : *states.value;
            append.x = i == 0 ? k : v;
            append.start = s.length;
            append.dtype = DTYPE_F32;
            append.x_b = s.T * layer.G * layer.D, append.x_g = layer.D, append.x_t = layer.G * layer.D;
            append.T = s.T;
            if (!reqat::append(append, team)) fail(4 + i);
        }
    }

    // [rows, H, D], where all threads can read it.
    float* attention(float* q) const {
        AttentionArgs attention = Scratch::attention_of(states, s);
        float* attended = scratch.attended.data();
        if (s.T > 1) {
            exchange(q, s.T, layer.H, attended);
            std::swap(q, attended);
        }
        attention.query = q;
        attention.out = attended;
        attend(attention, scratch.sums.data(), team);
        team.wait();
        if (s.T > 1) {
            exchange(attended, layer.H, s.T, q);
            std::swap(q, attended);
        }
        return attended;
    }

    // [B, T, H, D] to [B, H, T, D] (or back, T and H exchanged), where all threads can read it.
    void exchange(const float* x, int64_t T, int64_t H, float* out) const {
        const int64_t D = layer.D;
        team.each(s.B * T, [&](int64_t i) {
            const int64_t b = i / T, t = i % T;
            for (int64_t h = 0; h < H; h++)
                std::memcpy(out + ((b * H + h) * T + t) * D, x + ((b * T + t) * H + h) * D, size_t(D) * sizeof(float));
        });
        team.wait();
    }

    const DecodeLayer& layer;
    const DecodeStates& states;
    const DecodeStep& s;
    Scratch& scratch;
    const Team& team;
    const int64_t rows;
};

int all_layers(const DecodeLayer* layers, const DecodeStates* states, int64_t count, const DecodeStep& s) {
    thread_local Scratch own;
    Scratch& scratch = own;  // the team's: each of its threads would have another of that name
    scratch.reserve(layers, states, count, s, s.B * s.T);
    std::atomic<int> status{0};
    together(int(s.threads), [&](const Team& team) {
        for (int64_t i = 0; i < count; i++)
            if (const int part = Layer(layers[i], states[i], s, scratch, team).run()) {
                status.store(int(16 * i) + part, std::memory_order_relaxed);
                return;
            }
    });
    return status.load();
}

}  // namespace
}  // namespace reqat

// 0; NO_MEMORY; 16 * layer + 3 to 8: something is not finite, in the order in which the parts come (decode.py names
// them).
REQAT_API int reqat_decode(const reqat::DecodeLayer* layers, const reqat::DecodeStates* states, int64_t count,
                           const reqat::DecodeStep* step) {
    return reqat::guarded([&] { return reqat::all_layers(layers, states, count, *step); });
}
