// Direct convolution of INT8 or INT4 operands, as a program of many schedules.
//
// A schedule says how one and the same computation is divided: the names in brackets are the knobs of conv.py. What
// the compiler has to know is a macro, so that each candidate of the search is its own small library; the rest is read
// at run time.
//
//   REQAT_ROWS    [rows]    output pixels of a register tile
//   REQAT_COLS    [cols]    groups of 16 output channels of a register tile
//   REQAT_UNROLL  [unroll]  steps of the reduction that are written out
//   REQAT_CONV_ISA          by reqat::Isa, PORTABLE, AVX2 or AVX512: what it is compiled for; it refuses to run on a CPU
//                           without
//
// One step of the reduction is four bytes of the input (4 channels of INT8, 8 of INT4) against 16 * COLS filters. The
// sums of a register tile stay in registers over all taps of the filter and the channels of one pass; between passes
// [passes] they lie in memory. A band [band] of output rows is finished before the next one begins, so that its sums and
// its part of the input stay in the caches. Nothing is unrolled into columns of patches (im2col): a tap of the filter is
// another address of the same pixels.
//
// The input arrives as [H, W, C] and is read where it lies [pack = 0; a table of pointers then knows the border], or is
// copied with its border into a buffer, one band at a time [pack = 1] or the whole of it ahead [pack = 2]. The buffer
// is [pixel, channel] [layout = 0] or divided by the channels of a pass, [pass, pixel, channel] [layout = 1].
//
// The result is rounded to the next layer's input, unsigned with as many bits: max(0, round(sum * scale)), cut off above.
// That and the packing into bytes happens in registers [finish = 0], or in a second sweep over a band's sums [finish = 1].
//
// INT4: two numbers a byte; of 8 channels the first four are the low nibbles of 4 bytes. Inputs are unsigned, weights
// in two's complement. A weight's nibble is left where it is, or moved, to the upper half of its byte, where it counts
// 16 times, sign included, so nothing has to be extended; the scale is divided by 16 for it, which is exact.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../native/common.cpp"  // the code, too: each tile is a library of its own, and one unit compiles in half the time

static_assert(reqat::AVX2 == 1 && reqat::AVX512 == 3, "as the preprocessor compares them with REQAT_CONV_ISA");

namespace {

// Of one convolution; what is in the packed weight and in the buffers follows from it.
struct Problem {
    int32_t height, width, channels, filters, kernel, stride, padding, bits;
    float scale;  // of a sum, for the result
};

struct Schedule {
    int32_t band, passes, pack, layout, finish;
};

enum Pack : int { WHERE_IT_LIES = 0, BY_BAND = 1, AHEAD = 2 };
enum Layout : int { PIXELS = 0, PASSES = 1 };
enum Finish : int { IN_REGISTERS = 0, IN_MEMORY = 1 };
enum Answer : int { DONE = 0, NO_INSTRUCTIONS = 1, NOT_APPLICABLE = 2, OUT_OF_MEMORY = 3 };

constexpr int LANES = 16;        // output channels of a group
constexpr int STEP_BYTES = 4;    // of one pixel's input, in one step
constexpr int GROUP_BYTES = 64;  // of the weight, in one step

}  // namespace

#if REQAT_CONV_ISA == 3
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#elif REQAT_CONV_ISA == 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace {

#if REQAT_CONV_ISA > 0
// 16 results, a byte each, as they lie in memory: for INT4 every second four become the upper halves of the first.
template <int BITS>
inline void put_bytes(uint8_t* out, __m128i v) {
    if (BITS == 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), v);
    } else {
        v = _mm_or_si128(v, _mm_srli_epi64(v, 28));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi32(v, _MM_SHUFFLE(3, 1, 2, 0)));
    }
}
#endif

// 16 sums of 32 bits, and the product of four unsigned bytes, the same for all 16, with four signed bytes each.
#if REQAT_CONV_ISA == 3
constexpr int REGISTERS = 32, REGISTERS_OF_SUMS = 1;

