// Matrix products of bf16 with AVX512-BF16's dot products. Included inside the ISA's namespace.

struct DotPanel {
    static constexpr int ROWS = 14;
};

template <typename Panel, int R>
    requires std::is_same_v<Panel, DotPanel>
inline void tile(const std::uint16_t *x, std::ptrdiff_t x_stride, const void *panel, int depth, float *out,
                 std::ptrdiff_t out_stride, bool more) {
    Vec left[R];
    Vec right[R];
    start<R>(left, right, out, out_stride, more);
    const auto *w = static_cast<const std::uint32_t *>(panel);
    for (int k = 0; k < depth; k += 2, w += PANEL) {
        __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD);
        __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD + 64);
        const auto a = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
        const auto b = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + LANES));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            int pair;
            std::memcpy(&pair, x + r * x_stride + k, 4);
            const auto v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            left[r] = _mm512_dpbf16_ps(left[r], v, a);
            right[r] = _mm512_dpbf16_ps(right[r], v, b);
        }
    }
    finish<R>(left, right, out, out_stride);
}
