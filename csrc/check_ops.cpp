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

void check_index(const char *what, std::int64_t index, std::int64_t limit) {
    if (index < 0 || index >= limit) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(index) + " is not in [0, " +
                                    std::to_string(limit) + ")");
    }
}

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
    require(is_float(op.out, op.table->inputs()) && op.first >= 0 &&
                op.first + op.table->outputs() <= op.vocabulary,
            "the buffer or the vocabulary does not fit the table");
    require(!in_head, MISPLACED);
}

void check(const EmbeddingSum &op, bool in_head) {
    const int width = op.tokens->inputs();
    require(is_float(op.out, width) && (op.types == nullptr || op.types->inputs() == width) && op.first >= 0 &&
                op.first + op.tokens->outputs() <= op.vocabulary &&
                (op.positions == nullptr || (op.positions->inputs() == width && op.first_position >= 0 &&
                                             op.first_position < op.positions->outputs())),
            "the buffer and the tables do not fit each other");
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

void check(const AddNorm &op, bool in_head) {
    require(op.weight != nullptr && is_float(op.branch, op.residual->width()) &&
                is_float(op.residual, op.branch->width()) && op.branch != op.residual,
            "the buffers do not fit each other");
    require(!in_head, MISPLACED);
}

void check(const LayerNorm &op, bool in_head) {
    require(op.weight != nullptr && op.bias != nullptr && is_float(op.in, op.out->width()) &&
                is_float(op.out, op.in->width()) &&
                (op.narrowed == nullptr || (op.narrowed->width() == op.in->width() && op.narrowed != op.in &&
                                            op.narrowed != op.out)),
            "the buffers do not fit each other");
    require(!in_head, MISPLACED);
}

void check(const Pool &op, bool in_head) {
    require(is_float(op.in, op.out->width()) && is_float(op.out, op.in->width()), "the buffers do not fit each other");
    require(in_head && !op.in->of_head() && op.out->of_head(), MISPLACED);
}

void check(const Narrow &op, bool in_head) {
    require(is_float(op.in, op.out->width()) && op.in != op.out, "the buffers do not fit each other");
    require(in_head && op.in->of_head() && op.out->of_head(), MISPLACED);
}

void check(const Linear &op, bool in_head) {
    const Dtype wanted = op.weights->type() == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
    const bool gate = op.epilogue == Epilogue::gate;
    require(op.in->width() == op.weights->inputs() && op.in->type() == wanted && gate == op.weights->gated() &&
                op.out->width() == op.weights->outputs() / (gate ? 2 : 1) && op.in != op.out &&
                (op.epilogue != Epilogue::add ||
                 (op.out->type() == Dtype::f32 && op.function == Function::identity)),
            "the buffers do not fit the matrix");
    require(op.picked == in_head && op.in->of_head() == op.picked && op.out->of_head() == op.picked, MISPLACED);
}

void check(const RotaryStore &op, bool in_head) {
    const bool still = op.cosines == nullptr && op.sines == nullptr && op.half == 0;
    const bool turned = op.cosines != nullptr && op.sines != nullptr && op.half > 0 && 2 * op.half <= op.head_dim &&
                        is_float(op.cosines, op.half) && is_float(op.sines, op.half);
    require((still || turned) && fits_heads(op.pool, op.heads, op.kv_heads, op.head_dim) &&
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
    require(op.causal || op.window == 0, "windows do not fit attention that is not causal");
    require(!in_head, MISPLACED);
}

void check(const Inputs &inputs, std::int64_t slots, const Limits &limits) {
    const Sequences &sequences = inputs.sequences;
    check_starts("query_starts", sequences.count, sequences.query_starts, inputs.tokens);
    check_starts("context_starts", sequences.count, sequences.context_starts, slots);
    for (int s = 0; s < sequences.count; ++s) {
        require(sequences.query_starts[s + 1] - sequences.query_starts[s] <=
                    sequences.context_starts[s + 1] - sequences.context_starts[s],
                "a sequence has more new tokens than its context");
    }
    for (int token = 0; token < inputs.tokens; ++token) {
        check_index("token id", inputs.token_ids[token], limits.vocabulary);
        if (limits.positions < std::numeric_limits<std::int64_t>::max()) {
            check_index("position", inputs.positions[token], limits.positions);
        }
        if (inputs.type_ids != nullptr) {
            check_index("type id", inputs.type_ids[token], limits.types);
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

std::vector<std::int64_t> whole_sequences(const Inputs &inputs) {
    const Sequences &sequences = inputs.sequences;
    std::vector<std::int64_t> starts(static_cast<std::size_t>(inputs.tokens), -1);
    for (int s = 0; s < sequences.count; ++s) {
        const std::int64_t start = sequences.query_starts[s];
        const std::int64_t count = sequences.query_starts[s + 1] - start;
        if (count > 0 && count == sequences.context_starts[s + 1] - sequences.context_starts[s]) {
            starts[static_cast<std::size_t>(start + count - 1)] = start;
        }
    }
    return starts;
}

void check_whole(int picked, const std::int64_t *rows, const std::vector<std::int64_t> &row_starts) {
    for (int i = 0; i < picked; ++i) {
        if (row_starts[static_cast<std::size_t>(rows[i])] < 0) {
            throw std::invalid_argument("picked row " + std::to_string(rows[i]) +
                                        " is not the last of a sequence that lies wholly in the step");
        }
    }
}

}  // namespace tokenmill
