// Vectors of sixteen floats: AVX-512 F, BW, DQ and VL.
// Included inside a namespace of its own by each ISA that has them (see isa_*.cpp).

using Vec = __m512;
using Mask = __mmask16;
constexpr int LANES = 16;
constexpr int TRANSPOSED_WORDS = 8;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec fill(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }           // a * b + c
inline Vec fused_negative(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// The second operand where either is NaN.
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec a, Vec exponent) { return _mm512_scalef_ps(a, exponent); }

inline Mask first(int n) { return static_cast<Mask>(n >= LANES ? 0xFFFFU : (1U << n) - 1U); }
// Lanes whose index, counted from `start`, is in [low, high).
inline Mask inside(int start, int low, int high) {
    const __m512i index = _mm512_add_epi32(
        _mm512_set1_epi32(start), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(low)) &
           _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(high));
}
// Comparisons; false where either is NaN, which is what `unordered` finds.
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline unsigned bits_of(Mask mask) { return mask; }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline Vec load_first(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_first(float *p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

inline Vec load_bf16(const std::uint16_t *p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec load_f16(const std::uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline __m256i rounded_bf16(Vec v) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 unordered = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(unordered, up, nan), 16));
#endif
}
inline void store_bf16(std::uint16_t *p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), rounded_bf16(v));
}
inline void store_f16(std::uint16_t *p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline float sum_of(Vec v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
inline float largest_of(Vec v) { return _mm512_reduce_max_ps(v); }

// Add the lanes of v to sixteen float64 sums.
struct Sums {
    __m512d low = _mm512_setzero_pd();
    __m512d high = _mm512_setzero_pd();
};
inline void add_wide(Sums &sums, Vec v) {
    sums.low = _mm512_add_pd(sums.low, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    sums.high = _mm512_add_pd(sums.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}
inline double total(const Sums &sums) {
    alignas(64) double lanes[8];
    _mm512_store_pd(lanes, _mm512_add_pd(sums.low, sums.high));
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Eight words of 16 rows, transposed in registers: a[w] has word w of row i in lane i.
inline void transposed(const std::uint32_t *const *rows, int word, __m512i *a) {
    // A register has a quarter of the rows in each half; where they stand makes the last shuffle put them in order.
    const auto half = [&](int row) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rows[row] + word));
    };
    __m512i b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(i + 4), 1);
        a[4 + i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(i + 8)), half(i + 12), 1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[i] = b[i];
    }
}

// Transpose 32-bit words: out[w * out_stride + i] = rows[i][word + w] for i < 16, w < TRANSPOSED_WORDS.
inline void transpose_words(const std::uint32_t *const *rows, int word, std::uint32_t *out, std::ptrdiff_t out_stride) {
    __m512i a[TRANSPOSED_WORDS];
    transposed(rows, word, a);
#pragma GCC unroll 8
    for (int w = 0; w < TRANSPOSED_WORDS; ++w) {
        _mm512_storeu_si512(out + w * out_stride, a[w]);
    }
}

// Interleave 32 halves of two rows: out[2 i] = a[i], out[2 i + 1] = b[i].
inline void interleave(const std::uint16_t *a, const std::uint16_t *b, std::uint16_t *out) {
    const __m512i left = _mm512_loadu_si512(a);
    const __m512i right = _mm512_loadu_si512(b);
    const __m512i low = _mm512_unpacklo_epi16(left, right);
    const __m512i high = _mm512_unpackhi_epi16(left, right);
    const __m512i index_low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i index_high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, index_low, high));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(low, index_high, high));
}
