// The loops of quantize.cpp, which includes this file once an instruction set: REQAT_VARIANT names it, REQAT_TARGET is
// the attribute that lets the compiler use it. The code is plain C++ in loops that vectorize, so that all variants do
// the same operations; intrinsics stand only where the compiler needs help.

namespace reqat {
namespace REQAT_VARIANT {

#define REQAT_HERE static inline __attribute__((always_inline)) REQAT_TARGET

// --- types of input and output ---------------------------------------------------------------------------------------

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// n numbers as float32; `buffer` is used where x is not that already.
REQAT_HERE const float* widen(const float* x, int64_t, float*) { return x; }

REQAT_HERE const float* widen(const Bf16* x, int64_t n, float* buffer) {
    for (int64_t i = 0; i < n; i++) buffer[i] = bf16_to_float(x[i].bits);
    return buffer;
}

REQAT_HERE const float* widen(const Half* x, int64_t n, float* buffer) {
    int64_t i = 0;
#if REQAT_LEVEL >= 1
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
    for (; i < n; i++) buffer[i] = half_to_float(x[i].bits);
    return buffer;
}

// Finite float32 numbers to the output's type, saturating, to nearest even.
REQAT_HERE void narrow(const float*, int64_t, float*) {}  // written in place

REQAT_HERE void narrow(const float* y, int64_t n, Bf16* out) {
    constexpr float limit = 0x1.fep127f;
    for (int64_t i = 0; i < n; i++) {
        float value = y[i] > limit ? limit : y[i];
        value = value < -limit ? -limit : value;
        const uint32_t bits = float_to_bits(value);
        out[i].bits = uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
}

REQAT_HERE void narrow(const float* y, int64_t n, Half* out) {
    constexpr float limit = 65504.0f;
    int64_t i = 0;
#if REQAT_LEVEL >= 1
    const __m256 top = _mm256_set1_ps(limit), bottom = _mm256_set1_ps(-limit);
    for (; i + 8 <= n; i += 8) {
        const __m256 value = _mm256_max_ps(_mm256_min_ps(_mm256_loadu_ps(y + i), top), bottom);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; i++) {
        float value = y[i] > limit ? limit : y[i];
        out[i].bits = float_to_half(value < -limit ? -limit : value);
    }
}

// --- largest magnitudes ----------------------------------------------------------------------------------------------
// Bits of |x| compare as integers like the numbers, NaN and infinity at the upper end.

REQAT_HERE int32_t span_amax(const float* x, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = int32_t(float_to_bits(x[i]) & 0x7FFFFFFFu);
        top = bits > top ? bits : top;
    }
    return top;
}

// Numbers of the other sign are negative as integers; NaN of either sign shows in one of the two.
REQAT_HERE void span_signed_amax(const float* x, int64_t n, int32_t* positive, int32_t* negative) {
    int32_t up = *positive, down = *negative;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = int32_t(float_to_bits(x[i])), flipped = int32_t(float_to_bits(x[i]) ^ 0x80000000u);
        up = bits > up ? bits : up;
        down = flipped > down ? flipped : down;
    }
    *positive = up, *negative = down;
}

#if REQAT_LEVEL == 2
// Lane i of the result: the largest |x| of the 16 numbers at x + 16 i. A tree of maxima of interleaved registers, three
// instructions a block where a reduction of each would take nine.
REQAT_HERE __m512i amax_16x16(const float* x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_and_si512(_mm512_loadu_si512(x + 16 * i), magnitude);
    // After the stages lane order is: 32-bit pairs, 64-bit pairs, 128-bit pairs twice.
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xDD));
    return _mm512_max_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xDD));
}
#endif

