// Attention of few query rows straight from the pool's rows: what packing would store is used from registers instead.
// Every sum has the same terms in the same order as over packed panels, so the bits are the same. Included inside the
// ISA's namespace.

constexpr int FEW_ROWS = 8;
constexpr int MOST_HEAD_BYTES = 2048;
alignas(64) inline const std::uint32_t NO_KEY[MOST_HEAD_BYTES / 4] = {};

// How one word of the depth is added to a sum: a float, or a pair of bf16.
struct FloatWord {
    static constexpr int VALUES = 1;
    static Vec dot(Vec sum, __m512i query, __m512i key) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(query), _mm512_castsi512_ps(key), sum);
    }
};

inline const std::uint32_t *words_of(HeadRows rows, std::int64_t slot) {
    return reinterpret_cast<const std::uint32_t *>(rows.base + slot * rows.slot_stride);
}

// Two groups of 16 keys at a time where the registers hold both: their chains of sums hide each other's latency.
template <typename Word, int R>
inline void few_scores(const FewRows &few, HeadRows keys) {
    constexpr int GROUPS = R <= 5 ? 2 : 1;
    constexpr int KEYS = GROUPS * LANES;
    const int words = few.head_dim / Word::VALUES;
    for (int start = 0; start < few.count; start += KEYS) {
        const std::uint32_t *sources[KEYS];
        for (int i = 0; i < KEYS; ++i) {
            sources[i] = start + i < few.count ? words_of(keys, few.slots[start + i]) : NO_KEY;
        }
        for (int i = 0; i < KEYS; ++i) {
            prefetch(few.ahead, start + i, few.head_dim);
        }
        Vec sums[GROUPS][R];
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                sums[g][r] = zero();
            }
        }
        for (int word = 0; word < words; word += 8) {
            __m512i a[GROUPS][8];
#pragma GCC unroll 2
            for (int g = 0; g < GROUPS; ++g) {
                transposed(sources + g * LANES, word, a[g]);
            }
            const auto *query = static_cast<const std::uint32_t *>(few.rows) + word;
#pragma GCC unroll 8
            for (int w = 0; w < 8; ++w) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const __m512i q = _mm512_set1_epi32(static_cast<int>(query[r * few.row_words + w]));
#pragma GCC unroll 2
                    for (int g = 0; g < GROUPS; ++g) {
                        sums[g][r] = Word::dot(sums[g][r], q, a[g][w]);
                    }
                }
            }
        }
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                store(few.out + r * few.out_stride + start + g * LANES, sums[g][r]);
            }
        }
    }
}

// How values are added to sums of W panels of channels: one key after the other.
template <int W, int R>
inline void few_values_of(const FewRows &few, HeadRows values, int channel, FloatWord, Vec (*sums)[R]) {
    const auto *weights = static_cast<const std::uint32_t *>(few.rows);
    for (int key = 0; key < few.count; ++key) {
        const auto *row = reinterpret_cast<const float *>(words_of(values, few.slots[key])) + channel;
        if (channel == 0) {
            prefetch(few.ahead, key, few.head_dim);
        }
        Vec v[2 * W];
#pragma GCC unroll 4
        for (int i = 0; i < 2 * W; ++i) {
            v[i] = load(row + i * LANES);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec p = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(weights[r * few.row_words + key])));
#pragma GCC unroll 4
            for (int i = 0; i < 2 * W; ++i) {
                sums[i][r] = fused(p, v[i], sums[i][r]);
            }
        }
    }
}

inline void store_few(float *out, FloatWord, Vec first, Vec second) {
    store(out, first);
    store(out + LANES, second);
}

template <typename Word, int W, int R>
inline void few_panels(const FewRows &few, HeadRows values, int channel) {
    Vec sums[2 * W][R];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * W; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            sums[i][r] = zero();
        }
    }
    few_values_of<W, R>(few, values, channel, Word{}, sums);
#pragma GCC unroll 2
    for (int panel = 0; panel < W; ++panel) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            store_few(few.out + r * few.out_stride + channel + panel * PANEL, Word{}, sums[2 * panel][r],
                      sums[2 * panel + 1][r]);
        }
    }
}

// Two panels of channels at a time where the registers hold their sums: both halves of a pair of cache lines.
template <typename Word, int R>
inline void few_values(const FewRows &few, HeadRows values) {
    int channel = 0;
    if constexpr (R <= 5) {
        for (; channel + 2 * PANEL <= few.head_dim; channel += 2 * PANEL) {
            few_panels<Word, 2, R>(few, values, channel);
        }
    }
    for (; channel < few.head_dim; channel += PANEL) {
        few_panels<Word, 1, R>(few, values, channel);
    }
}

template <typename Word, int R>
inline void few_rows_of(const FewRows &few, HeadRows rows, bool scores) {
    if (few.row_count == R) {
        if (scores) {
            few_scores<Word, R>(few, rows);
        } else {
            few_values<Word, R>(few, rows);
        }
    } else if constexpr (R > 1) {
        few_rows_of<Word, R - 1>(few, rows, scores);
    }
}

// Whether rows of the pool can be used as they lie.
inline bool few_fits(const FewRows &few, HeadRows rows, Dtype type) {
    return few.row_count <= FEW_ROWS && rows.type == type && few.head_dim % PANEL == 0 &&
           few.head_dim * static_cast<int>(size_of(type)) <= MOST_HEAD_BYTES;
}

inline bool few_floats(const FewRows &few, HeadRows rows, bool scores) {
    if (!few_fits(few, rows, Dtype::f32)) {
        return false;
    }
    few_rows_of<FloatWord, FEW_ROWS>(few, rows, scores);
    return true;
}
