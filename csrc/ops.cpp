#include "ops.h"

#include <algorithm>
#include <cmath>

#include "chunks.h"
#include "team.h"

namespace tokenmill {

namespace {

// Depth whose panels stay in the second-level cache while all tiles of a chunk pass over them.
constexpr int DEPTH_BLOCK = 8192;

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
    if (op.epilogue == Epilogue::gate) {
        constexpr std::ptrdiff_t WIDE = 2 * PANEL;
        product(op, kernels, first, rows, panel, tile, WIDE);
        product(op, kernels, first, rows, panel + 1, tile + PANEL, WIDE);
        const std::ptrdiff_t at = column / 2 * static_cast<std::ptrdiff_t>(size_of(op.out->type()));
        for (int r = 0; r < rows; ++r) {
            kernels.gate(tile + r * WIDE, tile + r * WIDE + PANEL, bias, op.weights->bias(panel + 1),
                         op.out->row(first + r) + at, op.out->type());
        }
        return;
    }
    if (op.epilogue == Epilogue::store && bias == nullptr) {
        product(op, kernels, first, rows, panel, op.out->row<float>(first) + column, op.out->stride());
        return;
    }
    product(op, kernels, first, rows, panel, tile, PANEL);
    for (int r = 0; r < rows; ++r) {
        float *out = op.out->row<float>(first + r) + column;
        if (op.epilogue == Epilogue::store) {
            std::fill(out, out + PANEL, 0.0F);
        }
        kernels.add_to(tile + r * PANEL, bias, out, PANEL);
    }
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
        op.table->read(static_cast<int>(bench.inputs.token_ids[token]), 1, row);
        auto *out = op.out->row<float>(token);
        bench.kernels.widen(row, op.table->type(), out, op.table->inputs());
        std::fill(out + op.table->inputs(), out + op.out->padded(), 0.0F);  // what is added may leave NaN there
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

int chunks_of(const RotaryStore &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const RotaryStore &op, const Bench &bench, int chunk, Scratch &scratch) {
    const Kernels &kernels = bench.kernels;
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    const std::ptrdiff_t depth = round_up(op.head_dim, PANEL);
    auto *head = scratch.tile.as<float>();
    const auto query_size = static_cast<std::ptrdiff_t>(size_of(op.queries->type()));
    for (int token = first; token < last; ++token) {
        const auto *cosines = op.cosines->row<float>(token);
        const auto *sines = op.sines->row<float>(token);
        const auto *from = op.projections->row<float>(token);
        const std::ptrdiff_t slot = bench.inputs.slots[token] * op.pool.slot_stride;
        for (int h = 0; h < op.heads + op.kv_heads; ++h, from += op.head_dim) {
            std::memcpy(head, from, static_cast<std::size_t>(op.head_dim) * sizeof(float));
            const bool is_query = h < op.heads;
            if (op.q_norm != nullptr) {
                kernels.head_norm(head, is_query ? op.q_norm : op.k_norm, op.eps, op.head_dim);
            }
            kernels.rotate(head, cosines, sines, op.half);
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
