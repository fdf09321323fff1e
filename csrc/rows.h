// Kernels on rows, written once over the vectors of simd_*.h. Included inside each ISA's namespace.

inline Vec exponential(Vec x) {
    // exp(x) = 2^n exp(r), |r| <= ln(2) / 2, with Cephes' polynomial (expf.c). exp(0) is exactly 1.
    x = larger(fill(-87.0F), smaller(fill(88.0F), x));  // the order of operands keeps NaN
    const Vec n = nearest(multiply(x, fill(1.44269504088896341F)));
    Vec r = fused_negative(n, fill(0.693359375F), x);
    r = fused_negative(n, fill(-2.12194440e-4F), r);
    Vec p = fill(1.9875691500E-4F);
    p = fused(p, r, fill(1.3981999507E-3F));
    p = fused(p, r, fill(8.3334519073E-3F));
    p = fused(p, r, fill(4.1665795894E-2F));
    p = fused(p, r, fill(1.6666665459E-1F));
    p = fused(p, r, fill(5.0000001201E-1F));
    p = add(fused(multiply(p, r), r, r), fill(1.0F));
    return times_power_of_two(p, n);
}

// 2^x for x <= 0: 2^n 2^r with |r| <= 1/2, the latter by its Taylor series. 2^0 is exactly 1, far below 0 it is 0.
inline Vec exponential2(Vec x) {
    const Vec n = nearest(x);
    const Vec r = subtract(x, n);
    Vec p = fill(1.5403530e-4F);
    p = fused(p, r, fill(1.3333558e-3F));
    p = fused(p, r, fill(9.6181291e-3F));
    p = fused(p, r, fill(5.5504109e-2F));
    p = fused(p, r, fill(2.4022651e-1F));
    p = fused(p, r, fill(6.9314718e-1F));
    p = fused(p, r, fill(1.0F));
    return times_power_of_two(p, n);
}

inline void narrow_vec(Vec v, void *out, int i, Dtype type) {
    switch (type) {
        case Dtype::f32: store(static_cast<float *>(out) + i, v); break;
        case Dtype::bf16: store_bf16(static_cast<std::uint16_t *>(out) + i, v); break;
        case Dtype::f16: store_f16(static_cast<std::uint16_t *>(out) + i, v); break;
    }
}

inline Vec widen_vec(const void *x, int i, Dtype type) {
    switch (type) {
        case Dtype::bf16: return load_bf16(static_cast<const std::uint16_t *>(x) + i);
        case Dtype::f16: return load_f16(static_cast<const std::uint16_t *>(x) + i);
        default: return load(static_cast<const float *>(x) + i);
    }
}

inline void narrow(const float *x, void *out, int n, Dtype type) {
    const int whole = n / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        narrow_vec(load(x + i), out, i, type);
    }
    if (whole < n) {
        alignas(64) float rest[LANES];
        store(rest, load_first(x + whole, n - whole));
        const auto size = static_cast<int>(size_of(type));
        narrow_vec(load(rest), rest, 0, type);
        std::memcpy(static_cast<char *>(out) + whole * size, rest, static_cast<std::size_t>((n - whole) * size));
    }
}

inline void widen(const void *x, Dtype type, float *out, int n) {
    const int whole = n / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        store(out + i, widen_vec(x, i, type));
    }
    if (whole < n) {
        alignas(64) float rest[LANES] = {};
        const auto size = static_cast<int>(size_of(type));
        std::memcpy(rest, static_cast<const char *>(x) + whole * size, static_cast<std::size_t>((n - whole) * size));
        store_first(out + whole, widen_vec(rest, 0, type), n - whole);
    }
}

inline void rms_norm(const float *x, const float *weight, float eps, int width, int padded, void *out, Dtype type) {
    Vec squares = zero();
    for (int i = 0; i < padded; i += LANES) {
        const Vec v = load(x + i);
        squares = fused(v, v, squares);
    }
    const Vec scale = fill(1.0F / __builtin_sqrtf(sum_of(squares) / static_cast<float>(width) + eps));
    for (int i = 0; i < padded; i += LANES) {
        narrow_vec(multiply(multiply(load(x + i), scale), load(weight + i)), out, i, type);
    }
}

inline void head_norm(float *head, const float *weight, float eps, int width) {
    Vec squares = zero();
    for (int i = 0; i < width; i += LANES) {
        const Vec v = load_first(head + i, width - i);
        squares = fused(v, v, squares);
    }
    const Vec scale = fill(1.0F / __builtin_sqrtf(sum_of(squares) / static_cast<float>(width) + eps));
    for (int i = 0; i < width; i += LANES) {
        const Vec scaled = multiply(load_first(head + i, width - i), scale);
        store_first(head + i, multiply(scaled, load_first(weight + i, width - i)), width - i);
    }
}

