// What the ops of a plan may be made of: kernels trust widths, types and pointers, so they are checked once, here.
#pragma once

#include <limits>
#include <vector>

#include "attention.h"
#include "ops.h"

namespace tokenmill {

// Throw std::invalid_argument for an op whose buffers do not fit it, or that belongs on the other side of `begin_head`
// (picked ops come behind it, all others before it).
void check(const Embedding &op, bool in_head);
void check(const EmbeddingSum &op, bool in_head);
void check(const Angles &op, bool in_head);
void check(const Norm &op, bool in_head);
void check(const AddNorm &op, bool in_head);
void check(const LayerNorm &op, bool in_head);
void check(const Pool &op, bool in_head);
void check(const Narrow &op, bool in_head);
void check(const Linear &op, bool in_head);
void check(const RotaryStore &op, bool in_head);
void check(const Attention &op, bool in_head);

// What indices of a step must be below, for the tables that they are looked up in. positions: none where it is at its
// largest; they must then be at least 0 as well.
struct Limits {
    std::int64_t vocabulary = std::numeric_limits<std::int64_t>::max();
    std::int64_t positions = std::numeric_limits<std::int64_t>::max();
    std::int64_t types = std::numeric_limits<std::int64_t>::max();
};

// Throw std::invalid_argument for a step whose arrays contradict each other. slots: how many context slots there are.
void check(const Inputs &inputs, std::int64_t slots, const Limits &limits);
void check_picked(int picked, const std::int64_t *rows, int tokens);

// For each row that is the last of a sequence of which all tokens are in the step: where the sequence starts; -1 for other
// rows.
std::vector<std::int64_t> whole_sequences(const Inputs &inputs);
// Throws std::invalid_argument for a row that is none of these.
void check_whole(int picked, const std::int64_t *rows, const std::vector<std::int64_t> &row_starts);

}  // namespace tokenmill
