// Kernels on rows of logits: a vocabulary wide, of any width. Included by rows.h.

// Entries from i on, `other` past the end of the row.
inline Vec load_or(const float *row, int i, int n, Vec other) {
    return n - i >= LANES ? load(row + i) : select(inside(i, 0, n), load_first(row + i, n - i), other);
}

inline Kernels::Peak peak(const float *row, int n) {
    // First the block that has the largest, so that its index need not be carried along, nor looked for everywhere.
    constexpr int BLOCK = 64 * LANES;
    const Vec nothing = fill(-__builtin_inff());
    float value = -__builtin_inff();
    int where = 0;
    unsigned nans = 0;
    for (int start = 0; start < n; start += BLOCK) {
        const int end = n - start < BLOCK ? n : start + BLOCK;
        Vec most[4] = {nothing, nothing, nothing, nothing};
        int i = start;
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
            const Vec a = load(row + i);
            const Vec b = load(row + i + LANES);
            const Vec c = load(row + i + 2 * LANES);
            const Vec d = load(row + i + 3 * LANES);
            nans |= bits_of(unordered(a, b)) | bits_of(unordered(c, d));
            most[0] = larger(a, most[0]);
            most[1] = larger(b, most[1]);
            most[2] = larger(c, most[2]);
            most[3] = larger(d, most[3]);
        }
        for (; i < end; i += LANES) {
            const Vec v = load_or(row, i, n, nothing);
            nans |= bits_of(unordered(v, v));
            most[0] = larger(v, most[0]);
        }
        const float found = largest_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
        if (found > value) {
            value = found;
            where = start;
        }
    }
    if (nans != 0) {
        return {__builtin_nanf(""), 0};
    }
    for (int i = where;; i += LANES) {
        // The row has the value, so that zeros past its end are never the first that equal it.
        const unsigned hits = bits_of(equal(load_first(row + i, n - i), fill(value)));
        if (hits != 0) {
            return {value, i + __builtin_ctz(hits)};
        }
    }
}

inline Vec weight(Vec entry, Vec largest, Vec temperature) {
    const Vec x = divide(subtract(entry, largest), temperature);
    return select(at_least(x, fill(-87.0F)), exponential(x), zero());
}

inline void block_sums(const float *row, int n, float largest, float temperature, float least, double *out) {
    const Vec nothing = fill(-__builtin_inff());  // its weight is 0
    const Vec most = fill(largest);
    const Vec divisor = fill(temperature);
    const Vec floor = fill(least);
    for (int start = 0; start < n; start += WEIGHT_BLOCK) {
        const int end = n - start < WEIGHT_BLOCK ? n : start + WEIGHT_BLOCK;
        Sums sums;
        for (int i = start; i < end; i += LANES) {
            const Vec w = weight(load_or(row, i, n, nothing), most, divisor);
            add_wide(sums, select(at_least(w, floor), w, zero()));
        }
        *out++ = total(sums);
    }
}

inline void weigh(const float *row, int n, float largest, float temperature, float *out) {
    const Vec most = fill(largest);
    const Vec divisor = fill(temperature);
    for (int i = 0; i < n; i += LANES) {
        store_first(out + i, weight(load_first(row + i, n - i), most, divisor), n - i);
    }
}

inline int maxima(const float *row, int n, int group, float *out) {
    const Vec nothing = fill(-__builtin_inff());
    const int step = group * LANES;
    int count = 0;
    for (int start = 0; start < n; start += step) {
        const int end = n - start < step ? n : start + step;
        Vec most = nothing;
        for (int i = start; i < end; i += LANES) {
            most = larger(load_or(row, i, n, nothing), most);  // of a NaN and `most`, `most`
        }
        store(out + count, most);
        count += LANES;
    }
    return count;
}

inline int collect(const float *row, int n, float threshold, std::uint64_t *out) {
    const Vec least = fill(threshold);
    std::uint64_t *end = out;
    for (int i = 0; i < n; i += LANES) {
        unsigned hits = bits_of(at_least(load_first(row + i, n - i), least));
        if (n - i < LANES) {
            hits &= (1U << (n - i)) - 1U;
        }
        for (; hits != 0; hits &= hits - 1U) {
            const int index = i + __builtin_ctz(hits);
            const float entry = row[index] + 0.0F;  // -0 becomes +0, which it equals
            std::uint32_t bits;
            std::memcpy(&bits, &entry, sizeof(bits));
            bits ^= (bits >> 31) != 0 ? 0xFFFFFFFFU : 0x80000000U;
            *end++ = (std::uint64_t{bits} << 32) | static_cast<std::uint32_t>(~index);
        }
    }
    return static_cast<int>(end - out);
}
