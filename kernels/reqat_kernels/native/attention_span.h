// Attention of a block of query rows over one span of tokens, written once for any vector type. attention.cpp includes
// this file once an instruction set, inside a namespace that defines `Lanes` (16 floats) and TARGET (its attribute).

// One block of N query rows (they share a key/value head) over tokens [t0, t1), t0 a multiple of 16.
// partial[row] = {max score, sum of exp(score - max), sum of exp(score - max) * value [D]}.
template <int N>
struct SpanBlock {
    alignas(64) float p[N][SPAN];  // scores, then probabilities
    alignas(64) float weight[16];

    // 1 / g of 16 tokens.
    TARGET static inline Lanes::F inverse_global(const PackedStates& side, int64_t b, int64_t g, int64_t t) {
        if (!side.global_scale) return Lanes::set(1.0f);
        const float* global = side.global_scale + b * side.global_b + g * side.global_g;
        if (side.global_t == 0) return Lanes::set(1.0f / *global);
        if (side.global_t == 1) return Lanes::div(Lanes::set(1.0f), Lanes::load(global + t));
        alignas(64) float lanes[16];
        for (int lane = 0; lane < 16; ++lane) lanes[lane] = 1.0f / global[(t + lane) * side.global_t];
        return Lanes::load(lanes);
    }

    TARGET void scores(const AttentionArgs& a, int64_t b, int64_t g, int64_t row0, int64_t t0, int64_t t1) {
        const int64_t D = a.D, blocks = D / a.key.block, words = a.key.block / 8;
        const float* query = a.query + ((b * a.G + g) * (a.H / a.G) * a.T + row0) * D;
        const int64_t first = (b * a.G + g) * a.tiles + t0 / 16;
        const uint8_t* codes = a.key.codes + first * D * 8;
        const uint8_t* scales = a.key.scales + first * blocks * 16;
        const Lanes::Table table = Lanes::table(ELEMENT_VALUES[a.key.element]);
        const float scaling = a.scaling;
        for (int64_t t = t0; t < t1; t += 16) {
            Lanes::F total[N];
            for (int n = 0; n < N; ++n) total[n] = Lanes::set(0.0f);
            for (int64_t block = 0; block < blocks; ++block, scales += 16) {
                Lanes::F sum[N];
                for (int n = 0; n < N; ++n) sum[n] = Lanes::set(0.0f);
                const float* channel = query + block * a.key.block;
                for (int64_t word = 0; word < words; ++word, codes += 64, channel += 8) {
                    const Lanes::I packed = Lanes::load_codes(codes);
#define REQAT_CHANNEL(c)                                                                             \
    {                                                                                                \
        const Lanes::F k = Lanes::nibble<c>(packed, table);                                          \
        for (int n = 0; n < N; ++n) sum[n] = Lanes::fma(k, Lanes::set(channel[n * D + c]), sum[n]); \
    }
                    REQAT_CHANNEL(0) REQAT_CHANNEL(1) REQAT_CHANNEL(2) REQAT_CHANNEL(3)
                    REQAT_CHANNEL(4) REQAT_CHANNEL(5) REQAT_CHANNEL(6) REQAT_CHANNEL(7)
#undef REQAT_CHANNEL
                }
                const Lanes::F scale = Lanes::scale(scales, a.key.scale);
                for (int n = 0; n < N; ++n) total[n] = Lanes::fma(sum[n], scale, total[n]);
            }
            const Lanes::F factor = Lanes::mul(Lanes::set(scaling), inverse_global(a.key, b, g, t));
            for (int n = 0; n < N; ++n) Lanes::store(p[n] + (t - t0), Lanes::mul(total[n], factor));
        }
    }