// amax bits of nb blocks, [nb], or [nb, 2] with signs apart. Returns the largest.
template <class T>
REQAT_HERE int32_t block_amax(const T* x, int64_t nb, int64_t block, bool with_signs, int32_t* amax) {
    alignas(64) float buffer[PIECE];
    int32_t top = 0;
    if (block > PIECE) {
        for (int64_t b = 0; b < nb; b++) {
            int32_t up = 0, down = 0;
            for (int64_t i = 0; i < block; i += PIECE) {
                const int64_t n = block - i < PIECE ? block - i : PIECE;
                const float* y = widen(x + b * block + i, n, buffer);
                if (with_signs) {
                    span_signed_amax(y, n, &up, &down);
                } else {
                    const int32_t here = span_amax(y, n);
                    up = here > up ? here : up;
                }
            }
            if (with_signs) {
                amax[2 * b] = up, amax[2 * b + 1] = down;
            } else {
                amax[b] = up;
            }
        }
    } else {
        const int64_t step = PIECE / block;  // blocks at a time
        for (int64_t first = 0; first < nb; first += step) {
            const int64_t here = nb - first < step ? nb - first : step;
            const float* y = widen(x + first * block, here * block, buffer);
            int64_t b = 0;
            if (with_signs) {
                for (; b < here; b++) {
                    int32_t* pair = amax + 2 * (first + b);
                    pair[0] = pair[1] = 0;
                    span_signed_amax(y + b * block, block, pair, pair + 1);
                }
                continue;
            }
#if REQAT_LEVEL == 2
            if (block == 16)
                for (; b + 16 <= here; b += 16) _mm512_storeu_si512(amax + first + b, amax_16x16(y + 16 * b));
#endif
            if (block == 16) {
                for (; b < here; b++) amax[first + b] = span_amax(y + 16 * b, 16);
            } else if (block == 32) {
                for (; b < here; b++) amax[first + b] = span_amax(y + 32 * b, 32);
            } else {
                for (; b < here; b++) amax[first + b] = span_amax(y + b * block, block);
            }
        }
    }
    for (int64_t i = 0; i < nb * (with_signs ? 2 : 1); i++) top = amax[i] > top ? amax[i] : top;
    return top;
}

// --- scales ----------------------------------------------------------------------------------------------------------

REQAT_HERE void loop_scales(const Spec& f, const float* amax, int64_t n, float g, float expand, float* s, float* S, float* D) {
    for (int64_t i = 0; i < n; i++) {
        const BlockScale scale = block_scale(f, amax[i], g, expand);
        s[i] = scale.stored, S[i] = scale.effective, D[i] = scale.divisor;
    }
}

// A copy of the format with the fields that block_scale() asks for known to the compiler, so that its loops vectorize.
REQAT_HERE Spec known(const Spec& f, int32_t scale, int32_t rule) {
    Spec copy = f;
    copy.scale = scale, copy.rule = rule;
    return copy;
}

REQAT_TARGET static void make_scales(
    const Spec& f, const float* amax, int64_t n, float g, float expand, float* s, float* S, float* D) {
    if (f.scale == E8M0) {
        if (f.rule == CEIL) return loop_scales(known(f, E8M0, CEIL), amax, n, g, expand, s, S, D);
        return loop_scales(f, amax, n, g, expand, s, S, D);
    }
    switch (f.rule) {
        case DIVIDE: return loop_scales(known(f, E4M3, DIVIDE), amax, n, g, expand, s, S, D);
        case MULTIPLY: return loop_scales(known(f, E4M3, MULTIPLY), amax, n, g, expand, s, S, D);
        case RECIPROCAL: return loop_scales(known(f, E4M3, RECIPROCAL), amax, n, g, expand, s, S, D);
        default: break;
    }
    // NEAREST: the scale types of AMXFP4, whose scales round as its elements do, and of INT4, whose scales round to even.
    Spec copy = known(f, f.scale, NEAREST);
    copy.away = f.away && f.asymmetric;
    if (f.scale == FP32) return loop_scales(known(f, FP32, NEAREST), amax, n, g, expand, s, S, D);
#define REQAT_LOOP(SCALE)                                                                 \
    if (f.scale == SCALE) {                                                               \
        copy.scale = SCALE, copy.asymmetric = 1;                                          \
        if (copy.away) {                                                                  \
            copy.away = 1;                                                                \
            return loop_scales(copy, amax, n, g, expand, s, S, D);                        \
        }                                                                                 \
        copy.away = 0;                                                                    \
        return loop_scales(copy, amax, n, g, expand, s, S, D);                            \
    }
    REQAT_LOOP(E5M2)
    REQAT_LOOP(E4M3)
    REQAT_LOOP(FP16)
#undef REQAT_LOOP
}

// Four-over-six: the squared error of 16 numbers at scale S, in units of the block's binade. Which scale wins may hang
// on the last bit, so the order of summation is torch.sum's: eight pairs of lanes, then these one after the other.
template <bool AWAY>
REQAT_HERE float squared_error(const float* x, float S, float inverse_unit) {
    float e[16];
    for (int i = 0; i < 16; i++) {
        const float y = (round_element<E2M1, AWAY>(x[i] / S) * S - x[i]) * inverse_unit;
        e[i] = y * y;
    }
    float sum = 0.0f;
    for (int i = 0; i < 8; i++) sum += e[i] + e[i + 8];
    return sum;
}