inline void rotate(float *head, const float *cosines, const float *sines, int half) {
    for (int i = 0; i < half; i += LANES) {
        const int n = half - i;
        const Vec a = load_first(head + i, n);
        const Vec b = load_first(head + half + i, n);
        const Vec c = load_first(cosines + i, n);
        const Vec s = load_first(sines + i, n);
        store_first(head + i, fused_negative(b, s, multiply(a, c)), n);
        store_first(head + half + i, fused(a, s, multiply(b, c)), n);
    }
}

inline void add_to(const float *x, const float *bias, float *out, int n) {
    for (int i = 0; i < n; i += LANES) {
        const Vec v = bias == nullptr ? load(x + i) : add(load(x + i), load(bias + i));
        store(out + i, add(load(out + i), v));
    }
}

#include "activations.h"

// One row of the pool as words that the packed form is made of: pairs of bf16, or floats.
inline const std::uint32_t *row_words(HeadRows rows, std::int64_t slot, int head_dim, Dtype type, float *converted,
                                      int depth) {
    const char *row = rows.base + slot * rows.slot_stride;
    const bool as_it_is = rows.type == type && head_dim == depth;
    if (as_it_is) {
        return reinterpret_cast<const std::uint32_t *>(row);
    }
    std::memset(converted, 0, static_cast<std::size_t>(depth) * 4);
    if (rows.type == type) {
        std::memcpy(converted, row, static_cast<std::size_t>(head_dim) * size_of(type));
    } else {
        widen(row, rows.type, converted, head_dim);  // mixed types are computed in float32
    }
    return reinterpret_cast<const std::uint32_t *>(converted);
}

// Fetch row `index` of what is wanted soon. Always inline: GCC takes a call that only prefetches for one without effect.
__attribute__((always_inline)) inline void prefetch(const Ahead &ahead, int index, int head_dim) {
    if (index >= ahead.count) {
        return;
    }
    const char *row = ahead.rows.base + ahead.slots[index] * ahead.rows.slot_stride;
    const auto bytes = static_cast<std::ptrdiff_t>(head_dim) * static_cast<std::ptrdiff_t>(size_of(ahead.rows.type));
    for (std::ptrdiff_t offset = 0; offset < bytes; offset += 64) {
        __builtin_prefetch(row + offset, 0, 2);  // to the second level: the first has no room for a block
    }
}

inline void pack_keys(HeadRows rows, const std::int64_t *slots, int count, const Ahead &ahead, int head_dim,
                      Dtype type, void *out, float *scratch) {
    const int depth = static_cast<int>(round_up(head_dim, PANEL));
    const int words = type == Dtype::bf16 ? depth / 2 : depth;
    auto *panel = static_cast<std::uint32_t *>(out);
    const int padded = static_cast<int>(round_up(count, PANEL));
    std::memset(scratch, 0, static_cast<std::size_t>(depth) * 4);
    const auto *nothing = reinterpret_cast<const std::uint32_t *>(scratch);
    for (int start = 0; start < padded; start += LANES) {
        const std::uint32_t *sources[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int key = start + i;
            sources[i] = key < count
                             ? row_words(rows, slots[key], head_dim, type, scratch + (1 + i) * depth, depth)
                             : nothing;
            prefetch(ahead, key, head_dim);
        }
        std::uint32_t *target = panel + static_cast<std::ptrdiff_t>(start / PANEL) * words * PANEL + start % PANEL;
        for (int w = 0; w < words; w += TRANSPOSED_WORDS) {
            transpose_words(sources, w, target + static_cast<std::ptrdiff_t>(w) * PANEL, PANEL);
        }
    }
}

