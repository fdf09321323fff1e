// Functions of each entry, as epilogues of products. Included inside each ISA's namespace by rows.h.

// The error function as a rational approximation over [-4, 4], that of Eigen (MathFunctionsImpl.h, generic_fast_erf_float);
// beyond, it is 1 or -1 to float32. Off by less than 5e-7.
inline Vec error_function(Vec x) {
    const Vec bounded = larger(fill(-4.0F), smaller(fill(4.0F), x));  // the order of operands keeps NaN
    const Vec z = multiply(bounded, bounded);
    Vec p = fill(-2.72614225801306e-10F);
    p = fused(p, z, fill(2.77068142495902e-08F));
    p = fused(p, z, fill(-2.10102402082508e-06F));
    p = fused(p, z, fill(-5.69250639462346e-05F));
    p = fused(p, z, fill(-7.34990630326855e-04F));
    p = fused(p, z, fill(-2.95459980854025e-03F));
    p = fused(p, z, fill(-1.60960333262415e-02F));
    Vec q = fill(-1.45660718464996e-05F);
    q = fused(q, z, fill(-2.13374055278905e-04F));
    q = fused(q, z, fill(-1.68282697438203e-03F));
    q = fused(q, z, fill(-7.37332916720468e-03F));
    q = fused(q, z, fill(-1.42647390514189e-02F));
    Vec result = divide(multiply(bounded, p), q);
    result = select(at_least(x, fill(4.0F)), fill(1.0F), result);
    return select(at_least(fill(-4.0F), x), fill(-1.0F), result);
}

// x / (1 + exp(-t)).
inline Vec times_sigmoid(Vec x, Vec t) { return divide(x, add(fill(1.0F), exponential(subtract(zero(), t)))); }

// With Cephes' polynomial (tanhf.c) near 0, where the other form would cancel.
inline Vec hyperbolic_tangent(Vec x) {
    const Vec z = multiply(x, x);
    Vec p = fill(-5.70498872745E-3F);
    p = fused(p, z, fill(2.06390887954E-2F));
    p = fused(p, z, fill(-5.37397155531E-2F));
    p = fused(p, z, fill(1.33314422036E-1F));
    p = fused(p, z, fill(-3.33332819422E-1F));
    const Vec near = fused(multiply(p, z), x, x);
    const Vec far = subtract(fill(1.0F), divide(fill(2.0F), add(exponential(add(x, x)), fill(1.0F))));
    return select(at_least(fill(0.390625F), z), near, far);
}

template <Function F>
inline Vec function_of(Vec x) {
    if constexpr (F == Function::silu) {
        return times_sigmoid(x, x);
    } else if constexpr (F == Function::gelu) {
        const Vec half = multiply(x, fill(0.5F));
        return fused(half, error_function(multiply(x, fill(0.70710678118654752F))), half);
    } else if constexpr (F == Function::gelu_tanh) {
        // (1 + tanh(u)) / 2 is the sigmoid of 2 u.
        const Vec cubic = fused(multiply(multiply(x, x), fill(0.044715F)), x, x);
        return times_sigmoid(x, multiply(cubic, fill(1.59576912160573071F)));
    } else if constexpr (F == Function::relu) {
        return larger(zero(), x);
    } else if constexpr (F == Function::tanh) {
        return hyperbolic_tangent(x);
    } else {
        return x;
    }
}

// Call `work` with the function as a constant.
template <typename Work>
inline void with_function(Function function, const Work &work) {
    switch (function) {
        case Function::identity: work.template operator()<Function::identity>(); break;
        case Function::silu: work.template operator()<Function::silu>(); break;
        case Function::gelu: work.template operator()<Function::gelu>(); break;
        case Function::gelu_tanh: work.template operator()<Function::gelu_tanh>(); break;
        case Function::relu: work.template operator()<Function::relu>(); break;
        case Function::tanh: work.template operator()<Function::tanh>(); break;
    }
}

inline Vec with_bias(const float *x, const float *bias, int i) {
    return bias == nullptr ? load(x + i) : add(load(x + i), load(bias + i));
}

inline void activate_rows(const float *x, std::ptrdiff_t x_stride, int rows, const float *bias, Function function,
                          void *out, std::ptrdiff_t out_stride, Dtype type) {
    const auto line = out_stride * static_cast<std::ptrdiff_t>(size_of(type));
    with_function(function, [&]<Function F>() {
        for (int row = 0; row < rows; ++row) {
            for (int i = 0; i < PANEL; i += LANES) {
                narrow_vec(function_of<F>(with_bias(x + row * x_stride, bias, i)), static_cast<char *>(out) + row * line,
                           i, type);
            }
        }
    });
}

inline void gate_rows(const float *x, std::ptrdiff_t x_stride, int rows, const float *gate_bias, const float *up_bias,
                      Function function, void *out, std::ptrdiff_t out_stride, Dtype type) {
    const auto line = out_stride * static_cast<std::ptrdiff_t>(size_of(type));
    with_function(function, [&]<Function F>() {
        for (int row = 0; row < rows; ++row) {
            const float *from = x + row * x_stride;
            for (int i = 0; i < PANEL; i += LANES) {
                const Vec up = with_bias(from + PANEL, up_bias, i);
                narrow_vec(multiply(function_of<F>(with_bias(from, gate_bias, i)), up),
                           static_cast<char *>(out) + row * line, i, type);
            }
        }
    });
}