struct Sums {
    __m512i v;
};
struct Bytes {
    __m512i v;
};
inline Sums zero() { return {_mm512_setzero_si512()}; }
inline Sums load(const int32_t* y) { return {_mm512_loadu_si512(y)}; }
inline void store(int32_t* y, Sums a) { _mm512_storeu_si512(y, a.v); }
inline Bytes weights(const uint8_t* w) { return {_mm512_loadu_si512(w)}; }
inline Bytes repeated(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
inline Bytes upper(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(0xF0)))}; }
inline Bytes lower_as_upper(Bytes a) { return upper({_mm512_slli_epi32(a.v, 4)}); }
inline Bytes lower(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(0x0F))}; }
inline Bytes upper_as_lower(Bytes a) { return lower({_mm512_srli_epi32(a.v, 4)}); }
template <int BITS>
inline void multiply_add(Sums& a, Bytes x, Bytes w) {
    a.v = _mm512_dpbusd_epi32(a.v, x.v, w.v);
}
template <int BITS>
inline void finish(uint8_t* out, Sums a, float scale) {
    const __m512i most = _mm512_set1_epi32((1 << BITS) - 1);
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(a.v), _mm512_set1_ps(scale)));
    v = _mm512_min_epi32(_mm512_max_epi32(v, _mm512_setzero_si512()), most);
    put_bytes<BITS>(out, _mm512_cvtepi32_epi8(v));
}
#elif REQAT_CONV_ISA == 1
constexpr int REGISTERS = 16, REGISTERS_OF_SUMS = 2;

struct Sums {
    __m256i v[2];
};
struct Bytes {
    __m256i v[2];
};
inline __m256i at(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void put(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m256i mask(__m256i v, int byte) { return _mm256_and_si256(v, _mm256_set1_epi8(char(byte))); }
inline Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline Sums load(const int32_t* y) { return {{at(y), at(y + 8)}}; }
inline void store(int32_t* y, Sums a) { put(y, a.v[0]), put(y + 8, a.v[1]); }
inline Bytes weights(const uint8_t* w) { return {{at(w), at(w + 32)}}; }
inline Bytes repeated(uint32_t x) { return {{_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}}; }
inline Bytes upper(Bytes a) { return {{mask(a.v[0], 0xF0), mask(a.v[1], 0xF0)}}; }
inline Bytes lower_as_upper(Bytes a) { return upper({{_mm256_slli_epi32(a.v[0], 4), _mm256_slli_epi32(a.v[1], 4)}}); }
inline Bytes lower(Bytes a) { return {{mask(a.v[0], 0x0F), mask(a.v[1], 0x0F)}}; }
inline Bytes upper_as_lower(Bytes a) { return lower({{_mm256_srli_epi32(a.v[0], 4), _mm256_srli_epi32(a.v[1], 4)}}); }
template <int BITS>
inline void multiply_add(Sums& a, Bytes x, Bytes w) {
    for (int i = 0; i < 2; ++i) {
        __m256i sum;
        if (BITS == 4) {  // at most 2 * 15 * 128: within 16 bits
            sum = _mm256_madd_epi16(_mm256_maddubs_epi16(x.v[i], w.v[i]), _mm256_set1_epi16(1));
        } else {  // the instruction above would saturate, so every second byte in turn, as 16 bits
            const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w.v[i], 8), 8);
            const __m256i odd = _mm256_srai_epi16(w.v[i], 8);
            const __m256i x_even = _mm256_and_si256(x.v[i], _mm256_set1_epi16(0xFF));
            const __m256i x_odd = _mm256_srli_epi16(x.v[i], 8);
            sum = _mm256_add_epi32(_mm256_madd_epi16(x_even, even), _mm256_madd_epi16(x_odd, odd));
        }
        a.v[i] = _mm256_add_epi32(a.v[i], sum);
    }
}
template <int BITS>
inline void finish(uint8_t* out, Sums a, float scale) {
    __m256i v[2];
    for (int i = 0; i < 2; ++i) {
        v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(a.v[i]), _mm256_set1_ps(scale)));
        v[i] = _mm256_min_epi32(_mm256_max_epi32(v[i], _mm256_setzero_si256()), _mm256_set1_epi32((1 << BITS) - 1));
    }
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), _MM_SHUFFLE(3, 1, 2, 0));
    put_bytes<BITS>(out, _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}
#else
constexpr int REGISTERS = 1 << 20, REGISTERS_OF_SUMS = 0;  // the compiler's business

