// Norms of layers and pooling. Included inside each ISA's namespace by rows.h.

inline void add_norm(const float *x, const float *weight, float eps, int width, int padded, float *total) {
    Vec squares = zero();
    for (int i = 0; i < padded; i += LANES) {
        const Vec v = load(x + i);
        squares = fused(v, v, squares);
    }
    const Vec scale = fill(1.0F / __builtin_sqrtf(sum_of(squares) / static_cast<float>(width) + eps));
    for (int i = 0; i < padded; i += LANES) {
        store(total + i, add(load(total + i), multiply(multiply(load(x + i), scale), load(weight + i))));
    }
}

// The corrected two-pass algorithm (Chan, Golub, LeVeque 1983): the mean of what is left without the mean, which would be
// 0 but for roundings, corrects both the mean and the variance. A large mean costs no digits.
inline void layer_norm(const float *x, const float *weight, const float *bias, float eps, int width, int padded,
                       float *out, void *narrowed, Dtype type) {
    const int whole = width / LANES * LANES;
    const int rest = width - whole;
    const auto count = static_cast<float>(width);
    Vec sum = rest > 0 ? load_first(x + whole, rest) : zero();
    for (int i = 0; i < whole; i += LANES) {
        sum = add(sum, load(x + i));
    }
    const float about = sum_of(sum) / count;
    const Vec near_mean = fill(about);
    Vec left = zero();
    Vec squares = zero();
    if (rest > 0) {
        left = select(inside(0, 0, rest), subtract(load_first(x + whole, rest), near_mean), zero());
        squares = multiply(left, left);
    }
    for (int i = 0; i < whole; i += LANES) {
        const Vec v = subtract(load(x + i), near_mean);
        left = add(left, v);
        squares = fused(v, v, squares);
    }
    const float correction = sum_of(left) / count;
    const Vec mean = fill(about + correction);
    const Vec scale = fill(1.0F / __builtin_sqrtf(sum_of(squares) / count - correction * correction + eps));
    for (int i = 0; i < padded; i += LANES) {
        Vec v = fused(multiply(subtract(load(x + i), mean), scale), load(weight + i), load(bias + i));
        if (i + LANES > width) {
            v = select(inside(i, 0, width), v, zero());
        }
        store(out + i, v);
        if (narrowed != nullptr) {
            narrow_vec(v, narrowed, i, type);
        }
    }
}

// Rows that are summed by themselves before their sum is added to the others: few roundings follow one another.
constexpr int SUMMED_ROWS = 64;

inline void pool(const float *x, std::ptrdiff_t stride, int rows, int n, bool mean, float *out) {
    for (int channel = 0; channel < n; channel += LANES) {
        const float *column = x + channel;
        Vec result = mean ? zero() : load(column);
        for (int first = 0; first < rows; first += SUMMED_ROWS) {
            const int last = rows - first < SUMMED_ROWS ? rows : first + SUMMED_ROWS;
            Vec part = load(column + first * stride);
            for (int row = first + 1; row < last; ++row) {
                const Vec v = load(column + row * stride);
                part = mean ? add(part, v) : select(unordered(v, v), v, larger(v, part));
            }
            result = mean ? add(result, part) : select(unordered(part, part), part, larger(part, result));
        }
        store(out + channel, mean ? divide(result, fill(static_cast<float>(rows))) : result);
    }
}
