#include "attention.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <new>

namespace reqat {
namespace {

// Tokens that are attended to before anything is written down: their scores (float32) stay in the first-level cache.
// The same whatever the batch and the number of threads, so that a row's result depends on neither.
constexpr int64_t SPAN = 512;

// Of more new tokens than these the cache is read again for every BLOCK_ROWS query rows of a key/value head: it comes
// from a near cache then, and what waits to be combined stays small.
constexpr int64_t FEW_TOKENS = 8, BLOCK_ROWS = 8;

// Both zero codes stand for +0.
alignas(64) const float ELEMENT_VALUES[2][16] = {
    {0, .5f, 1, 1.5f, 2, 3, 4, 6, 0, -.5f, -1, -1.5f, -2, -3, -4, -6},
    {0, .5f, 1, 1.5f, 2, 2.5f, 3, 3.5f, 0, -.5f, -1, -1.5f, -2, -2.5f, -3, -3.5f},
};

// exp(x) for x <= 0 (minus infinity and NaN too): 2^n * e^r with |r| <= ln 2 / 2, e^r by a minimax polynomial of degree
// 6 (relative error 2e-9). Within 2 ulps; below 2^-126 it is 0.
constexpr float LOG2E = 0x1.715476p+0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;
constexpr float EXP_C[7] = {0x1p+0f,       0x1p+0f,       0x1.fffffap-2f, 0x1.55540ap-3f,
                            0x1.55589ap-5f, 0x1.126d1ep-7f, 0x1.6ab96ep-10f};
constexpr float EXP_LOWEST = -87.33654f;  // ln 2^-126
constexpr float ROUND = 0x1.8p23f;        // adding it rounds to an integer, and leaves that in the low mantissa bits

// Where the tokens of [t0, t1) end that some of these query rows of a key/value head may see; t0 if there are none, so
// that padding is never read. (Rows of a block may be of two heads: the last tokens of one, the first of the next.)
int64_t seen_end(const AttentionArgs& a, int64_t b, int64_t g, int64_t row0, int64_t rows, int64_t t0, int64_t t1) {
    int64_t end = t0;
    for (int64_t row = row0; row < row0 + rows && end < t1; ++row) {
        const int64_t h = g * (a.H / a.G) + row / a.T, q = row % a.T, last = a.S - a.T + q + 1;
        int64_t own = a.causal && last < t1 ? last : t1;
        if (a.mask_kind == MASK_BOOL) {
            const uint8_t* allowed =
                static_cast<const uint8_t*>(a.mask) + b * a.mask_b + h * a.mask_h + q * a.mask_t;
            while (own > end && !allowed[(own - 1) * a.mask_s]) --own;
        }
        end = own > end ? own : end;
    }
    return a.start && a.start[b] >= end ? t0 : end;
}

void see_nothing(float* partial, int64_t rows, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row) {
        partial[row * stride] = -INFINITY;
        for (int64_t i = 1; i < stride; ++i) partial[row * stride + i] = 0.0f;
    }
}

#if REQAT_X86
#define INLINE inline __attribute__((always_inline))
namespace avx512 {
#define TARGET REQAT_AVX512
struct Lanes {
    using F = __m512;
    using I = __m512i;
    using Table = __m512;
    static constexpr int ROWS = 8, ACCUMULATORS = 16;
    TARGET static INLINE F set(float x) { return _mm512_set1_ps(x); }
    TARGET static INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    TARGET static INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    TARGET static INLINE F add(F x, F y) { return _mm512_add_ps(x, y); }
    TARGET static INLINE F sub(F x, F y) { return _mm512_sub_ps(x, y); }
    TARGET static INLINE F mul(F x, F y) { return _mm512_mul_ps(x, y); }
    TARGET static INLINE F div(F x, F y) { return _mm512_div_ps(x, y); }
    TARGET static INLINE F max(F x, F y) { return _mm512_max_ps(x, y); }
    TARGET static INLINE F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
    TARGET static INLINE float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
    TARGET static INLINE float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
    TARGET static INLINE Table table(const float* values) { return _mm512_load_ps(values); }
    TARGET static INLINE I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    TARGET static INLINE I shift(I x, int bits) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(bits)); }
    // vpermps looks at the low four bits alone: no mask is needed after the shift.
    template <int C>
    TARGET static INLINE F nibble(I x, Table table) {
        return _mm512_permutexvar_ps(C ? _mm512_srli_epi32(x, 4 * C) : x, table);
    }
    TARGET static INLINE F scale(const uint8_t* p, int64_t kind) {
        const I bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        if (kind == E4M3)
            return mul(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 20)), set(0x1p120f));
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(bits, 23), _mm512_set1_epi32(0x400000)));
    }
    // 2^n for the integer that ROUND left in `x`, or 0 where `argument` is too low (not where it is NaN).
    TARGET static INLINE F scale_by_power(F value, F x, F argument) {
        const I n = _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(127)), 23);
        const __mmask16 keep = _mm512_cmp_ps_mask(argument, set(EXP_LOWEST), _CMP_NLT_UQ);
        return _mm512_maskz_mul_ps(keep, value, _mm512_castsi512_ps(n));
    }
};
#include "attention_exp.h"
#include "attention_span.h"
#undef TARGET
}  // namespace avx512