    // Minus infinity for what row `row` of the group may not see, and from t1 on.
    TARGET void mask(const AttentionArgs& a, int64_t b, int64_t g, int64_t row0, int64_t t0, int64_t t1) {
        const int64_t padded = (t1 - t0 + 15) / 16 * 16;
        const int64_t begin = a.start ? a.start[b] : 0;
        for (int n = 0; n < N; ++n) {
            const int64_t h = g * (a.H / a.G) + (row0 + n) / a.T, q = (row0 + n) % a.T;
            const int64_t own = a.causal ? a.S - a.T + q + 1 : a.S, end = own < t1 ? own : t1;
            const int64_t offset = b * a.mask_b + h * a.mask_h + q * a.mask_t + t0 * a.mask_s;
            if (a.mask_kind == MASK_BOOL) {
                const uint8_t* allowed = static_cast<const uint8_t*>(a.mask) + offset;
                for (int64_t i = 0; i < t1 - t0; ++i) p[n][i] = allowed[i * a.mask_s] ? p[n][i] : -INFINITY;
            } else if (a.mask_kind == MASK_FLOAT) {
                const float* added = static_cast<const float*>(a.mask) + offset;
                for (int64_t i = 0; i < t1 - t0; ++i) p[n][i] += added[i * a.mask_s];
            }
            for (int64_t i = 0; i < (begin < t1 ? begin : t1) - t0; ++i) p[n][i] = -INFINITY;
            for (int64_t i = (end > t0 ? end : t0) - t0; i < padded; ++i) p[n][i] = -INFINITY;
        }
    }

    // Scores to exp(score - max). NaN in a score makes the row NaN: max skips it or not, exp passes it on.
    TARGET void softmax(int64_t padded, float* partial, int64_t stride) {
        for (int n = 0; n < N; ++n) {
            Lanes::F top = Lanes::set(-INFINITY);
            for (int64_t i = 0; i < padded; i += 16) top = Lanes::max(Lanes::load(p[n] + i), top);
            const float max = Lanes::reduce_max(top);
            // A row that sees nothing here: any finite number in place of the maximum gives exp(-inf) = 0.
            const Lanes::F shift = Lanes::set(max == -INFINITY ? 0.0f : max);
            Lanes::F sum = Lanes::set(0.0f);
            for (int64_t i = 0; i < padded; i += 16) {
                const Lanes::F e = exp_not_positive<Lanes>(Lanes::sub(Lanes::load(p[n] + i), shift));
                Lanes::store(p[n] + i, e);
                sum = Lanes::add(sum, e);
            }
            partial[n * stride] = max;
            partial[n * stride + 1] = Lanes::reduce_add(sum);
        }
    }

