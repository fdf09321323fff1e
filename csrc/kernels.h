// The table of kernels: what each computes. Every ISA fills one table (isa_*.cpp); nothing above it knows of ISAs.
//
// Promise: what a kernel computes for a row depends on that row's numbers and on widths and depths alone, never on how
// many rows come with it. Widths are padded to PANEL with zeros, so that no kernel has a ragged end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace tokenmill {

// out[rows x 32] (+)= x[rows x depth] * panel. Strides in elements. A panel of bf16 weights is [depth / 2][32][2] (the
// layout of VNNI and AMX) with depth a multiple of 32, its x is bf16; one of f32 or f16 weights is [depth][32], its x
// is f32. Each output is one chain of additions over ascending depth. add: go on from what is in `out`.
using Multiply = void (*)(const void *x, std::ptrdiff_t x_stride, int rows, const void *panel, int depth, float *out,
                          std::ptrdiff_t out_stride, bool add);

// The visible keys of a row within a block: [low, high), of which `padded` scores were computed.
struct Visible {
    int low;
    int high;
    int padded;
};

// What the online softmax knows after a block: the largest score, in powers of two (score * scale * log2(e)), and the sum
// of 2^(score - largest); 0: no key seen.
struct SoftmaxState {
    float largest;
    float sum;
};

// The same of many rows.
struct SoftmaxColumns {
    float *largest;
    float *sum;
};

// The largest score where no key was seen: 2^(this - anything) is 0.
constexpr float NO_SCORE = -3.0e38F;

// Rows of a KV pool: one head of one layer. slot_stride in bytes.
struct HeadRows {
    const char *base;
    std::ptrdiff_t slot_stride;
    Dtype type;
};

// Rows of the pool that are wanted soon: those of `count` slots.
struct Ahead {
    HeadRows rows;
    const std::int64_t *slots;
    int count;
};

// Few rows of x (queries, or probabilities of keys) against `count` rows of the pool. row_words: 32-bit words from one
// row of x to the next; out_stride in floats.
struct FewRows {
    const void *rows;
    int row_count;
    int row_words;
    const std::int64_t *slots;
    int count;
    Ahead ahead;
    int head_dim;
    float *out;
    std::ptrdiff_t out_stride;
};

// Scores of queries and keys, or (scores = false) sums of values weighted by probabilities, without packing the pool's
// rows and with the same bits as over packed ones. False, and nothing done, where they must be packed.
using Few = bool (*)(const FewRows &few, HeadRows rows, bool scores);

struct Kernels {
    const char *name;
    Multiply multiply[3];  // by the Dtype of the weights
    Few few[3];            // by the Dtype of rows and pool; null: always pack

    // out = x / sqrt(mean(x^2) + eps) * weight; x, weight: `padded` floats, of which `width` count.
    void (*rms_norm)(const float *x, const float *weight, float eps, int width, int padded, void *out, Dtype type);

    // total += x / sqrt(mean(x^2) + eps) * weight.
    void (*add_norm)(const float *x, const float *weight, float eps, int width, int padded, float *total);

    // (x - mean) / sqrt(variance + eps) * weight + bias of `width` floats, zero up to `padded`, into `out` (perhaps x
    // itself) and, where it is not null, into `narrowed` as well.
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int width, int padded,
                       float *out, void *narrowed, Dtype type);

    // RMS norm in place over a head of any width.
    void (*head_norm)(float *head, const float *weight, float eps, int width);

    // Rotate channel i with channel i + half, for i < half.
    void (*rotate)(float *head, const float *cosines, const float *sines, int half);

    // out += x + bias (bias may be null); n a multiple of 32.
    void (*add_to)(const float *x, const float *bias, float *out, int n);

    // out = function(x + bias) of `rows` rows of 32 values (bias may be null). Strides in elements.
    void (*activate)(const float *x, std::ptrdiff_t x_stride, int rows, const float *bias, Function function, void *out,
                     std::ptrdiff_t out_stride, Dtype type);

    // out = function(gate + gate_bias) * (up + up_bias) of `rows` rows: 32 gates and 32 ups behind them.
    void (*gate)(const float *x, std::ptrdiff_t x_stride, int rows, const float *gate_bias, const float *up_bias,
                 Function function, void *out, std::ptrdiff_t out_stride, Dtype type);

    // The mean (mean = true) or the largest of `rows` rows, at least 1, for each of n channels, n a multiple of 32.
    void (*pool)(const float *x, std::ptrdiff_t stride, int rows, int n, bool mean, float *out);

    // To and from float32, any n.
    void (*narrow)(const float *x, void *out, int n, Dtype type);
    void (*widen)(const void *x, Dtype type, float *out, int n);

    // Keys of `count` slots as panels of 32 keys, [ceil(count / 32)] panels for x of type `type` and depth `depth`
    // (head_dim padded to 32); what is not there is zero. `ahead` is prefetched meanwhile.
    void (*pack_keys)(HeadRows rows, const std::int64_t *slots, int count, const Ahead &ahead, int head_dim, Dtype type,
                      void *out, float *scratch);

    // Values of `count` slots as panels of 32 channels and depth count (padded to 32).
    void (*pack_values)(HeadRows rows, const std::int64_t *slots, int count, const Ahead &ahead, int head_dim,
                        Dtype type, void *out, float *scratch);

    // probabilities = 2^(score * scale - largest) of the visible keys, 0 of the others (`padded` in all).
    SoftmaxState (*softmax)(const float *scores, float scale, Visible visible, void *probabilities, Dtype type);

    // Put what is known of n rows and what a block has found together: `known` becomes that of both, and the weighted
    // values of both are to be multiplied by old_weights and new_weights. n may be any number.
    void (*combine)(SoftmaxColumns known, SoftmaxColumns found, int n, float *old_weights, float *new_weights);

    // total = total * a + part * b; n a multiple of 32.
    void (*blend)(float *total, float a, const float *part, float b, int n);

    // Of row[n], n at least 1: the largest value and the lowest index that has it; NaN and 0 where there is a NaN.
    struct Peak {
        float value;
        int index;
    };
    Peak (*peak)(const float *row, int n);

    // The weight of an entry is exp((entry - largest) / temperature): at most 1, and exactly 0 below exp(-87).
    // out[b] = the sum of the weights of block b of WEIGHT_BLOCK entries, those below `least` left out.
    void (*block_sums)(const float *row, int n, float largest, float temperature, float least, double *out);

    // out = the weights themselves; may be in place.
    void (*weigh)(const float *row, int n, float largest, float temperature, float *out);

    // The largest of each set of `group` entries that lie LANES apart. Returns how many sets there are, padded with
    // minus infinity: less than n / group + 2 LANES. NaN is passed over.
    int (*maxima)(const float *row, int n, int group, float *out);

    // The entries that are at least `threshold` as keys (see ranking.h), by ascending index. Returns their count.
    int (*collect)(const float *row, int n, float threshold, std::uint64_t *out);
};

}  // namespace tokenmill
