// Matrix products for AVX2 and FMA. Included inside the ISA's namespace.
//
// Sixteen registers hold a tile of R rows times half a panel; each output is one chain over the depth.

constexpr int HALF = PANEL / 2;

struct FloatPanel {
    static constexpr int ROWS = 6;
    using Weight = float;
    static Vec widened(const Weight *w) { return load(w); }
};

struct HalfPanel {
    static constexpr int ROWS = 6;
    using Weight = std::uint16_t;
    static Vec widened(const Weight *w) { return load_f16(w); }
};

template <typename Panel, int R>
inline void tile(const float *x, std::ptrdiff_t x_stride, const void *panel, int depth, float *out,
                 std::ptrdiff_t out_stride, bool more) {
    for (int side = 0; side < PANEL; side += HALF) {
        Vec left[R];
        Vec right[R];
        start<R>(left, right, out + side, out_stride, more);
        const auto *w = static_cast<const typename Panel::Weight *>(panel) + side;
        for (int k = 0; k < depth; ++k, w += PANEL) {
            __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD);
            const Vec a = Panel::widened(w);
            const Vec b = Panel::widened(w + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec v = fill(x[r * x_stride + k]);
                left[r] = fused(v, a, left[r]);
                right[r] = fused(v, b, right[r]);
            }
        }
        finish<R>(left, right, out + side, out_stride);
    }
}

// bf16 weights and inputs, widened: the low half of a word is the even element of the depth.
struct PairPanel {
    static constexpr int ROWS = 4;
};

template <typename Panel, int R>
    requires std::is_same_v<Panel, PairPanel>
inline void tile(const std::uint16_t *x, std::ptrdiff_t x_stride, const void *panel, int depth, float *out,
                 std::ptrdiff_t out_stride, bool more) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000U));
    for (int side = 0; side < PANEL; side += HALF) {
        Vec left[R];
        Vec right[R];
        start<R>(left, right, out + side, out_stride, more);
        const auto *w = static_cast<const std::uint32_t *>(panel) + side;
        for (int k = 0; k < depth; k += 2, w += PANEL) {
            __builtin_prefetch(reinterpret_cast<const char *>(w) + AHEAD);
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w));
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w + LANES));
            const Vec even_a = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
            const Vec even_b = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
            const Vec odd_a = _mm256_castsi256_ps(_mm256_and_si256(a, upper));
            const Vec odd_b = _mm256_castsi256_ps(_mm256_and_si256(b, upper));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec even = fill(from_bf16(x[r * x_stride + k]));
                const Vec odd = fill(from_bf16(x[r * x_stride + k + 1]));
                left[r] = fused(odd, odd_a, fused(even, even_a, left[r]));
                right[r] = fused(odd, odd_b, fused(even, even_b, right[r]));
            }
        }
        finish<R>(left, right, out + side, out_stride);
    }
}
