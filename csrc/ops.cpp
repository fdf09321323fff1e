#include "ops.h"

#include <algorithm>
#include <cmath>

#include "chunks.h"
#include "team.h"

namespace tokenmill {

namespace {

// Depth whose panels stay in the second-level cache while all tiles of a chunk pass over them.
constexpr int DEPTH_BLOCK = 8192;

// Channels of a sequence that a chunk pools.
constexpr int POOLED_CHANNELS = 128;

// How a product is cut: chunk c has the rows of c / panel_chunks and the panels of c % panel_chunks.
struct Cut {
    int rows_each;
    int panels_each;
    int panel_chunks;
    int row_chunks;
};

Cut cut(const Linear &op, int rows, int threads) {
    const int row_chunks = divided(rows, static_cast<int>(TILE_ROWS_MOST));
    const int panels = panels_per_chunk(op.weights->panels(), row_chunks, op.weights->panel_bytes(),
                                        op.weights->gated() ? 2 : 1, threads, Team::MOST_CHUNKS);
    return {divided(rows, row_chunks), panels, divided(op.weights->panels(), panels), row_chunks};
}

int rows_in(const Linear &op, const Inputs &inputs) { return op.picked ? inputs.picked : inputs.tokens; }

// Products of rows [first, first + rows) with one panel into `out`.
void product(const Linear &op, const Kernels &kernels, int first, int rows, int panel, float *out,
             std::ptrdiff_t out_stride) {
    product(kernels, *op.weights, {op.in->row(first), op.in->stride(), rows}, panel, out, out_stride);
}

void run_panel(const Linear &op, const Kernels &kernels, int first, int rows, int panel, float *tile) {
    const float *bias = op.weights->bias(panel);
    const std::ptrdiff_t column = static_cast<std::ptrdiff_t>(panel) * PANEL;
    const auto size = static_cast<std::ptrdiff_t>(size_of(op.out->type()));
    if (op.epilogue == Epilogue::gate) {
        constexpr std::ptrdiff_t WIDE = 2 * PANEL;
        product(op, kernels, first, rows, panel, tile, WIDE);
        product(op, kernels, first, rows, panel + 1, tile + PANEL, WIDE);
        kernels.gate(tile, WIDE, rows, bias, op.weights->bias(panel + 1), op.function,
                     op.out->row(first) + column / 2 * size, op.out->stride(), op.out->type());
        return;
    }
    if (op.epilogue == Epilogue::add) {
        product(op, kernels, first, rows, panel, tile, PANEL);
        for (int r = 0; r < rows; ++r) {
            kernels.add_to(tile + r * PANEL, bias, op.out->row<float>(first + r) + column, PANEL);
        }
        return;
    }
    if (bias == nullptr && op.function == Function::identity && op.out->type() == Dtype::f32) {
        product(op, kernels, first, rows, panel, op.out->row<float>(first) + column, op.out->stride());
        return;
    }
    product(op, kernels, first, rows, panel, tile, PANEL);
    kernels.activate(tile, PANEL, rows, bias, op.function, op.out->row(first) + column * size, op.out->stride(),
                     op.out->type());
}

// A row of a table as floats; zeros for an index that it does not reach to. row: room for it as it is stored.
void read_row(const Matrix &table, const Kernels &kernels, std::int64_t index, char *row, float *out) {
    if (index < 0 || index >= table.outputs()) {
        std::fill_n(out, table.inputs(), 0.0F);
        return;
    }
    table.read(static_cast<int>(index), 1, row);
    kernels.widen(row, table.type(), out, table.inputs());
}

// Zeros behind the row: what is added may leave NaN there.
void clear_padding(const Buffer &buffer, int row) {
    auto *out = buffer.row<float>(row);
    std::fill(out + buffer.width(), out + buffer.padded(), 0.0F);
}

}  // namespace

void product(const Kernels &kernels, const Matrix &weights, const InputRows &x, int panel, float *out,
             std::ptrdiff_t out_stride) {
    const Multiply multiply = kernels.multiply[static_cast<int>(weights.type())];
    const int depth = weights.depth();
    const auto *from = static_cast<const char *>(weights.panel(panel));
    const std::ptrdiff_t line = weights.panel_bytes() / depth;
    const std::ptrdiff_t size = weights.type() == Dtype::bf16 ? 2 : 4;
    for (int k = 0; k < depth; k += DEPTH_BLOCK) {
        multiply(x.data + k * size, x.stride, x.count, from + k * line, std::min(DEPTH_BLOCK, depth - k), out,
                 out_stride, k > 0);
    }
}

int chunks_of(const Embedding &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const Embedding &op, const Bench &bench, int chunk, Scratch &scratch) {
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    char *row = scratch.tile.as<char>();
    for (int token = first; token < last; ++token) {
        auto *out = op.out->row<float>(token);
        read_row(*op.table, bench.kernels, bench.inputs.token_ids[token] - op.first, row, out);
        clear_padding(*op.out, token);
        if (op.scale != 1.0F) {
            bench.kernels.blend(out, op.scale, out, 0.0F, op.out->padded());
        }
    }
}

int chunks_of(const EmbeddingSum &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const EmbeddingSum &op, const Bench &bench, int chunk, Scratch &scratch) {
    const Inputs &inputs = bench.inputs;
    const auto [first, last] = rows_of(chunk, inputs.tokens, bench.threads);
    const int padded = op.out->padded();
    auto *part = scratch.tile.as<float>();
    auto *row = reinterpret_cast<char *>(part + padded);
    std::fill(part, part + padded, 0.0F);
    for (int token = first; token < last; ++token) {
        auto *out = op.out->row<float>(token);
        read_row(*op.tokens, bench.kernels, inputs.token_ids[token] - op.first, row, out);
        clear_padding(*op.out, token);
        if (op.types != nullptr) {
            read_row(*op.types, bench.kernels, inputs.type_ids == nullptr ? 0 : inputs.type_ids[token], row, part);
            bench.kernels.add_to(part, nullptr, out, padded);
        }
        if (op.positions != nullptr) {
            read_row(*op.positions, bench.kernels, inputs.positions[token] + op.first_position, row, part);
            bench.kernels.add_to(part, nullptr, out, padded);
        }
    }
}

int chunks_of(const Angles &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const Angles &op, const Bench &bench, int chunk, Scratch &) {
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    for (int token = first; token < last; ++token) {
        const auto position = static_cast<float>(bench.inputs.positions[token]);
        auto *cosines = op.cosines->row<float>(token);
        auto *sines = op.sines->row<float>(token);
        for (int i = 0; i < op.half; ++i) {
            const float angle = position * op.inverse[i];
            cosines[i] = std::cos(angle) * op.factor;
            sines[i] = std::sin(angle) * op.factor;
        }
    }
}

int chunks_of(const Norm &op, const Inputs &inputs, int threads) {
    return row_chunks(op.picked ? inputs.picked : inputs.tokens, threads);
}

void execute(const Norm &op, const Bench &bench, int chunk, Scratch &) {
    const int rows = op.picked ? bench.inputs.picked : bench.inputs.tokens;
    const auto [first, last] = rows_of(chunk, rows, bench.threads);
    for (int row = first; row < last; ++row) {
        const std::ptrdiff_t from = op.picked ? bench.inputs.picked_rows[row] : row;
        bench.kernels.rms_norm(op.in->row<float>(from), op.weight, op.eps, op.in->width(), op.in->padded(),
                               op.out->row(row), op.out->type());
    }
}

int chunks_of(const AddNorm &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const AddNorm &op, const Bench &bench, int chunk, Scratch &) {
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    for (int row = first; row < last; ++row) {
        bench.kernels.add_norm(op.branch->row<float>(row), op.weight, op.eps, op.branch->width(), op.branch->padded(),
                               op.residual->row<float>(row));
    }
}

int chunks_of(const LayerNorm &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const LayerNorm &op, const Bench &bench, int chunk, Scratch &) {
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    for (int row = first; row < last; ++row) {
        bench.kernels.layer_norm(op.in->row<float>(row), op.weight, op.bias, op.eps, op.in->width(), op.in->padded(),
                                 op.out->row<float>(row), op.narrowed == nullptr ? nullptr : op.narrowed->row(row),
                                 op.narrowed == nullptr ? Dtype::f32 : op.narrowed->type());
    }
}

int chunks_of(const Pool &op, const Inputs &inputs, int threads) {
    return row_chunks(inputs.picked, threads) * divided(op.in->padded(), POOLED_CHANNELS);
}

void execute(const Pool &op, const Bench &bench, int chunk, Scratch &) {
    const int blocks = divided(op.in->padded(), POOLED_CHANNELS);
    const auto [first, last] = rows_of(chunk / blocks, bench.inputs.picked, bench.threads);
    const int channel = chunk % blocks * POOLED_CHANNELS;
    const int channels = std::min(POOLED_CHANNELS, op.in->padded() - channel);
    for (int i = first; i < last; ++i) {
        const std::int64_t row = bench.inputs.picked_rows[i];
        const float *from = op.in->row<float>(row) + channel;
        float *out = op.out->row<float>(i) + channel;
        if (op.pooling == Pooling::mean || op.pooling == Pooling::max) {
            const std::int64_t start = bench.inputs.picked_starts[i];
            bench.kernels.pool(op.in->row<float>(start) + channel, op.in->stride(), static_cast<int>(row - start) + 1,
                               channels, op.pooling == Pooling::mean, out);
        } else {
            std::copy(from, from + channels, out);
        }
    }
}

int chunks_of(const Narrow &, const Inputs &inputs, int threads) { return row_chunks(inputs.picked, threads); }

void execute(const Narrow &op, const Bench &bench, int chunk, Scratch &) {
    const auto [first, last] = rows_of(chunk, bench.inputs.picked, bench.threads);
    for (int row = first; row < last; ++row) {
        bench.kernels.narrow(op.in->row<float>(row), op.out->row(row), op.in->padded(), op.out->type());
    }
}

int chunks_of(const Linear &op, const Inputs &inputs, int threads) {
    const int rows = rows_in(op, inputs);
    if (rows == 0) {
        return 0;
    }
    const Cut pieces = cut(op, rows, threads);
    return pieces.panel_chunks * pieces.row_chunks;
}

void execute(const Linear &op, const Bench &bench, int chunk, Scratch &scratch) {
    const int rows = rows_in(op, bench.inputs);
    const Cut pieces = cut(op, rows, bench.threads);
    const int first = chunk / pieces.panel_chunks * pieces.rows_each;
    const int count = std::min(pieces.rows_each, rows - first);
    const int panel = chunk % pieces.panel_chunks * pieces.panels_each;
    const int last_panel = std::min(op.weights->panels(), panel + pieces.panels_each);
    const int unit = op.weights->gated() ? 2 : 1;
    for (int p = panel; p < last_panel && count > 0; p += unit) {
        run_panel(op, bench.kernels, first, count, p, scratch.tile.as<float>());
    }
}

namespace {

// A head, normed and rotated in `room`; or as it is where neither is asked for.
const float *turned(const RotaryStore &op, const Kernels &kernels, int token, const float *norm, const float *head,
                    float *room) {
    if (norm == nullptr && op.cosines == nullptr) {
        return head;
    }
    std::memcpy(room, head, static_cast<std::size_t>(op.head_dim) * sizeof(float));
    if (norm != nullptr) {
        kernels.head_norm(room, norm, op.eps, op.head_dim);
    }
    if (op.cosines != nullptr) {
        kernels.rotate(room, op.cosines->row<float>(token), op.sines->row<float>(token), op.half);
    }
    return room;
}

}  // namespace

int chunks_of(const RotaryStore &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const RotaryStore &op, const Bench &bench, int chunk, Scratch &scratch) {
    const Kernels &kernels = bench.kernels;
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    const std::ptrdiff_t depth = round_up(op.head_dim, PANEL);
    auto *room = scratch.tile.as<float>();
    const auto query_size = static_cast<std::ptrdiff_t>(size_of(op.queries->type()));
    for (int token = first; token < last; ++token) {
        const auto *from = op.projections->row<float>(token);
        const std::ptrdiff_t slot = bench.inputs.slots[token] * op.pool.slot_stride;
        for (int h = 0; h < op.heads + op.kv_heads; ++h, from += op.head_dim) {
            const bool is_query = h < op.heads;
            const float *head = turned(op, kernels, token, is_query ? op.q_norm : op.k_norm, from, room);
            if (is_query) {
                kernels.narrow(head, op.queries->row(token) + h * depth * query_size, op.head_dim, op.queries->type());
            } else {
                kernels.narrow(head, op.pool.keys + slot + (h - op.heads) * op.pool.head_stride, op.head_dim,
                               op.pool.type);
            }
        }
        for (int h = 0; h < op.kv_heads; ++h, from += op.head_dim) {
            kernels.narrow(from, op.pool.values + slot + h * op.pool.head_stride, op.head_dim, op.pool.type);
        }
    }
}

}  // namespace tokenmill
