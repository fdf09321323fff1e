#include "moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "chunks.h"
#include "team.h"

namespace tokenmill {

namespace {

constexpr auto TILE_ROWS = static_cast<int>(TILE_ROWS_MOST);

void require(bool good, const char *otherwise) {
    if (!good) {
        throw std::invalid_argument(otherwise);
    }
}

constexpr const char *MISPLACED = "a mixture of experts comes before begin_head";

bool is_float(const Buffer *buffer, int width, int rows_each) {
    return buffer->type() == Dtype::f32 && buffer->width() == width && buffer->rows_each() == rows_each;
}

bool is_gated(const ExpertProduct &op) { return op.weights->front()->gated(); }

int panels_each(const ExpertProduct &op, int tokens, int threads) {
    const Matrix &first = *op.weights->front();
    return panels_per_chunk(first.panels(), op.routing->most_tiles(tokens), first.panel_bytes(), first.gated() ? 2 : 1,
                            threads, Team::MOST_CHUNKS);
}

// The input of a tile: rows as they lie, or, where an expert's tokens are scattered, copied one below the other.
InputRows input_of(const ExpertProduct &op, const Routing::Tile &tile, Scratch &scratch) {
    if (!is_gated(op)) {
        return {op.in->row(tile.first), op.in->stride(), tile.rows};
    }
    const std::int32_t *tokens = op.routing->tokens(tile.first);
    if (tokens[tile.rows - 1] - tokens[0] == tile.rows - 1) {
        return {op.in->row(tokens[0]), op.in->stride(), tile.rows};
    }
    const std::size_t size = size_of(op.in->type());
    const std::size_t step = static_cast<std::size_t>(op.in->stride()) * size;
    char *gathered = scratch.gathered.as<char>();
    for (int r = 0; r < tile.rows; ++r) {
        std::memcpy(gathered + static_cast<std::size_t>(r) * step, op.in->row(tokens[r]),
                    static_cast<std::size_t>(op.in->padded()) * size);
    }
    return {gathered, op.in->stride(), tile.rows};
}

void run_gates(const ExpertProduct &op, const Kernels &kernels, const Routing::Tile &tile, const InputRows &x,
               int panel, float *products) {
    const Matrix &weights = *(*op.weights)[static_cast<std::size_t>(tile.expert)];
    constexpr std::ptrdiff_t WIDE = 2 * PANEL;
    product(kernels, weights, x, panel, products, WIDE);
    product(kernels, weights, x, panel + 1, products + PANEL, WIDE);
    const std::ptrdiff_t at =
        static_cast<std::ptrdiff_t>(panel / 2) * PANEL * static_cast<std::ptrdiff_t>(size_of(op.out->type()));
    kernels.gate(products, WIDE, tile.rows, nullptr, nullptr, Function::silu, op.out->row(tile.first) + at,
                 op.out->stride(), op.out->type());
}

}  // namespace

Routing::Routing(int experts, int top_k) : experts_(experts), top_k_(top_k) {
    if (top_k < 1 || top_k > experts) {
        throw std::invalid_argument("top_k is " + std::to_string(top_k) +
                                    "; it must be from 1 to the number of experts, " + std::to_string(experts));
    }
    starts_.resize(static_cast<std::size_t>(experts) + 1);
}

void Routing::reserve(int tokens) {
    const std::size_t pairs = offset(tokens);
    if (pairs > ids_.size()) {
        shares_.resize(pairs);
        rows_.resize(pairs);
        tokens_.resize(pairs);
        tiles_.reserve(static_cast<std::size_t>(most_tiles(tokens)));
        ids_.resize(pairs);  // the last: its size says that there is room in all of them, even where one has failed
    }
}

int Routing::most_tiles(int tokens) const {
    const int pairs = tokens * top_k_;
    return std::min(experts_, pairs) + pairs / TILE_ROWS;
}

void Routing::decide(int token, const float *logits, bool normalise) {
    std::int32_t *ids = &ids_[offset(token)];
    float *shares = &shares_[offset(token)];
    int found = 0;
    for (int expert = 0; expert < experts_; ++expert) {
        int rank = found;
        while (rank > 0 && logits[expert] > logits[ids[rank - 1]]) {
            --rank;
        }
        if (rank == top_k_) {
            continue;
        }
        found = std::min(found + 1, top_k_);
        std::copy_backward(ids + rank, ids + found - 1, ids + found);
        ids[rank] = expert;
    }
    const float largest = logits[ids[0]];
    float total = 0.0F;
    for (int rank = 0; rank < top_k_; ++rank) {
        shares[rank] = std::exp(logits[ids[rank]] - largest);
        total += shares[rank];
    }
    if (!normalise) {
        total = 0.0F;
        for (int expert = 0; expert < experts_; ++expert) {
            total += std::exp(logits[expert] - largest);
        }
    }
    for (int rank = 0; rank < top_k_; ++rank) {
        shares[rank] /= total;
    }
}

void Routing::group(int tokens) {
    const std::size_t pairs = offset(tokens);
    std::fill(starts_.begin(), starts_.end(), 0);
    for (std::size_t pair = 0; pair < pairs; ++pair) {
        ++starts_[static_cast<std::size_t>(ids_[pair]) + 1];
    }
    tiles_.clear();
    for (int expert = 0; expert < experts_; ++expert) {
        const auto e = static_cast<std::size_t>(expert);
        const int count = starts_[e + 1];
        starts_[e + 1] += starts_[e];
        const int each = count == 0 ? 0 : divided(count, divided(count, TILE_ROWS));
        for (int done = 0; done < count; done += each) {
            tiles_.push_back({expert, starts_[e] + done, std::min(each, count - done)});
        }
    }
    // From here on an expert's start is where its next row goes.
    for (std::size_t pair = 0; pair < pairs; ++pair) {
        const std::int32_t row = starts_[static_cast<std::size_t>(ids_[pair])]++;
        rows_[pair] = row;
        tokens_[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(pair / static_cast<std::size_t>(top_k_));
    }
}

void check(const Route &op, bool in_head) {
    require(is_float(op.logits, op.routing->experts(), 1), "the buffer does not fit the number of experts");
    require(!in_head, MISPLACED);
}

void check(const Group &, bool in_head) { require(!in_head, MISPLACED); }

void check(const ExpertProduct &op, bool in_head) {
    require(static_cast<int>(op.weights->size()) == op.routing->experts(), "there is not one matrix an expert");
    const Matrix &first = *op.weights->front();
    for (const Matrix *weights : *op.weights) {
        require(weights->outputs() == first.outputs() && weights->inputs() == first.inputs() &&
                    weights->type() == first.type() && weights->gated() == first.gated() &&
                    weights->bias(0) == nullptr,
                "the experts' matrices differ in shape or dtype, or have biases");
    }
    const Dtype wanted = first.type() == Dtype::bf16 ? Dtype::bf16 : Dtype::f32;
    const int top_k = op.routing->top_k();
    require(op.in->width() == first.inputs() && op.in->type() == wanted &&
                op.in->rows_each() == (first.gated() ? 1 : top_k) &&
                op.out->width() == first.outputs() / (first.gated() ? 2 : 1) && op.out->rows_each() == top_k &&
                (first.gated() || op.out->type() == Dtype::f32) && op.in != op.out,
            "the buffers do not fit the experts");
    require(!in_head && !op.in->of_head() && !op.out->of_head(), MISPLACED);
}

void check(const Combine &op, bool in_head) {
    const int width = op.residual->width();
    require(is_float(op.residual, width, 1) && is_float(op.outputs, width, op.routing->top_k()) &&
                (op.shared == nullptr) == (op.shared_gate == nullptr) &&
                (op.shared == nullptr || (is_float(op.shared, width, 1) && is_float(op.shared_gate, 1, 1))),
            "the buffers do not fit each other");
    require(!in_head, MISPLACED);
}

int chunks_of(const Route &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const Route &op, const Bench &bench, int chunk, Scratch &) {
    const int tokens = bench.inputs.tokens;
    const auto [first, last] = rows_of(chunk, tokens, bench.threads);
    for (int token = first; token < last; ++token) {
        op.routing->decide(token, op.logits->row<float>(token), op.normalise);
    }
    if (last - first == tokens) {
        op.routing->group(tokens);
    }
}

int chunks_of(const Group &, const Inputs &inputs, int threads) {
    return row_chunks(inputs.tokens, threads) > 1 ? 1 : 0;
}

void execute(const Group &op, const Bench &bench, int, Scratch &) { op.routing->group(bench.inputs.tokens); }

int chunks_of(const ExpertProduct &op, const Inputs &inputs, int threads) {
    if (inputs.tokens == 0) {
        return 0;
    }
    const int panels = op.weights->front()->panels();
    return op.routing->most_tiles(inputs.tokens) * divided(panels, panels_each(op, inputs.tokens, threads));
}

void execute(const ExpertProduct &op, const Bench &bench, int chunk, Scratch &scratch) {
    const int panels = op.weights->front()->panels();
    const int each = panels_each(op, bench.inputs.tokens, bench.threads);
    const int pieces = divided(panels, each);
    if (chunk / pieces >= op.routing->tile_count()) {
        return;
    }
    const Routing::Tile &tile = op.routing->tile(chunk / pieces);
    const InputRows x = input_of(op, tile, scratch);
    const int first = chunk % pieces * each;
    const int last = std::min(panels, first + each);
    if (is_gated(op)) {
        for (int panel = first; panel < last; panel += 2) {
            run_gates(op, bench.kernels, tile, x, panel, scratch.tile.as<float>());
        }
        return;
    }
    const Matrix &weights = *(*op.weights)[static_cast<std::size_t>(tile.expert)];
    for (int panel = first; panel < last; ++panel) {
        const std::ptrdiff_t column = static_cast<std::ptrdiff_t>(panel) * PANEL;
        product(bench.kernels, weights, x, panel, op.out->row<float>(tile.first) + column, op.out->stride());
    }
}

int chunks_of(const Combine &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const Combine &op, const Bench &bench, int chunk, Scratch &) {
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    const int width = op.residual->padded();
    for (int token = first; token < last; ++token) {
        auto *total = op.residual->row<float>(token);
        if (op.afresh) {
            std::fill_n(total, width, 0.0F);
        }
        const std::int32_t *rows = op.routing->rows(token);
        const float *shares = op.routing->shares(token);
        for (int rank = 0; rank < op.routing->top_k(); ++rank) {
            bench.kernels.blend(total, 1.0F, op.outputs->row<float>(rows[rank]), shares[rank], width);
        }
        if (op.shared != nullptr) {
            const float share = 1.0F / (1.0F + std::exp(-op.shared_gate->row<float>(token)[0]));
            bench.kernels.blend(total, 1.0F, op.shared->row<float>(token), share, width);
        }
    }
}

std::size_t gathered_bytes(const ExpertProduct &op) {
    return is_gated(op) ? TILE_ROWS_MOST * static_cast<std::size_t>(op.in->stride()) * size_of(op.in->type()) : 0;
}

}  // namespace tokenmill