struct Sums {
    int32_t v[LANES];
};
struct Bytes {
    uint8_t v[GROUP_BYTES];
};
inline Sums zero() { return {}; }
inline Sums load(const int32_t* y) {
    Sums a;
    std::memcpy(a.v, y, sizeof a.v);
    return a;
}
inline void store(int32_t* y, Sums a) { std::memcpy(y, a.v, sizeof a.v); }
inline Bytes weights(const uint8_t* w) {
    Bytes a;
    std::memcpy(a.v, w, sizeof a.v);
    return a;
}
inline Bytes repeated(uint32_t x) {
    Bytes a;
    for (int i = 0; i < GROUP_BYTES; i += STEP_BYTES) std::memcpy(a.v + i, &x, STEP_BYTES);
    return a;
}
inline Bytes lower(Bytes a) {
    for (uint8_t& v : a.v) v &= 0x0F;
    return a;
}
inline Bytes upper(Bytes a) {
    for (uint8_t& v : a.v) v &= 0xF0;
    return a;
}
inline Bytes lower_as_upper(Bytes a) {
    for (uint8_t& v : a.v) v = uint8_t(v << 4);
    return a;
}
inline Bytes upper_as_lower(Bytes a) {
    for (uint8_t& v : a.v) v = uint8_t(v >> 4);
    return a;
}
template <int BITS>
inline void multiply_add(Sums& a, Bytes x, Bytes w) {
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 4 * lane; i < 4 * lane + 4; ++i) a.v[lane] += int32_t(x.v[i]) * int8_t(w.v[i]);
}
template <int BITS>
inline void finish(uint8_t* out, Sums a, float scale) {
    uint8_t v[LANES];
    for (int lane = 0; lane < LANES; ++lane)
        v[lane] = uint8_t(std::min(std::max(std::nearbyint(float(a.v[lane]) * scale), 0.f), float((1 << BITS) - 1)));
    for (int i = 0; i < LANES * BITS / 8; ++i)
        out[i] = BITS == 8 ? v[i] : uint8_t(v[i / 4 * 8 + i % 4] | v[i / 4 * 8 + i % 4 + 4] << 4);
}
#endif

// One register tile: ROWS pixels, COLS groups of filters, all taps, the steps of one pass.
template <int ROWS, int COLS, int UNROLL, int BITS>
struct Tile {
    // The sums, one register for each group of weights of a step, the input, and for INT4 its other half.
    static_assert(ROWS * COLS * REGISTERS_OF_SUMS + 2 <= REGISTERS, "the sums of this tile do not fit the registers");

    const uint8_t* const* table;  // [taps][ROWS] pointers to the input, or null: then
    const uint8_t* base[ROWS];    // a pixel's input for the first tap, and
    const int32_t* offset;        // [taps], what is added to it for the others
    int32_t* sums[ROWS];          // where the sums of a pixel wait, and
    uint8_t* out[ROWS];           // where its results go
    int taps, steps;

    inline void step(Sums (&sum)[ROWS][COLS], const uint8_t* const (&x)[ROWS], const uint8_t* w, int s) const {
        Bytes part[COLS];
        for (int c = 0; c < COLS; ++c) part[c] = weights(w + (s * COLS + c) * GROUP_BYTES);
        for (int r = 0; r < ROWS; ++r) {
            uint32_t four;
            std::memcpy(&four, x[r] + s * STEP_BYTES, STEP_BYTES);
            const Bytes input = repeated(four);
            for (int c = 0; c < COLS; ++c) {
                if (BITS == 8) {
                    multiply_add<BITS>(sum[r][c], input, part[c]);
                } else {
                    multiply_add<BITS>(sum[r][c], lower(input), lower_as_upper(part[c]));
                    multiply_add<BITS>(sum[r][c], upper_as_lower(input), upper(part[c]));
                }
            }
        }
    }

    // is_first: no sums of earlier passes wait. keep: these are to wait; else they are finished.
    void operator()(const uint8_t* w, int column, bool is_first, bool keep, float scale) const {
        Sums sum[ROWS][COLS];
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c) sum[r][c] = is_first ? zero() : load(sums[r] + column + c * LANES);
        for (int tap = 0; tap < taps; ++tap, w += steps * COLS * GROUP_BYTES) {
            const uint8_t* x[ROWS];
            for (int r = 0; r < ROWS; ++r) x[r] = table ? table[tap * ROWS + r] : base[r] + offset[tap];
            int s = 0;
            for (; s + UNROLL <= steps; s += UNROLL)
                for (int u = 0; u < UNROLL; ++u) step(sum, x, w, s + u);
            for (; s < steps; ++s) step(sum, x, w, s);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < COLS; ++c)
                if (keep) store(sums[r] + column + c * LANES, sum[r][c]);
                else finish<BITS>(out[r] + (column + c * LANES) * BITS / 8, sum[r][c], scale);
    }
};

