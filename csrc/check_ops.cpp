#include "check_ops.h"

#include <stdexcept>
#include <string>

namespace tokenmill {

namespace {

void require(bool good, const char *otherwise) {
    if (!good) {
        throw std::invalid_argument(otherwise);
    }
}

constexpr const char *MISPLACED = "ops of picked rows come after begin_head, all others before it, with their buffers";

bool is_float(const Buffer *buffer, std::int64_t width) {
    return buffer->type() == Dtype::f32 && buffer->width() == width;
}

bool fits_heads(const LayerPool &pool, int heads, int kv_heads, int head_dim) {
    // A head must fit the room for products, in which it is rotated.
    return kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && head_dim > 0 &&
           static_cast<std::size_t>(head_dim) * sizeof(float) <= TILE_BYTES && pool.keys != nullptr &&
           pool.values != nullptr;
}

std::int64_t padded_width(int heads, int head_dim) { return std::int64_t{heads} * round_up(head_dim, PANEL); }

void check_starts(const char *what, int count, const std::int64_t *starts, std::int64_t end) {
    bool ascending = starts[0] == 0 && starts[count] == end;
    for (int i = 0; i < count; ++i) {
        ascending = ascending && starts[i] <= starts[i + 1];
    }
    if (!ascending) {
        throw std::invalid_argument(std::string(what) + " do not ascend from 0 to " + std::to_string(end));
    }
}

}  // namespace

void check(const Embedding &op, bool in_head) {
    require(is_float(op.out, op.table->inputs()), "the buffer does not fit the table");
    require(!in_head, MISPLACED);
}

void check(const Angles &op, bool in_head) {
    require(op.half > 0 && op.inverse != nullptr && is_float(op.cosines, op.half) && is_float(op.sines, op.half),
            "the buffers do not fit the frequencies");
    require(!in_head, MISPLACED);
}

void check(const Norm &op, bool in_head) {
    require(op.weight != nullptr && is_float(op.in, op.in->width()) && op.out->width() == op.in->width(),
            "the buffers do not fit each other");
    require(op.picked == in_head && !op.in->of_head() && op.out->of_head() == op.picked, MISPLACED);
}

void check(const Linear &op, bool in_head) {
    const Dtype wanted = op.weights->type() == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
    const bool gate = op.epilogue == Epilogue::gate;
    require(op.in->width() == op.weights->inputs() && op.in->type() == wanted && gate == op.weights->gated() &&
                op.out->width() == op.weights->outputs() / (gate ? 2 : 1) && (gate || op.out->type() == Dtype::f32) &&
                op.in != op.out,
            "the buffers do not fit the matrix");
    require(op.picked == in_head && op.in->of_head() == op.picked && op.out->of_head() == op.picked, MISPLACED);
}

void check(const RotaryStore &op, bool in_head) {
    require(fits_heads(op.pool, op.heads, op.kv_heads, op.head_dim) && op.half > 0 && 2 * op.half <= op.head_dim &&
                is_float(op.cosines, op.half) && is_float(op.sines, op.half) &&
                is_float(op.projections, (op.heads + 2LL * op.kv_heads) * op.head_dim) &&
                op.queries->width() == padded_width(op.heads, op.head_dim) &&
                (op.q_norm == nullptr) == (op.k_norm == nullptr),
            "the buffers do not fit the heads");
    require(!in_head, MISPLACED);
}

void check(const Attention &op, bool in_head) {
    require(fits_heads(op.pool, op.heads, op.kv_heads, op.head_dim) && op.window >= 0 &&
                op.queries->width() == padded_width(op.heads, op.head_dim) &&
                op.out->width() == std::int64_t{op.heads} * op.head_dim,
            "the buffers do not fit the heads");
    require(op.queries->type() == Dtype::f32 ||
                (op.queries->type() == Dtype::bf16 && op.pool.type == Dtype::bf16),
            "queries are float32, or bfloat16 as the pool is");
    require(!in_head, MISPLACED);
}

void check(const Inputs &inputs, std::int64_t slots, int vocabulary) {
    const Sequences &sequences = inputs.sequences;
    check_starts("query_starts", sequences.count, sequences.query_starts, inputs.tokens);
    check_starts("context_starts", sequences.count, sequences.context_starts, slots);
    for (int s = 0; s < sequences.count; ++s) {
        require(sequences.query_starts[s + 1] - sequences.query_starts[s] <=
                    sequences.context_starts[s + 1] - sequences.context_starts[s],
                "a sequence has more new tokens than its context");
    }
    for (int token = 0; token < inputs.tokens; ++token) {
        const std::int64_t id = inputs.token_ids[token];
        if (id < 0 || id >= vocabulary) {
            throw std::invalid_argument("token id " + std::to_string(id) + " is not below " +
                                        std::to_string(vocabulary));
        }
    }
    check_picked(inputs.picked, inputs.picked_rows, inputs.tokens);
}

void check_picked(int picked, const std::int64_t *rows, int tokens) {
    for (int i = 0; i < picked; ++i) {
        if (rows[i] < 0 || rows[i] >= tokens) {
            throw std::invalid_argument("picked row " + std::to_string(rows[i]) + " is not one of " +
                                        std::to_string(tokens));
        }
    }
}

}  // namespace tokenmill