namespace avx2 {
#define TARGET REQAT_AVX2
struct Lanes {
    struct F {
        __m256 low, high;
    };
    struct I {
        __m256i low, high;
    };
    using Table = __m256;
    static constexpr int ROWS = 4, ACCUMULATORS = 1;  // sixteen registers only
    TARGET static INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    TARGET static INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    TARGET static INLINE void store(float* p, F x) {
        _mm256_storeu_ps(p, x.low);
        _mm256_storeu_ps(p + 8, x.high);
    }
    TARGET static INLINE F add(F x, F y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
    TARGET static INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)}; }
    TARGET static INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
    TARGET static INLINE F div(F x, F y) { return {_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)}; }
    TARGET static INLINE F max(F x, F y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }
    TARGET static INLINE F fma(F x, F y, F z) {
        return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
    }
    TARGET static INLINE float reduce_max(F x) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, _mm256_max_ps(x.low, x.high));
        float result = lanes[0];
        for (int lane = 1; lane < 8; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
        return result;
    }
    TARGET static INLINE float reduce_add(F x) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, _mm256_add_ps(x.low, x.high));
        return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
    // The eight magnitudes; the sign is bit 3 of the code.
    TARGET static INLINE Table table(const float* values) { return _mm256_load_ps(values); }
    TARGET static INLINE I load_codes(const uint8_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    TARGET static INLINE I shift(I x, int bits) {
        const __m128i count = _mm_cvtsi32_si128(bits);
        return {_mm256_srl_epi32(x.low, count), _mm256_srl_epi32(x.high, count)};
    }
    template <int C>
    TARGET static INLINE __m256 half(__m256i x, Table table) {
        const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(x, 28 - 4 * C), _mm256_set1_epi32(int(0x80000000)));
        const __m256 magnitude = _mm256_permutevar8x32_ps(table, C ? _mm256_srli_epi32(x, 4 * C) : x);
        return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
    }
    template <int C>
    TARGET static INLINE F nibble(I x, Table table) {
        return {half<C>(x.low, table), half<C>(x.high, table)};
    }
    TARGET static INLINE __m256 scale_half(const uint8_t* p, int64_t kind) {
        const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        if (kind == E4M3)
            return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 20)), _mm256_set1_ps(0x1p120f));
        return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(bits, 23), _mm256_set1_epi32(0x400000)));
    }
    TARGET static INLINE F scale(const uint8_t* p, int64_t kind) { return {scale_half(p, kind), scale_half(p + 8, kind)}; }
    TARGET static INLINE __m256 power_half(__m256 value, __m256 x, __m256 argument) {
        const __m256i n = _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(127)), 23);
        const __m256 keep = _mm256_cmp_ps(argument, _mm256_set1_ps(EXP_LOWEST), _CMP_NLT_UQ);
        return _mm256_and_ps(keep, _mm256_mul_ps(value, _mm256_castsi256_ps(n)));
    }
    TARGET static INLINE F scale_by_power(F value, F x, F argument) {
        return {power_half(value.low, x.low, argument.low), power_half(value.high, x.high, argument.high)};
    }
};
#include "attention_exp.h"
#include "attention_span.h"
#undef TARGET
}  // namespace avx2
#undef INLINE
#endif