// What follows from a problem and a schedule.
struct Sizes {
    int out_height, out_width, taps, pixel_bytes, pass_bytes, padded_width;

    Sizes(const Problem& p, const Schedule& s)
        : out_height((p.height + 2 * p.padding - p.kernel) / p.stride + 1),
          out_width((p.width + 2 * p.padding - p.kernel) / p.stride + 1),
          taps(p.kernel * p.kernel),
          pixel_bytes(p.channels * p.bits / 8),
          pass_bytes(pixel_bytes / s.passes),
          padded_width(p.width + 2 * p.padding) {}
};

// Copy `rows` rows of the padded input, from `row` on, into `buffer`, in the layout asked for.
void copy(const Problem& p, const Schedule& s, const Sizes& z, const uint8_t* x, int row, int rows, uint8_t* buffer) {
    const int passes = s.layout == PASSES ? s.passes : 1, bytes = z.pixel_bytes / passes;
    for (int pass = 0; pass < passes; ++pass)
        for (int r = row; r < row + rows; ++r) {
            const int from = r - p.padding;
            if (from < 0 || from >= p.height) {
                std::memset(buffer, 0, size_t(z.padded_width) * bytes);
                buffer += size_t(z.padded_width) * bytes;
                continue;
            }
            std::memset(buffer, 0, size_t(p.padding) * bytes);
            buffer += size_t(p.padding) * bytes;
            const uint8_t* source = x + size_t(from) * p.width * z.pixel_bytes + pass * bytes;
            if (passes == 1) {
                std::memcpy(buffer, source, size_t(p.width) * bytes);
                buffer += size_t(p.width) * bytes;
            } else {
                for (int q = 0; q < p.width; ++q, buffer += bytes) std::memcpy(buffer, source + q * z.pixel_bytes, bytes);
            }
            std::memset(buffer, 0, size_t(p.padding) * bytes);
            buffer += size_t(p.padding) * bytes;
        }
}

