// Weights in the packed form that kernels stream.
#pragma once

#include <cstdint>

#include "memory.h"
#include "types.h"

namespace tokenmill {

// [outputs x inputs], as panels of 32 outputs (see Multiply in kernels.h for a panel's layout).
// gated: the first half of the outputs are gates, the second the values they multiply; panels of both alternate, so
// that one thread has both sides of a product at hand.
class Matrix {
  public:
    // Throws std::invalid_argument for a gated matrix with an odd number of outputs.
    Matrix(Arena &arena, int outputs, int inputs, Dtype type, bool gated, bool biased);

    int outputs() const { return outputs_; }
    int inputs() const { return inputs_; }
    Dtype type() const { return type_; }
    bool gated() const { return gated_; }
    int panels() const { return panels_; }
    int depth() const { return depth_; }  // inputs, padded as panels are
    std::ptrdiff_t panel_bytes() const;
    std::size_t bytes() const { return memory_.bytes; }

    const void *panel(int index) const { return memory_.data + index * panel_bytes(); }
    // Floats in the order of the panels; null: no bias.
    const float *bias(int panel) const;

    // Rows [start, start + count) of the matrix: [count x inputs] of the matrix's type, row after row.
    void write(int start, int count, const void *rows);
    void read(int start, int count, void *rows) const;
    void write_bias(int start, int count, const float *values);
    void read_bias(int start, int count, float *values) const;

  private:
    struct Place {
        int panel;
        int lane;
    };
    Place place_of(int row) const;

    template <typename Word>
    Word *words(Place place) const;

    int outputs_;
    int inputs_;
    Dtype type_;
    bool gated_;
    int panels_;
    int depth_;
    Arena::Piece memory_;
    Arena::Piece bias_;
};

}  // namespace tokenmill