namespace portable {
#define TARGET
#define REQAT_EACH for (int i = 0; i < 16; ++i)
struct Lanes {
    struct F {
        float v[16];
    };
    struct I {
        uint32_t v[16];
    };
    using Table = const float*;
    static constexpr int ROWS = 4, ACCUMULATORS = 1;
    static F set(float x) {
        F r;
        REQAT_EACH r.v[i] = x;
        return r;
    }
    static F load(const float* p) {
        F r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
    static F add(F x, const F& y) {
        REQAT_EACH x.v[i] += y.v[i];
        return x;
    }
    static F sub(F x, const F& y) {
        REQAT_EACH x.v[i] -= y.v[i];
        return x;
    }
    static F mul(F x, const F& y) {
        REQAT_EACH x.v[i] *= y.v[i];
        return x;
    }
    static F div(F x, const F& y) {
        REQAT_EACH x.v[i] /= y.v[i];
        return x;
    }
    static F max(F x, const F& y) {
        REQAT_EACH x.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i];
        return x;
    }
    static F fma(const F& x, const F& y, F z) {
        REQAT_EACH z.v[i] += x.v[i] * y.v[i];
        return z;
    }
    static float reduce_max(const F& x) {
        float result = x.v[0];
        REQAT_EACH result = x.v[i] > result ? x.v[i] : result;
        return result;
    }
    static float reduce_add(F x) {
        for (int width = 8; width; width /= 2)
            for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
        return x.v[0];
    }
    static Table table(const float* values) { return values; }
    static I load_codes(const uint8_t* p) {
        I r;
        REQAT_EACH r.v[i] = p[4 * i] | p[4 * i + 1] << 8 | p[4 * i + 2] << 16 | uint32_t(p[4 * i + 3]) << 24;
        return r;
    }
    static I shift(I x, int bits) {
        REQAT_EACH x.v[i] >>= bits;
        return x;
    }
    template <int C>
    static F nibble(const I& x, Table table) {
        F r;
        REQAT_EACH r.v[i] = table[x.v[i] >> 4 * C & 15];
        return r;
    }
    static F scale(const uint8_t* p, int64_t kind) {
        F r;
        if (kind == E4M3)
            REQAT_EACH r.v[i] = e4m3_to_float(p[i]);
        else
            REQAT_EACH r.v[i] = e8m0_to_float(p[i]);
        return r;
    }
    static F scale_by_power(F value, const F& x, const F& argument) {
        REQAT_EACH {
            const float power = bits_to_float((float_to_bits(x.v[i]) + 127) << 23);
            value.v[i] = argument.v[i] < EXP_LOWEST ? 0.0f : value.v[i] * power;
        }
        return value;
    }
};
#undef REQAT_EACH
#include "attention_exp.h"
#include "attention_span.h"
#undef TARGET
}  // namespace portable

using Span = void (*)(const AttentionArgs&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t);

Span choose_span() {
#if REQAT_X86
    if (isa() >= AVX512) return avx512::span;
    if (isa() >= AVX2) return avx2::span;
#endif
    return portable::span;
}

// Weigh the spans of one query row by their maxima: out = sum_i exp(m_i - m) acc_i / sum_i exp(m_i - m) l_i.
void combine(const float* partial, int64_t spans, int64_t span_stride, int64_t D, float* out) {
    float max = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < spans; ++i) {
        const float m = partial[i * span_stride];
        max = m > max ? m : max;
    }
    for (int64_t d = 0; d < D; ++d) out[d] = 0.0f;
    for (int64_t i = 0; i < spans; ++i) {
        const float* part = partial + i * span_stride;
        // A span without anything to see has sum 0, and weight 0 unless every span is so.
        const float weight = part[0] == max ? 1.0f : std::exp(part[0] - max);
        total += weight * part[1];
        for (int64_t d = 0; d < D; ++d) out[d] += weight * part[2 + d];
    }
    if (total == 0.0f) return;  // nothing to attend to: zeros
    for (int64_t d = 0; d < D; ++d) out[d] /= total;
}

// Put a quantized token into its tile; `codes` one a byte. Whoever writes to a tile must be alone with it.
void put_key(const AppendArgs& a, int64_t head, int64_t token, const uint8_t* codes) {
    uint8_t* tile = a.states.codes + (head * a.tiles + token / TILE) * a.D * 8 + token % TILE * 4;
    for (int64_t c = 0; c < a.D; c += 2) tile[c / 8 * 64 + c % 8 / 2] = uint8_t(codes[c] | codes[c + 1] << 4);
}