    // sum p * v of J planes of channels: J * N accumulators stay in registers over the whole span.
    template <int J>
    TARGET void planes(const AttentionArgs& a, int64_t b, int64_t g, int64_t plane0, int64_t t0, int64_t t1,
                       float* partial, int64_t stride) {
        const int64_t D = a.D, nb = D / 16, blocks = D / a.value.block, per_block = a.value.block / 16;
        const int64_t first = (b * a.G + g) * a.tiles + t0 / 16;
        const uint8_t* codes = a.value.codes + first * D * 8;
        const uint8_t* scales = a.value.scales + first * blocks * 16;
        const Lanes::Table table = Lanes::table(ELEMENT_VALUES[a.value.element]);
        Lanes::F acc[N][J];
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < J; ++j) acc[n][j] = Lanes::set(0.0f);
        alignas(64) float scaled[N][J][16];  // p * s / g
        for (int64_t t = t0; t < t1; t += 16, codes += D * 8, scales += blocks * 16) {
            const int valid = t1 - t < 16 ? int(t1 - t) : 16;
            const Lanes::F inverse = inverse_global(a.value, b, g, t);
            for (int j = 0; j < J; ++j) {
                const Lanes::F scale =
                    Lanes::mul(Lanes::scale(scales + (plane0 + j) / per_block * 16, a.value.scale), inverse);
                for (int n = 0; n < N; ++n)
                    Lanes::store(scaled[n][j], Lanes::mul(Lanes::load(p[n] + (t - t0)), scale));
            }
            // The scales of tokens that are not there yet may be anything: do not multiply by them, stop before.
            for (int token = 0; token < valid; ++token) {
                const int64_t plane = token * nb + plane0;
                const Lanes::I packed = Lanes::shift(Lanes::load_codes(codes + plane / 8 * 64), int(plane % 8) * 4);
#define REQAT_PLANE(j)                                                                                              \
    if constexpr (j < J) {                                                                                          \
        const Lanes::F v = Lanes::nibble<j>(packed, table);                                                         \
        for (int n = 0; n < N; ++n) acc[n][j] = Lanes::fma(v, Lanes::set(scaled[n][j][token]), acc[n][j]);          \
    }
                REQAT_PLANE(0) REQAT_PLANE(1) REQAT_PLANE(2) REQAT_PLANE(3)
#undef REQAT_PLANE
            }
        }
        for (int n = 0; n < N; ++n)
            for (int j = 0; j < J; ++j) Lanes::store(partial + n * stride + 2 + (plane0 + j) * 16, acc[n][j]);
    }

    TARGET void run(const AttentionArgs& a, int64_t b, int64_t g, int64_t row0, int64_t t0, int64_t t1, float* partial,
                    int64_t stride) {
        scores(a, b, g, row0, t0, t1);
        mask(a, b, g, row0, t0, t1);
        softmax((t1 - t0 + 15) / 16 * 16, partial, stride);
        const int64_t nb = a.D / 16;
        // A run of J planes never crosses a 32-bit word: nb is then a multiple of J, and 8 of J.
        constexpr int most = Lanes::ACCUMULATORS / N;
        int64_t j = 0;
        if constexpr (most >= 4)
            if (nb % 4 == 0)
                for (; j < nb; j += 4) planes<4>(a, b, g, j, t0, t1, partial, stride);
        if constexpr (most >= 2)
            if (nb % 2 == 0)
                for (; j < nb; j += 2) planes<2>(a, b, g, j, t0, t1, partial, stride);
        for (; j < nb; ++j) planes<1>(a, b, g, j, t0, t1, partial, stride);
    }
};

template <int N>
TARGET static void run_rows(const AttentionArgs& a, int64_t b, int64_t g, int64_t row0, int64_t t0, int64_t t1,
                            float* partial, int64_t stride) {
    SpanBlock<N> block;
    block.run(a, b, g, row0, t0, t1, partial, stride);
}

// Query rows [row0, row1) of key/value head g over tokens [t0, t1). Up to ROWS at a time: a row's sums are its own,
// whatever rows are computed beside it. Tokens behind the last that any of them sees are left out: they weigh nothing.
TARGET static void span(const AttentionArgs& a, int64_t b, int64_t g, int64_t row0, int64_t row1, int64_t t0, int64_t t1,
                        float* partial, int64_t stride) {
    for (int64_t row = row0; row < row1;) {
        const int64_t left = row1 - row, rows = left >= Lanes::ROWS ? Lanes::ROWS : left < 4 ? left : 4;
        const int64_t end = seen_end(a, b, g, row, rows, t0, t1);
        float* out = partial + (row - row0) * stride;
        if (end <= t0)
            see_nothing(out, rows, stride);
        else if (rows == 1)
            run_rows<1>(a, b, g, row, t0, end, out, stride);
        else if (rows == 2)
            run_rows<2>(a, b, g, row, t0, end, out, stride);
        else if (rows == 3)
            run_rows<3>(a, b, g, row, t0, end, out, stride);
        else if (rows == 4)
            run_rows<4>(a, b, g, row, t0, end, out, stride);
        else if constexpr (Lanes::ROWS == 8)
            run_rows<8>(a, b, g, row, t0, end, out, stride);
        row += rows;
    }
}
