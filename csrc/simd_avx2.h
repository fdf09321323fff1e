// Vectors of eight floats: AVX2, FMA and F16C.
// Included inside a namespace of its own by isa_avx2.cpp.

using Vec = __m256;
using Mask = __m256;
constexpr int LANES = 8;
constexpr int TRANSPOSED_WORDS = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec fill(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }            // a * b + c
inline Vec fused_negative(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
// The second operand where either is NaN.
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Exponents up to 127; below -126 the result is 0.
inline Vec times_power_of_two(Vec a, Vec exponent) {
    exponent = _mm256_max_ps(_mm256_set1_ps(-127.0F), exponent);
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

inline __m256i indices() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
// Lanes whose index, counted from `start`, is in [low, high).
inline Mask inside(int start, int low, int high) {
    const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(start), indices());
    const __m256i from = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(low - 1));
    return _mm256_castsi256_ps(_mm256_and_si256(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(high), index)));
}
// Comparisons; false where either is NaN, which is what `unordered` finds.
inline Mask at_least(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask unordered(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
inline unsigned bits_of(Mask mask) { return static_cast<unsigned>(_mm256_movemask_ps(mask)); }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, mask); }
inline __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), indices()); }
inline Vec load_first(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_first(float *p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }

inline Vec load_bf16(const std::uint16_t *p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load_f16(const std::uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline void store_bf16(std::uint16_t *p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 unordered = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(nan), unordered);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_castsi256_si128(packed));
}
inline void store_f16(std::uint16_t *p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline float sum_of(Vec v) {
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
inline float largest_of(Vec v) {
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

// Add the lanes of v to eight float64 sums.
struct Sums {
    __m256d low = _mm256_setzero_pd();
    __m256d high = _mm256_setzero_pd();
};
inline void add_wide(Sums &sums, Vec v) {
    sums.low = _mm256_add_pd(sums.low, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    sums.high = _mm256_add_pd(sums.high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}
inline double total(const Sums &sums) {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, _mm256_add_pd(sums.low, sums.high));
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// Transpose 32-bit words: out[w * out_stride + i] = rows[i][word + w] for i < 8, w < TRANSPOSED_WORDS.
inline void transpose_words(const std::uint32_t *const *rows, int word, std::uint32_t *out, std::ptrdiff_t out_stride) {
    __m256 a[8];
    __m256 b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm256_loadu_ps(reinterpret_cast<const float *>(rows[i] + word));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
        a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xEE);
        a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
        a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xEE);
    }
    auto *target = reinterpret_cast<float *>(out);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(target + i * out_stride, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
        _mm256_storeu_ps(target + (4 + i) * out_stride, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
    }
}

// Interleave 32 halves of two rows: out[2 i] = a[i], out[2 i + 1] = b[i].
inline void interleave(const std::uint16_t *a, const std::uint16_t *b, std::uint16_t *out) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(a + 16 * i));
        const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b + 16 * i));
        const __m256i low = _mm256_unpacklo_epi16(left, right);
        const __m256i high = _mm256_unpackhi_epi16(left, right);
        auto *target = reinterpret_cast<__m256i *>(out + 32 * i);
        _mm256_storeu_si256(target, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(target + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
}
