// Quantizing rows to four bits: what the fake-quantization operator, the matrix products and the KV cache share.
//
// A Spec is a Format of reqat.formats as plain numbers; quantize_row() turns one row into any of codes, scales and
// dequantized numbers. Its arithmetic is that of reqat/formats/scales.py and quantize.py, operation by operation in
// float32, so that every result is equal to the reference bit for bit:
//
//     S = rule(max |x| over the block);   v = round_to_element(x / S);   x^ = v * S
//
// Rounding adds and subtracts a number whose unit in the last place is the element's spacing. The reference clamps only
// where it must; clamping always gives the same numbers, since a clamp that is not needed changes nothing.
#pragma once

#include "common.h"

namespace reqat {

enum Element : int32_t { E2M1 = 0, E1M2 = 1, INT4 = 2 };
enum ScaleType : int32_t { E8M0 = 0, E4M3 = 1, E5M2 = 2, FP16 = 3, FP32 = 4 };
enum ScaleRule : int32_t { CEIL = 0, FLOOR = 1, EVEN = 2, DIVIDE = 3, MULTIPLY = 4, RECIPROCAL = 5, NEAREST = 6 };
enum GlobalScale : int32_t { NO_GLOBAL = 0, DYNAMIC = 1, ROW = 2, STATIC = 3 };
enum Dtype : int32_t { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2 };

// A format. Mirrored field by field by `Spec` in quantize.py.
struct Spec {
    int32_t element;
    int32_t block;  // elements that share a scale; 0: the whole row
    int32_t scale;
    int32_t rule;
    int32_t away;        // round halves away from zero, not to even
    int32_t asymmetric;  // two scales a block: of its positive and of its negative numbers
    int32_t adaptive;    // four-over-six
    int32_t global_scale;
    float emax;  // the element's largest magnitude
    float cap;   // what g maps the largest block scale to
};

inline int64_t block_of(const Spec& f, int64_t n) { return f.block ? f.block : (n ? n : 1); }
inline int64_t signs_of(const Spec& f) { return f.asymmetric ? 2 : 1; }
// How many scales a row of n elements has (two a block where asymmetric).
inline int64_t scales_of(const Spec& f, int64_t n) { return n / block_of(f, n) * signs_of(f); }
inline int64_t scale_bytes(const Spec& f) { return f.scale == FP32 ? 4 : f.scale == FP16 ? 2 : 1; }

// What to produce of a row of n elements; null: not wanted.
struct RowOut {
    uint8_t* packed = nullptr;      // [(n + 1) / 2] two codes a byte, the low nibble the even element
    uint8_t* codes = nullptr;       // [n] one code a byte
    int8_t* doubled = nullptr;      // [n] twice the element's value (INT4: the value): exact integers for dot products
    void* scales = nullptr;         // [scales_of] in the stored type: E8M0, E4M3, E5M2 bytes; FP16 words; float
    float* effective = nullptr;     // [scales_of] S: what a value (not a doubled one) is multiplied by
    float* dequantized = nullptr;   // [n] v * S
};

// g of the largest magnitude of a tensor or row: cap * emax / amax in the rule's own order of operations.
inline float global_scale_of(const Spec& f, float amax) {
    if (amax == 0.0f) return 1.0f;
    const float top = f.cap * f.emax;
    const float g = f.rule == RECIPROCAL ? 1.0f / (amax / top) : (1.0f / amax) * top;
    return g > 0x1.fffffep127f ? 0x1.fffffep127f : g;
}

// The bits of the largest |x| of n numbers; from 0x7F800000 on, some are not finite. bits_to_float() makes a number.
int32_t amax_bits(const void* x, int32_t dtype, int64_t n);

// Quantize one row with the global scale g (ignored without one). n must be a multiple of the block. False if some
// number of the row is not finite; the outputs are then undefined. Thread-safe; takes the best instruction set.
bool quantize_row(const Spec& f, const void* x, int32_t dtype, int64_t n, float g, const RowOut& out);

// --- the smallest steps, inline, for kernels that work block by block ------------------------------------------------

#define REQAT_INLINE static inline __attribute__((always_inline))

constexpr float FLOAT_MAX = 0x1.fffffep127f;
constexpr float BELOW_HALF = 0x1.fffffep-2f;  // floor(z + this) rounds halves away from zero; 0.5 would err just below

// 2^floor(log2 t) of t >= 0 (0 of subnormals).
REQAT_INLINE float binade_of(float t) { return bits_to_float(float_to_bits(t) & 0x7F800000u); }

// The smaller and the larger of two numbers >= 0, by their bits: the compiler makes no branch of it, and loops vectorize.
REQAT_INLINE float least(float a, float b) {
    const int32_t i = int32_t(float_to_bits(a)), j = int32_t(float_to_bits(b));
    return bits_to_float(uint32_t(i < j ? i : j));
}
REQAT_INLINE float most(float a, float b) {
    const int32_t i = int32_t(float_to_bits(a)), j = int32_t(float_to_bits(b));
    return bits_to_float(uint32_t(i < j ? j : i));
}

// `negative` where the sign bit of x is set, else `positive`.
REQAT_INLINE float by_sign(float x, float positive, float negative) {
    const uint32_t mask = uint32_t(int32_t(float_to_bits(x)) >> 31);
    return bits_to_float((float_to_bits(positive) & ~mask) | (float_to_bits(negative) & mask));
}

// Round t >= 0 to a small float type, saturating; as float.
REQAT_INLINE float round_scale(float t, int32_t mantissa_bits, float smallest_normal, float largest, bool away) {
    t = least(t, largest);
    const float binade = most(binade_of(t), smallest_normal);
    if (away) {
        const float spacing = binade * bits_to_float(uint32_t(127 - mantissa_bits) << 23);
        return float(int32_t(t / spacing + BELOW_HALF)) * spacing;
    }
    const float magic = binade * bits_to_float(uint32_t(127 + 23 - mantissa_bits) << 23);
    return (t + magic) - magic;
}

REQAT_INLINE float round_e4m3(float t) { return round_scale(t, 3, 0x1p-6f, 448.0f, false); }

// The byte of an E8M0 scale for a block whose largest magnitude is amax.
REQAT_INLINE int32_t e8m0_of(const Spec& f, float amax) {
    if (f.rule == CEIL) {
        float q = amax / f.emax;
        q = q <= 0x1p-127f ? 0.0f : q;
        return int32_t((float_to_bits(q) + 0x7FFFFFu) >> 23);
    }
    uint32_t bits = float_to_bits(amax);
    if (f.rule == EVEN) bits += f.element == E2M1 ? 1u << 21 : 1u << 20;
    const int32_t e = int32_t(bits >> 23) - (f.element == E1M2 ? 1 : 2);
    return e < 0 ? 0 : e;
}

// A block's scale: `stored` is what to store (for E8M0 the byte, as a float), x is divided by `divisor` (multiplied,
// under RECIPROCAL), codes are multiplied by `effective`. `expand` is 1.5 for four-over-six's second candidate.
struct BlockScale {
    float stored, effective, divisor;
};

REQAT_INLINE BlockScale block_scale(const Spec& f, float amax, float g, float expand = 1.0f) {
    if (f.scale == E8M0) {
        const int32_t e = e8m0_of(f, amax);
        const uint32_t bits = uint32_t(e) << 23;
        const float S = bits_to_float(bits < 0x400000u ? 0x400000u : bits);
        return {float(e), S, S};
    }
    if (f.rule == NEAREST) {
        float s = amax / f.emax;
        const bool away = f.away && f.asymmetric;
        if (f.scale == E4M3) s = round_scale(s, 3, 0x1p-6f, 448.0f, away);
        if (f.scale == E5M2) s = round_scale(s, 2, 0x1p-14f, 57344.0f, away);
        if (f.scale == FP16) s = round_scale(s, 10, 0x1p-14f, 65504.0f, away);
        s = s <= 0.0f ? 1.0f : s;
        return {s, s, s};
    }
    if (f.rule == RECIPROCAL) {
        const float kept = 1.0f / g;
        float t = (amax / f.emax) / kept;
        t = t < 0x1p-6f ? 0x1p-6f : t;
        const float s = round_e4m3(t);
        float back = 1.0f / kept;
        back = back > FLOAT_MAX ? FLOAT_MAX : back;
        float inverse = back / s;
        inverse = inverse > FLOAT_MAX ? FLOAT_MAX : inverse;
        return {s, s * kept, inverse};
    }
    float t = f.rule == MULTIPLY ? amax * (g / f.emax) : (amax / f.emax) * g;
    t *= expand;
    float s = round_e4m3(t);
    s = s <= 0.0f ? 0.125f : s;
    const float S = s / g;
    return {s, S, S};
}

// The element's value nearest to y, saturating. Zeros are +0.0.
template <int ELEMENT, bool AWAY>
REQAT_INLINE float round_element(float y) {
    constexpr float emax = ELEMENT == E2M1 ? 6.0f : ELEMENT == E1M2 ? 3.5f : 7.0f;
    float magnitude = __builtin_fabsf(y);
    if (AWAY) magnitude = least(magnitude, emax);
    float twice = ELEMENT == INT4 ? 2.0f : 1.0f;  // twice the spacing
    if (ELEMENT == E2M1) twice = least(most(binade_of(magnitude), 1.0f), 4.0f);
    if (AWAY) {
        float inverse = ELEMENT == INT4 ? 1.0f : 2.0f;  // of the spacing 0.5, 1 or 2: exact, and so is the product
        if (ELEMENT == E2M1) inverse = bits_to_float(0x7F000000u - float_to_bits(twice)) * 2.0f;
        magnitude = float(int32_t(magnitude * inverse + BELOW_HALF)) * (twice * 0.5f);
        return __builtin_copysignf(magnitude, y) + 0.0f;  // + 0.0 makes -0.0 positive
    }
    const float magic = twice * 0x1.8p22f;
    y = (y + magic) - magic;
    y = y > emax ? emax : y;
    return y < -emax ? -emax : y;
}

// The code of an element's value; the sign of a float element is that of x (so that a negative zero keeps it).
template <int ELEMENT>
REQAT_INLINE uint8_t encode_element(float value, float x) {
    if (ELEMENT == INT4) return uint8_t(int32_t(value) & 0xF);
    int32_t index = int32_t(__builtin_fabsf(value) * 2.0f);
    if (ELEMENT == E2M1) index -= (index > 4) + (index > 6) + 3 * (index > 8);  // 0 1 2 3 4 6 8 12
    return uint8_t(index | ((float_to_bits(x) >> 31) << 3));
}

// Store a scale (BlockScale::stored) as element `i` of an array of the format's type.
REQAT_INLINE void store_scale(const Spec& f, float stored, void* out, int64_t i) {
    const uint32_t bits = float_to_bits(stored);
    switch (f.scale) {
        case E8M0: static_cast<uint8_t*>(out)[i] = uint8_t(stored); break;
        case E4M3:
            static_cast<uint8_t*>(out)[i] = stored < 0x1p-6f ? uint8_t(stored * 0x1p9f) : uint8_t((bits >> 20) - (120u << 3));
            break;
        case E5M2:
            static_cast<uint8_t*>(out)[i] =
                stored < 0x1p-14f ? uint8_t(stored * 0x1p16f) : uint8_t((bits >> 21) - (112u << 2));
            break;
        case FP16:
            static_cast<uint16_t*>(out)[i] =
                stored < 0x1p-14f ? uint16_t(stored * 0x1p24f) : uint16_t((bits >> 13) - (112u << 10));
            break;
        default: static_cast<float*>(out)[i] = stored;
    }
}

// float16, without the help of the CPU.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // As a float of a far smaller exponent, then scaled: subnormals come out normalized.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// To nearest, ties to even; |value| must be at most 65504.
inline uint16_t float_to_half(float value) {
    const uint32_t sign = (float_to_bits(value) >> 16) & 0x8000u;
    const uint32_t bits = float_to_bits(value) & 0x7FFFFFFFu;
    if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits
        const float shifted = bits_to_float(bits) + 0.5f;
        return uint16_t(sign | (float_to_bits(shifted) - 0x3F000000u));
    }
    return uint16_t(sign | ((bits + 0xFFFu + ((bits >> 13) & 1u) - (112u << 23)) >> 13));
}

}  // namespace reqat