void put_value(const AppendArgs& a, int64_t head, int64_t token, const uint8_t* codes) {
    const int64_t nb = a.D / 16;
    uint8_t* tile = a.states.codes + (head * a.tiles + token / TILE) * a.D * 8;
    for (int64_t j = 0; j < nb; ++j) {
        const int64_t plane = token % TILE * nb + j;
        uint8_t* word = tile + plane / 8 * 64 + plane % 8 / 2;
        const int shift = plane % 2 ? 4 : 0, other = plane % 2 ? 0x0F : 0xF0;
        for (int lane = 0; lane < 16; ++lane)
            word[lane * 4] = uint8_t((word[lane * 4] & other) | codes[j * 16 + lane] << shift);
    }
}

// Row [D] of the new tokens as float32, shifted.
void load_row(const AppendArgs& a, int64_t head, int64_t t, float* row) {
    const int64_t offset = head / a.G * a.x_b + head % a.G * a.x_g + t * a.x_t;
    if (a.dtype == DTYPE_F32)
        std::memcpy(row, static_cast<const float*>(a.x) + offset, size_t(a.D) * 4);
    else
        for (int64_t c = 0; c < a.D; ++c) {
            const uint16_t bits = static_cast<const uint16_t*>(a.x)[offset + c];
            row[c] = a.dtype == DTYPE_BF16 ? bf16_to_float(bits) : half_to_float(bits);
        }
    if (a.shift)
        for (int64_t c = 0; c < a.D; ++c) row[c] -= a.shift[head % a.G * a.D + c];
}

bool put_row(const AppendArgs& a, int64_t head, int64_t t, float g) {
    float row[MAX_HEAD];
    uint8_t codes[MAX_HEAD], scales[MAX_HEAD / 16];
    load_row(a, head, t, row);
    if (a.spec.global_scale == ROW) {
        const int32_t bits = amax_bits(row, DTYPE_F32, a.D);
        if (bits >= 0x7F800000) return false;
        g = global_scale_of(a.spec, bits_to_float(uint32_t(bits)));
        a.states.global_scale[head / a.G * a.states.global_b + head % a.G * a.states.global_g +
                              (a.start + t) * a.states.global_t] = g;
    }
    RowOut out;
    out.codes = codes;
    out.scales = scales;
    if (!quantize_row(a.spec, row, DTYPE_F32, a.D, g, out)) return false;
    const int64_t token = a.start + t, blocks = a.D / a.states.block;
    (a.is_value ? put_value : put_key)(a, head, token, codes);
    uint8_t* scale = a.states.scales + (head * a.tiles + token / TILE) * blocks * TILE + token % TILE;
    for (int64_t block = 0; block < blocks; ++block) scale[block * TILE] = scales[block];
    return true;
}

// Largest magnitude of this thread's part of the new tokens, as bits.
int32_t amax_of(const AppendArgs& a, const Team& team) {
    int32_t top = 0;
    team.each(a.B * a.G * a.T, [&](int64_t i) {
        float row[MAX_HEAD];
        load_row(a, i / a.T, i % a.T, row);
        const int32_t bits = amax_bits(row, DTYPE_F32, a.D);
        top = bits > top ? bits : top;
    });
    return top;
}

}  // namespace

bool append(const AppendArgs& a, const Team& team) {
    float g = 1.0f;
    if (a.spec.global_scale == STATIC) g = *a.states.global_scale;
    if (a.spec.global_scale == DYNAMIC) {
        const int32_t bits = team.largest(amax_of(a, team));
        if (bits >= 0x7F800000) return false;
        g = global_scale_of(a.spec, bits_to_float(uint32_t(bits)));
        if (team.rank == 0)
            for (int64_t t = a.start; t < a.start + a.T; ++t) a.states.global_scale[t * a.states.global_t] = g;
    }
    const int64_t first = a.start / TILE, tiles = (a.start + a.T + TILE - 1) / TILE - first;
    bool finite = true;
    // A tile is one thread's: its tokens share bytes.
    team.each(a.B * a.G * tiles, [&](int64_t i) {
        const int64_t begin = (first + i % tiles) * TILE - a.start;
        for (int64_t t = begin < 0 ? 0 : begin; t < begin + TILE && t < a.T; ++t)
            if (!put_row(a, i / tiles, t, g)) finite = false;
    });
    return finite;
}

