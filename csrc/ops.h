// The ops of a plan but attention: what they are, into how many chunks they fall, and what a chunk does.
#pragma once

#include "kernels.h"
#include "matrix.h"
#include "step.h"

namespace tokenmill {

// Rows of the table for the step's token ids, times `scale`. The table's rows are those of the ids from `first` on; others
// below `vocabulary` give zeros.
struct Embedding {
    const Matrix *table;
    Buffer *out;
    float scale;
    std::int64_t first;
    std::int64_t vocabulary;
};

// The sum of a row of each table: by token id (as above), by position + first_position, and by type id (null: none).
struct EmbeddingSum {
    const Matrix *tokens;
    const Matrix *positions;
    const Matrix *types;
    std::int64_t first_position;
    Buffer *out;
    std::int64_t first;
    std::int64_t vocabulary;
};

// Cosines and sines of the step's positions, times `factor`.
struct Angles {
    const float *inverse;  // [half]
    int half;
    float factor;
    Buffer *cosines;
    Buffer *sines;
};

struct Norm {
    const Buffer *in;
    const float *weight;  // padded as rows are
    float eps;
    Buffer *out;
    bool picked;  // of the picked rows only, one below the other
};

// residual += the RMS norm of a branch.
struct AddNorm {
    const Buffer *branch;
    const float *weight;  // padded as rows are
    float eps;
    Buffer *residual;
};

// `out` may be `in`; `narrowed` gets the same in its own type (null: nothing does).
struct LayerNorm {
    const Buffer *in;
    const float *weight;  // padded as rows are, and so is bias
    const float *bias;
    float eps;
    Buffer *out;
    Buffer *narrowed;
};

// What the head gets of float32 rows: the picked ones (pooling row and first), or the mean or the largest of their
// sequences.
struct Pool {
    const Buffer *in;
    Pooling pooling;
    Buffer *out;
};

// The head's rows in another type.
struct Narrow {
    const Buffer *in;
    Buffer *out;
};

enum class Epilogue { store, add, gate };

struct Linear {
    const Buffer *in;
    const Matrix *weights;
    Buffer *out;
    Epilogue epilogue;
    Function function;  // of what is stored, or of gates
    bool picked;
};

struct RotaryStore {
    const Buffer *projections;  // [tokens, (heads + 2 kv_heads) * head_dim]
    const Buffer *cosines;  // null, and so the sines: nothing is rotated
    const Buffer *sines;
    Buffer *queries;
    const float *q_norm;  // null: none
    const float *k_norm;
    float eps;
    LayerPool pool;
    int heads;
    int kv_heads;
    int head_dim;
    int half;
};

int chunks_of(const Embedding &op, const Inputs &inputs, int threads);
int chunks_of(const EmbeddingSum &op, const Inputs &inputs, int threads);
int chunks_of(const Angles &op, const Inputs &inputs, int threads);
int chunks_of(const Norm &op, const Inputs &inputs, int threads);
int chunks_of(const AddNorm &op, const Inputs &inputs, int threads);
int chunks_of(const LayerNorm &op, const Inputs &inputs, int threads);
int chunks_of(const Pool &op, const Inputs &inputs, int threads);
int chunks_of(const Narrow &op, const Inputs &inputs, int threads);
int chunks_of(const Linear &op, const Inputs &inputs, int threads);
int chunks_of(const RotaryStore &op, const Inputs &inputs, int threads);

// Where an op runs: what does not change between its chunks.
struct Bench {
    const Kernels &kernels;
    const Inputs &inputs;
    int threads;
};

void execute(const Embedding &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const EmbeddingSum &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Angles &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Norm &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const AddNorm &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const LayerNorm &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Pool &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Narrow &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Linear &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const RotaryStore &op, const Bench &bench, int chunk, Scratch &scratch);

// Rows of a product's input, of the type that the weights want; stride in elements.
struct InputRows {
    const char *data;
    std::ptrdiff_t stride;
    int count;
};

// Products of the rows with one panel into `out`, a column of 32 for each row.
void product(const Kernels &kernels, const Matrix &weights, const InputRows &x, int panel, float *out,
             std::ptrdiff_t out_stride);

// Most rows of a chunk of a product, and the bytes of Scratch::tile that they need (two panels of a gated matrix). An
// embedding needs room for a row of its tables besides: as it is, and as floats.
constexpr std::size_t TILE_ROWS_MOST = 112;
constexpr std::size_t TILE_BYTES = TILE_ROWS_MOST * 2 * PANEL * sizeof(float);

}  // namespace tokenmill