template <bool AWAY>
REQAT_TARGET static void choose_four(
    const Spec& f, const float* x, const float* amax, int64_t nb, float g, float* s, float* S, float* D) {
    alignas(64) float s4[MAX_BLOCKS], S4[MAX_BLOCKS], D4[MAX_BLOCKS];
    make_scales(f, amax, nb, g, 1.5f, s4, S4, D4);
    for (int64_t b = 0; b < nb; b++) {
        float unit = binade_of(amax[b]);
        unit = 1.0f / (unit < 0x1p-126f ? 0x1p-126f : unit);
        if (squared_error<AWAY>(x + 16 * b, S4[b], unit) < squared_error<AWAY>(x + 16 * b, S[b], unit))
            s[b] = s4[b], S[b] = S4[b], D[b] = D4[b];
    }
}

// --- rounding --------------------------------------------------------------------------------------------------------

enum Mode { PLAIN, INVERTED, SIGNED };

template <int ELEMENT, bool AWAY, int MODE, bool SCALED>
REQAT_HERE void round_span(const float* x, int64_t n, const float* D, const float* S, float* out) {
    const float d = D[0], d_negative = MODE == SIGNED ? D[1] : 0.0f;
    const float s = S[0], s_negative = MODE == SIGNED ? S[1] : 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float divisor = MODE == SIGNED ? by_sign(x[i], d, d_negative) : d;
        float v = round_element<ELEMENT, AWAY>(MODE == INVERTED ? x[i] * divisor : x[i] / divisor);
        if (SCALED) {
            v *= MODE == SIGNED ? by_sign(v, s, s_negative) : s;
            if (MODE == SIGNED || AWAY) {
                v = __builtin_copysignf(least(__builtin_fabsf(v), FLOAT_MAX), v);
            } else {
                v = v > FLOAT_MAX ? FLOAT_MAX : v;
                v = v < -FLOAT_MAX ? -FLOAT_MAX : v;
            }
        }
        out[i] = v;
    }
}

// `len` numbers in blocks (the last may be cut, where a piece ends): values of the element, or, SCALED, v * S.
template <int ELEMENT, bool AWAY, int MODE, bool SCALED>
REQAT_TARGET static void round_blocks(
    const float* x, int64_t len, int64_t block, const float* D, const float* S, float* out) {
    constexpr int signs = MODE == SIGNED ? 2 : 1;
    if (block == 16) {
        for (int64_t i = 0; i < len; i += 16, D += signs, S += signs)
            round_span<ELEMENT, AWAY, MODE, SCALED>(x + i, 16, D, S, out + i);
    } else if (block == 32) {
        for (int64_t i = 0; i < len; i += 32, D += signs, S += signs)
            round_span<ELEMENT, AWAY, MODE, SCALED>(x + i, 32, D, S, out + i);
    } else {
        for (int64_t i = 0; i < len; i += block, D += signs, S += signs)
            round_span<ELEMENT, AWAY, MODE, SCALED>(x + i, len - i < block ? len - i : block, D, S, out + i);
    }
}

template <bool SCALED>
static RoundBlocks rounding_for(const Spec& f) {
#define REQAT_PICK(ELEMENT, MODE) \
    return f.away ? round_blocks<ELEMENT, true, MODE, SCALED> : round_blocks<ELEMENT, false, MODE, SCALED>
    if (f.element == INT4) REQAT_PICK(INT4, PLAIN);
    if (f.asymmetric) {
        if (f.element == E2M1) REQAT_PICK(E2M1, SIGNED);
        REQAT_PICK(E1M2, SIGNED);
    }
    if (f.rule == RECIPROCAL) {
        if (f.element == E2M1) REQAT_PICK(E2M1, INVERTED);
        REQAT_PICK(E1M2, INVERTED);
    }
    if (f.element == E2M1) REQAT_PICK(E2M1, PLAIN);
    REQAT_PICK(E1M2, PLAIN);
#undef REQAT_PICK
}

// --- codes -----------------------------------------------------------------------------------------------------------

template <int ELEMENT>
REQAT_TARGET static void write_codes(const float* v, const float* x, int64_t n, uint8_t* codes) {
    for (int64_t i = 0; i < n; i++) codes[i] = encode_element<ELEMENT>(v[i], x[i]);
}

REQAT_TARGET static void write_codes_of(int32_t element, const float* v, const float* x, int64_t n, uint8_t* codes) {
    if (element == E2M1) return write_codes<E2M1>(v, x, n, codes);
    if (element == E1M2) return write_codes<E1M2>(v, x, n, codes);
    write_codes<INT4>(v, x, n, codes);
}

REQAT_TARGET static void write_packed(const uint8_t* codes, int64_t n, uint8_t* packed) {
    for (int64_t i = 0; i < n / 2; i++) packed[i] = uint8_t(codes[2 * i] | (codes[2 * i + 1] << 4));
    if (n % 2) packed[n / 2] = codes[n - 1];
}

