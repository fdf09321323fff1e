// Matrix products for AVX-512 without its bf16 instructions. Included inside each ISA's namespace.
//
// A tile of R rows times one panel of 32 outputs lives in 2 R registers; each output is one chain over the depth.

struct FloatPanel {
    static constexpr int ROWS = 13;
    using Weight = float;
    static Vec widened(const Weight *w) { return load(w); }
};

struct HalfPanel {
    static constexpr int ROWS = 13;
    using Weight = std::uint16_t;
    static Vec widened(const Weight *w) { return load_f16(w); }
};

template <typename Panel, int R>
inline void tile(const float *x, std::ptrdiff_t x_stride, const void *panel, int depth, float *out,
                 std::ptrdiff_t out_stride, bool more) {
    Vec left[R];
    Vec right[R];
    start<R>(left, right, out, out_stride, more);
    const auto *w = static_cast<const typename Panel::Weight *>(panel);
    for (int k = 0; k < depth; ++k, w += PANEL) {
        __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD);
        const Vec a = Panel::widened(w);
        const Vec b = Panel::widened(w + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec v = fill(x[r * x_stride + k]);
            left[r] = fused(v, a, left[r]);
            right[r] = fused(v, b, right[r]);
        }
    }
    finish<R>(left, right, out, out_stride);
}

// bf16 weights and inputs, widened: the low half of a word is the even element of the depth.
struct PairPanel {
    static constexpr int ROWS = 10;
};

template <typename Panel, int R>
    requires std::is_same_v<Panel, PairPanel>
inline void tile(const std::uint16_t *x, std::ptrdiff_t x_stride, const void *panel, int depth, float *out,
                 std::ptrdiff_t out_stride, bool more) {
    Vec left[R];
    Vec right[R];
    start<R>(left, right, out, out_stride, more);
    const auto *w = static_cast<const std::uint32_t *>(panel);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
    for (int k = 0; k < depth; k += 2, w += PANEL) {
        __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD);
        __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD + 64);
        const __m512i a = _mm512_loadu_si512(w);
        const __m512i b = _mm512_loadu_si512(w + LANES);
        const Vec even_a = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
        const Vec even_b = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
        const Vec odd_a = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
        const Vec odd_b = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec even = fill(from_bf16(x[r * x_stride + k]));
            const Vec odd = fill(from_bf16(x[r * x_stride + k + 1]));
            left[r] = fused(odd, odd_a, fused(even, even_a, left[r]));
            right[r] = fused(odd, odd_b, fused(even, even_b, right[r]));
        }
    }
    finish<R>(left, right, out, out_stride);
}