template <int ROWS, int COLS, int UNROLL, int BITS>
void convolve(const Problem& p, const Schedule& s, const uint8_t* x, const uint8_t* w, uint8_t* y) {
    const Sizes z(p, s);
    const int band = s.band ? std::min(s.band, z.out_height) : z.out_height;
    const int copied = s.pack == AHEAD ? p.height + 2 * p.padding : (band - 1) * p.stride + p.kernel;
    // Bytes from one pixel, and row of pixels, to the next in the buffer.
    const int pixel = s.layout == PASSES ? z.pass_bytes : z.pixel_bytes;
    const size_t row = size_t(z.padded_width) * pixel;
    // A workspace that stays: a call pays for no page of fresh memory.
    static thread_local std::vector<uint8_t> buffer, nothing, no_results;  // nothing: what lies beyond the border
    static thread_local std::vector<int32_t> sums, no_sums, offset;        // no_sums: of pixels that there are not
    static thread_local std::vector<Tile<ROWS, COLS, UNROLL, BITS>> tiles;
    static thread_local std::vector<const uint8_t*> table;
    const int most = (band * z.out_width + ROWS - 1) / ROWS;
    if (s.pack == WHERE_IT_LIES) table.resize(size_t(most) * ROWS * z.taps);
    else buffer.resize(size_t(copied) * z.padded_width * z.pixel_bytes);
    nothing.resize(z.pixel_bytes);  // zeros, never written
    no_results.resize(p.filters), no_sums.resize(p.filters), offset.resize(z.taps), tiles.resize(most);
    const bool waits = s.passes > 1 || s.finish == IN_MEMORY;
    if (waits) sums.resize(size_t(band) * z.out_width * p.filters);
    const float scale = BITS == 4 ? p.scale / 16 : p.scale;
    const int out_bytes = p.filters * BITS / 8;  // of a pixel
    for (int tap = 0; tap < z.taps; ++tap) offset[tap] = int32_t(tap / p.kernel * row + tap % p.kernel * pixel);
    const size_t panel = size_t(z.taps) * (z.pass_bytes / STEP_BYTES) * COLS * GROUP_BYTES;  // of one pass
    if (s.pack == AHEAD) copy(p, s, z, x, 0, copied, buffer.data());
    for (int top = 0; top < z.out_height; top += band) {
        const int pixels = std::min(band, z.out_height - top) * z.out_width, count = (pixels + ROWS - 1) / ROWS;
        const int first_row = s.pack == AHEAD ? 0 : top * p.stride;
        const int rows = std::min(copied, p.height + 2 * p.padding - first_row);
        const size_t pass = s.layout == PASSES ? row * rows : z.pass_bytes;  // bytes from one pass to the next
        if (s.pack == BY_BAND) copy(p, s, z, x, first_row, rows, buffer.data());
        for (int number = 0; number < s.passes; ++number) {
            for (int t = 0; t < count; ++t) {
                auto& tile = tiles[t];
                tile.taps = z.taps;
                tile.steps = z.pass_bytes / STEP_BYTES;
                tile.offset = offset.data();
                tile.table = s.pack == WHERE_IT_LIES ? table.data() + size_t(t) * ROWS * z.taps : nullptr;
                for (int r = 0; r < ROWS; ++r) {
                    const int i = std::min(t * ROWS + r, pixels - 1);  // a pixel too many computes the last one again
                    const int out_row = top + i / z.out_width, out_column = i % z.out_width;
                    const bool is_there = t * ROWS + r < pixels;
                    tile.out[r] = is_there ? y + (size_t(top) * z.out_width + i) * out_bytes : no_results.data();
                    tile.sums[r] = is_there && waits ? sums.data() + size_t(i) * p.filters : no_sums.data();
                    const int in_row = out_row * p.stride, in_column = out_column * p.stride;  // with the border
                    if (s.pack != WHERE_IT_LIES) {
                        tile.base[r] = buffer.data() + number * pass + (in_row - first_row) * row + in_column * pixel;
                        continue;
                    }
                    for (int tap = 0; tap < z.taps; ++tap) {
                        const int a = in_row + tap / p.kernel - p.padding, b = in_column + tap % p.kernel - p.padding;
                        const bool inside = a >= 0 && a < p.height && b >= 0 && b < p.width;
                        const uint8_t* at = inside ? x + (size_t(a) * p.width + b) * z.pixel_bytes : nothing.data();
                        table[(size_t(t) * z.taps + tap) * ROWS + r] = at + number * z.pass_bytes;
                    }
                }
            }
            const bool keep = number < s.passes - 1 || s.finish == IN_MEMORY;
            for (int column = 0; column < p.filters; column += COLS * LANES) {
                const uint8_t* part = w + (size_t(column / (COLS * LANES)) * s.passes + number) * panel;
                for (int t = 0; t < count; ++t) tiles[t](part, column, number == 0, keep, scale);
            }
        }
        if (s.finish == IN_MEMORY) {
            uint8_t* out = y + size_t(top) * z.out_width * out_bytes;
            for (int i = 0; i < pixels * p.filters; i += LANES)
                finish<BITS>(out + size_t(i) * BITS / 8, load(sums.data() + i), scale);
        }
    }
}

}  // namespace

#if REQAT_CONV_ISA > 0
#pragma GCC pop_options
#endif

// y [out pixels, filters] = the rounded convolution of x [height, width, channels], both unsigned, with w, signed.
//   w: [filters / (16 * cols)][passes][taps][steps of a pass][cols][16 filters][4 bytes], as conv.py packs it.
// Returns an Answer; nothing has been written unless it is DONE.
REQAT_API int reqat_conv(const Problem* p, const Schedule* s, const uint8_t* x, const uint8_t* w, uint8_t* y) {
    if (reqat::lack(REQAT_CONV_ISA)) return NO_INSTRUCTIONS;
    const int step = STEP_BYTES * 8 / p->bits;  // channels
    if (p->filters % (REQAT_COLS * LANES) || s->passes < 1 || p->channels % (s->passes * step)) return NOT_APPLICABLE;
    if (s->pack == WHERE_IT_LIES && s->layout != PIXELS) return NOT_APPLICABLE;
    try {
        if (p->bits == 8)
            convolve<REQAT_ROWS, REQAT_COLS, REQAT_UNROLL, 8>(*p, *s, x, w, y);
        else
            convolve<REQAT_ROWS, REQAT_COLS, REQAT_UNROLL, 4>(*p, *s, x, w, y);
    } catch (const std::bad_alloc&) {
        return OUT_OF_MEMORY;
    }
    return DONE;
}