namespace {

// The pieces that attention is computed in. Of few new tokens: spans of the cache for each key/value head, whose sums
// all wait until every thread is done. Of many, a prompt: some query rows of a head, over all spans one after the other.
// A row's sums are the same either way.
struct Pieces {
    const int64_t spans, rows, stride;  // of a key/value head; floats of a row's sums over one span
    const bool by_rows;
    const int64_t blocks, tasks;
    explicit Pieces(const AttentionArgs& a)
        : spans((a.S + SPAN - 1) / SPAN),
          rows(a.H / a.G * a.T),
          stride((a.D + 2 + 15) / 16 * 16),
          by_rows(a.T > FEW_TOKENS),
          blocks((rows + BLOCK_ROWS - 1) / BLOCK_ROWS),
          tasks(a.B * a.G * (by_rows ? blocks : spans)) {}
};

int64_t clipped(int64_t x, int64_t most) { return x < most ? x : most; }

}  // namespace

int64_t attention_floats(const AttentionArgs& a) {
    const Pieces p(a);
    return p.by_rows ? a.threads * p.spans * BLOCK_ROWS * p.stride : p.tasks * p.rows * p.stride;
}

void attend(const AttentionArgs& a, float* memory, const Team& team) {
    const Pieces p(a);
    const Span span = choose_span();
    if (p.by_rows) {
        float* sums = memory + team.rank * p.spans * BLOCK_ROWS * p.stride;
        // In turns: with a causal mask the later rows of a prompt have more to do.
        for (int64_t task = team.rank; task < p.tasks; task += team.threads) {
            const int64_t head = task / p.blocks, row0 = task % p.blocks * BLOCK_ROWS;
            const int64_t row1 = clipped(row0 + BLOCK_ROWS, p.rows);
            for (int64_t i = 0; i < p.spans; ++i)
                span(a, head / a.G, head % a.G, row0, row1, i * SPAN, clipped(i * SPAN + SPAN, a.S),
                     sums + i * BLOCK_ROWS * p.stride, p.stride);
            for (int64_t row = row0; row < row1; ++row)
                combine(sums + (row - row0) * p.stride, p.spans, BLOCK_ROWS * p.stride, a.D,
                        a.out + (head * p.rows + row) * a.D);
        }
        return;
    }
    // One by one in turns: spans that a mask hides cost nothing and stand together.
    for (int64_t task = team.rank; task < p.tasks; task += team.threads) {
        const int64_t head = task / p.spans, t0 = task % p.spans * SPAN;
        span(a, head / a.G, head % a.G, 0, p.rows, t0, clipped(t0 + SPAN, a.S), memory + task * p.rows * p.stride,
             p.stride);
    }
    team.wait();
    team.each(a.B * a.G * p.rows, [&](int64_t row) {
        const int64_t head = row / p.rows;
        combine(memory + (head * p.spans * p.rows + row % p.rows) * p.stride, p.spans, p.rows * p.stride, a.D,
                a.out + row * a.D);
    });
}

}  // namespace reqat

// Quantize new tokens and store them; OK, or NOT_FINITE if a number is not (what was stored of the new tokens is then
// undefined, older tokens are as they were).
REQAT_API int reqat_kv_append(const reqat::AppendArgs* args) {
    return reqat::in_float_mode([&] {
        std::atomic<bool> finite{true};
        reqat::together(int(args->threads), [&](const reqat::Team& team) {
            if (!reqat::append(*args, team)) finite.store(false, std::memory_order_relaxed);
        });
        return finite.load() ? reqat::OK : reqat::NOT_FINITE;
    });
}

// Attention; OK, or NO_MEMORY where there is none for the partial sums.
REQAT_API int reqat_kv_attention(const reqat::AttentionArgs* args) {
    return reqat::in_float_mode([&] {
        const std::unique_ptr<float[]> memory(new (std::nothrow) float[size_t(reqat::attention_floats(*args))]);
        if (!memory) return reqat::NO_MEMORY;
        reqat::together(int(args->threads), [&](const reqat::Team& team) { reqat::attend(*args, memory.get(), team); });
        return reqat::OK;
    });
}

// The exponential of the kernel's softmax, for its test: n a multiple of 16.
REQAT_API void reqat_kv_exp(const float* x, float* out, int64_t n) {
    using namespace reqat;
    const FloatMode mode;
#if REQAT_X86
    if (isa() >= AVX512) return avx512::exp_all<avx512::Lanes>(x, out, n);
    if (isa() >= AVX2) return avx2::exp_all<avx2::Lanes>(x, out, n);
#endif
    portable::exp_all<portable::Lanes>(x, out, n);
}
