// A mixture of experts: which experts each token takes, the products of each expert with the rows that took it, and
// their sum.
//
// How many rows an expert gets is not known before the router has run, the number of chunks of every op is: there are
// chunks for as many tiles (experts, or parts of the rows of one) as there can be, and those beyond the tiles that
// there are do nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"

namespace tokenmill {

// What the router decides of a step's tokens. Of T tokens there are T * top_k pairs of a token and an expert; grouped
// by expert (ascending, and by token within), they are the rows of the experts' buffers.
class Routing {
  public:
    // Rows [first, first + rows) of the grouped ones, all of one expert.
    struct Tile {
        int expert;
        int first;
        int rows;
    };

    // Throws std::invalid_argument where top_k is not within [1, experts].
    Routing(int experts, int top_k);

    void reserve(int tokens);

    // Decide for one token: the top_k experts with the largest logits, the lower one first among equals, and the
    // softmax of their logits over all experts (normalise: over these).
    void decide(int token, const float *logits, bool normalise);

    // Group what was decided.
    void group(int tokens);

    int experts() const { return experts_; }
    int top_k() const { return top_k_; }
    // No step of so many tokens has more tiles.
    int most_tiles(int tokens) const;
    int tile_count() const { return static_cast<int>(tiles_.size()); }
    const Tile &tile(int index) const { return tiles_[static_cast<std::size_t>(index)]; }

    // [top_k] of a token, best first: experts, their shares, and which of the grouped rows the pair is.
    const std::int32_t *ids(int token) const { return &ids_[offset(token)]; }
    const float *shares(int token) const { return &shares_[offset(token)]; }
    const std::int32_t *rows(int token) const { return &rows_[offset(token)]; }
    // The token of a grouped row, and of those behind it.
    const std::int32_t *tokens(int row) const { return &tokens_[static_cast<std::size_t>(row)]; }

  private:
    std::size_t offset(int token) const { return static_cast<std::size_t>(token) * static_cast<std::size_t>(top_k_); }

    int experts_;
    int top_k_;
    std::vector<std::int32_t> ids_;
    std::vector<float> shares_;
    std::vector<std::int32_t> rows_;
    std::vector<std::int32_t> tokens_;
    std::vector<std::int32_t> starts_;  // [experts + 1], each expert's grouped rows
    std::vector<Tile> tiles_;
};

struct Route {
    const Buffer *logits;  // [tokens, experts]
    Routing *routing;
    bool normalise;
};

// Where one chunk has routed all tokens it has grouped them too, and this has nothing to do.
struct Group {
    Routing *routing;
};

// The products of grouped rows with their experts' matrices. Gated matrices take tokens' rows and give gated values;
// others take grouped rows and give sums. Both are written to grouped rows.
struct ExpertProduct {
    const Buffer *in;
    std::shared_ptr<const std::vector<const Matrix *>> weights;  // one an expert, all of one shape
    Buffer *out;
    const Routing *routing;
};

// Adds each token's experts to its row of the residual stream (afresh: to zeros), times their shares, best first; at
// last the shared expert times the sigmoid of its gate, if there is one.
struct Combine {
    const Buffer *outputs;  // grouped
    const Buffer *shared;   // null: none
    const Buffer *shared_gate;
    Buffer *residual;
    const Routing *routing;
    bool afresh;
};

// Throw std::invalid_argument for an op whose parts do not fit each other.
void check(const Route &op, bool in_head);
void check(const Group &op, bool in_head);
void check(const ExpertProduct &op, bool in_head);
void check(const Combine &op, bool in_head);

int chunks_of(const Route &op, const Inputs &inputs, int threads);
int chunks_of(const Group &op, const Inputs &inputs, int threads);
int chunks_of(const ExpertProduct &op, const Inputs &inputs, int threads);
int chunks_of(const Combine &op, const Inputs &inputs, int threads);

void execute(const Route &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Group &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const ExpertProduct &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Combine &op, const Bench &bench, int chunk, Scratch &scratch);

// Bytes of Scratch::gathered that an op needs.
std::size_t gathered_bytes(const ExpertProduct &op);

}  // namespace tokenmill
