// The same for pairs of bf16. Included inside the ISA's namespace.

struct PairWord {
    static constexpr int VALUES = 2;
    static Vec dot(Vec sum, __m512i query, __m512i key) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(query), reinterpret_cast<__m512bh>(key));
    }
};

template <int W, int R>
inline void few_values_of(const FewRows &few, HeadRows values, int channel, PairWord, Vec (*sums)[R]) {
    const auto *weights = static_cast<const std::uint32_t *>(few.rows);
    for (int key = 0; key < few.count; key += 2) {
        const std::uint32_t *second = key + 1 < few.count ? words_of(values, few.slots[key + 1]) : NO_KEY;
        const auto *even = reinterpret_cast<const std::uint16_t *>(words_of(values, few.slots[key])) + channel;
        const auto *odd = reinterpret_cast<const std::uint16_t *>(second) + channel;
        if (channel == 0) {
            prefetch(few.ahead, key, few.head_dim);
            prefetch(few.ahead, key + 1, few.head_dim);
        }
        __m512i v[2 * W];
#pragma GCC unroll 2
        for (int i = 0; i < W; ++i) {
            const __m512i a = _mm512_loadu_si512(even + i * PANEL);
            const __m512i b = _mm512_loadu_si512(odd + i * PANEL);
            v[2 * i] = _mm512_unpacklo_epi16(a, b);
            v[2 * i + 1] = _mm512_unpackhi_epi16(a, b);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i p = _mm512_set1_epi32(static_cast<int>(weights[r * few.row_words + key / 2]));
#pragma GCC unroll 4
            for (int i = 0; i < 2 * W; ++i) {
                sums[i][r] = PairWord::dot(sums[i][r], p, v[i]);
            }
        }
    }
}

// Interleaving works within 128 bits: `first` has channels 0 to 3, 8 to 11, 16 to 19 and 24 to 27.
inline void store_few(float *out, PairWord, Vec first, Vec second) {
    const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i low = _mm512_castps_si512(first);
    const __m512i high = _mm512_castps_si512(second);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, lower, high));
    _mm512_storeu_si512(out + LANES, _mm512_permutex2var_epi64(low, upper, high));
}

inline bool few_pairs(const FewRows &few, HeadRows rows, bool scores) {
    if (!few_fits(few, rows, Dtype::bf16)) {
        return false;
    }
    few_rows_of<PairWord, FEW_ROWS>(few, rows, scores);
    return true;
}