REQAT_TARGET static void write_doubled(const float* v, int64_t n, bool integer, int8_t* out) {
    const float factor = integer ? 1.0f : 2.0f;
    for (int64_t i = 0; i < n; i++) out[i] = int8_t(int32_t(v[i] * factor));
}

// --- blocks ----------------------------------------------------------------------------------------------------------

// Blocks [first, first + nb) of a row: nb * block <= PIECE, or nb == 1. `amax`, if given, holds their amax bits.
template <class T>
REQAT_TARGET static bool run_blocks(
    const Job& job, int64_t row, int64_t first, int64_t nb, float g, const int32_t* given_amax) {
    const Spec& f = job.spec;
    const int64_t block = job.block, signs = signs_of(f), count = nb * signs;
    const int64_t start = row * job.n + first * block, scale_start = row * scales_of(f, job.n) + first * signs;
    const T* x = static_cast<const T*>(job.x) + start;
    alignas(64) int32_t own_amax[2 * MAX_BLOCKS];
    alignas(64) float s[2 * MAX_BLOCKS], S[2 * MAX_BLOCKS], D[2 * MAX_BLOCKS];
    alignas(64) float wide[PIECE], values[PIECE];
    alignas(64) uint8_t codes[PIECE];

    const int32_t* bits = given_amax;
    if (!bits) {
        if (block_amax(x, nb, block, f.asymmetric, own_amax) >= 0x7F800000) return false;
        bits = own_amax;
    }
    float amax[2 * MAX_BLOCKS];
    std::memcpy(amax, bits, size_t(count) * sizeof(float));
    make_scales(f, amax, count, g, 1.0f, s, S, D);
    if (f.adaptive) {
        const float* y = widen(x, nb * block, wide);
        if (f.away) choose_four<true>(f, y, amax, nb, g, s, S, D);
        else choose_four<false>(f, y, amax, nb, g, s, S, D);
    }
    if (job.out.scales)
        for (int64_t i = 0; i < count; i++) store_scale(f, s[i], job.out.scales, scale_start + i);
    if (job.out.effective) std::memcpy(job.out.effective + scale_start, S, size_t(count) * sizeof(float));

    const bool wants_values = job.out.packed || job.out.codes || job.out.doubled;
    for (int64_t i = 0; i < nb * block; i += PIECE) {
        const int64_t n = nb * block - i < PIECE ? nb * block - i : PIECE;
        const float* y = widen(x + i, n, wide);
        if (wants_values) {
            rounding_for<false>(f)(y, n, block, D, S, values);
            if (job.out.doubled) write_doubled(values, n, f.element == INT4, job.out.doubled + start + i);
            if (job.out.codes || job.out.packed) {
                uint8_t* target = job.out.codes ? job.out.codes + start + i : codes;
                write_codes_of(f.element, values, y, n, target);
                if (job.out.packed) {
                    const int64_t row_bytes = (job.n + 1) / 2;
                    write_packed(target, n, job.out.packed + row * row_bytes + (first * block + i) / 2);
                }
            }
        }
        if (job.out.dequantized) rounding_for<true>(f)(y, n, block, D, S, job.out.dequantized + start + i);
        if (job.fake) {
            T* out = static_cast<T*>(job.fake) + start + i;
            float* target = sizeof(T) == 4 ? reinterpret_cast<float*>(out) : values;
            rounding_for<true>(f)(y, n, block, D, S, target);
            narrow(target, n, out);
        }
    }
    return true;
}

template <class T>
REQAT_TARGET static int32_t run_amax(const void* x, int64_t n) {
    alignas(64) float buffer[PIECE];
    const T* from = static_cast<const T*>(x);
    int32_t top = 0;
    for (int64_t i = 0; i < n; i += PIECE) {
        const int64_t here = n - i < PIECE ? n - i : PIECE;
        const int32_t found = span_amax(widen(from + i, here, buffer), here);
        top = found > top ? found : top;
    }
    return top;
}

template <class T>
REQAT_TARGET static int32_t run_block_amax(const void* x, int64_t first, int64_t nb, int64_t block, bool with_signs, int32_t* amax) {
    return block_amax(static_cast<const T*>(x) + first * block, nb, block, with_signs, amax);
}

static const Loops loops = {
    {run_blocks<float>, run_blocks<Bf16>, run_blocks<Half>},
    {run_amax<float>, run_amax<Bf16>, run_amax<Half>},
    {run_block_amax<float>, run_block_amax<Bf16>, run_block_amax<Half>},
};

#undef REQAT_HERE

}  // namespace REQAT_VARIANT
}  // namespace reqat