inline void pack_values(HeadRows rows, const std::int64_t *slots, int count, const Ahead &ahead, int head_dim,
                        Dtype type, void *out, float *scratch) {
    const int depth = static_cast<int>(round_up(head_dim, PANEL));
    const int padded = static_cast<int>(round_up(count, PANEL));
    std::memset(scratch, 0, static_cast<std::size_t>(depth) * 4);
    const auto *nothing = reinterpret_cast<const std::uint32_t *>(scratch);
    for (int key = 0; key < padded; key += 2) {
        const std::uint32_t *pair[2];
        for (int i = 0; i < 2; ++i) {
            pair[i] = key + i < count
                          ? row_words(rows, slots[key + i], head_dim, type, scratch + (1 + i) * depth, depth)
                          : nothing;
            prefetch(ahead, key + i, head_dim);
        }
        for (int channel = 0; channel < depth; channel += PANEL) {
            const std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(channel) * padded;
            if (type == Dtype::bf16) {
                interleave(reinterpret_cast<const std::uint16_t *>(pair[0]) + channel,
                           reinterpret_cast<const std::uint16_t *>(pair[1]) + channel,
                           static_cast<std::uint16_t *>(out) + panel + static_cast<std::ptrdiff_t>(key) * PANEL);
            } else {
                auto *target = static_cast<std::uint32_t *>(out) + panel + static_cast<std::ptrdiff_t>(key) * PANEL;
                std::memcpy(target, pair[0] + channel, PANEL * 4);
                std::memcpy(target + PANEL, pair[1] + channel, PANEL * 4);
            }
        }
    }
}

inline SoftmaxState softmax(const float *scores, float scale, Visible visible, void *probabilities, Dtype type) {
    // Vectors [begin, whole) and [rest, end) are seen in part, those in between wholly.
    const Vec nothing = fill(NO_SCORE);
    const int begin = visible.low / LANES * LANES;
    const int whole = (visible.low + LANES - 1) / LANES * LANES;
    const int rest = visible.high / LANES * LANES;
    Vec most = nothing;
    for (int i = begin; i < visible.high; i += LANES) {
        const Vec score = load(scores + i);
        const bool partly = i < whole || i >= rest;
        most = larger(most, partly ? select(inside(i, visible.low, visible.high), score, nothing) : score);
    }
    const float largest = visible.low < visible.high ? largest_of(most) * scale : NO_SCORE;
    const Vec scales = fill(scale);
    const Vec offset = fill(-largest);
    Vec sum = zero();
    for (int i = 0; i < begin; i += LANES) {
        narrow_vec(zero(), probabilities, i, type);
    }
    for (int i = begin; i < visible.high; i += LANES) {
        Vec p = exponential2(fused(load(scores + i), scales, offset));
        if (i < whole || i >= rest) {
            p = select(inside(i, visible.low, visible.high), p, zero());
        }
        narrow_vec(p, probabilities, i, type);
        sum = add(sum, p);
    }
    for (int i = (visible.high + LANES - 1) / LANES * LANES; i < visible.padded; i += LANES) {
        narrow_vec(zero(), probabilities, i, type);
    }
    return {largest, sum_of(sum)};
}

inline void combine(SoftmaxColumns known, SoftmaxColumns found, int n, float *old_weights, float *new_weights) {
    for (int i = 0; i < n; i += LANES) {
        const int count = n - i;
        const Vec before = load_first(known.largest + i, count);
        const Vec block = load_first(found.largest + i, count);
        const Vec largest = larger(before, block);
        const Vec old_weight = exponential2(subtract(before, largest));
        const Vec new_weight = exponential2(subtract(block, largest));
        const Vec sum = multiply(load_first(known.sum + i, count), old_weight);
        store_first(known.sum + i, fused(load_first(found.sum + i, count), new_weight, sum), count);
        store_first(known.largest + i, largest, count);
        store_first(old_weights + i, old_weight, count);
        store_first(new_weights + i, new_weight, count);
    }
}

inline void blend(float *total, float a, const float *part, float b, int n) {
    const Vec left = fill(a);
    const Vec right = fill(b);
    for (int i = 0; i < n; i += LANES) {
        store(total + i, fused(load(total + i), left, multiply(load(part + i), right)));
    }
}

#include "layer_rows.h"
#include "logit_rows.h"

inline Kernels table_of(const char *name, Multiply bf16_product, Few few_floats, Few few_pairs) {
    return {
        .name = name,
        .multiply = {&multiply_rows<FloatPanel, float>, bf16_product, &multiply_rows<HalfPanel, float>},
        .few = {few_floats, few_pairs, nullptr},
        .rms_norm = &rms_norm,
        .add_norm = &add_norm,
        .layer_norm = &layer_norm,
        .head_norm = &head_norm,
        .rotate = &rotate,
        .add_to = &add_to,
        .activate = &activate_rows,
        .gate = &gate_rows,
        .pool = &pool,
        .narrow = &narrow,
        .widen = &widen,
        .pack_keys = &pack_keys,
        .pack_values = &pack_values,
        .softmax = &softmax,
        .combine = &combine,
        .blend = &blend,
        .peak = &peak,
        .block_sums = &block_sums,
        .weigh = &weigh,
        .maxima = &maxima,
        .collect = &collect,
    };
}
