// exp(x) for x <= 0, for any vector type: see attention.cpp, which includes this file once an instruction set.
template <class L>
TARGET static inline typename L::F exp_not_positive(typename L::F x) {
    using F = typename L::F;
    // Very low arguments (minus infinity) are kept finite here and made 0 at the end; NaN passes through max's second
    // operand.
    const F low = L::set(EXP_LOWEST - 1.0f);
    const F y = L::max(low, x);
    const F rounded = L::fma(y, L::set(LOG2E), L::set(ROUND));
    const F n = L::sub(rounded, L::set(ROUND));
    const F r = L::fma(n, L::set(-LN2_LOW), L::fma(n, L::set(-LN2_HIGH), y));
    F value = L::set(EXP_C[6]);
    for (int i = 5; i >= 0; --i) value = L::fma(value, r, L::set(EXP_C[i]));
    return L::scale_by_power(value, rounded, x);
}

template <class L>
TARGET static void exp_all(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) L::store(out + i, exp_not_positive<L>(L::load(x + i)));
}
