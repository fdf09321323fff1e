// What the ops of a plan may be made of: kernels trust widths, types and pointers, so they are checked once, here.
#pragma once

#include "attention.h"
#include "ops.h"

namespace tokenmill {

// Throw std::invalid_argument for an op whose buffers do not fit it, or that belongs on the other side of `begin_head`
// (picked ops come behind it, all others before it).
void check(const Embedding &op, bool in_head);
void check(const Angles &op, bool in_head);
void check(const Norm &op, bool in_head);
void check(const Linear &op, bool in_head);
void check(const RotaryStore &op, bool in_head);
void check(const Attention &op, bool in_head);

// Throw std::invalid_argument for a step whose arrays contradict each other. slots: how many context slots there are;
// vocabulary: token ids must be below it.
void check(const Inputs &inputs, std::int64_t slots, int vocabulary);
void check_picked(int picked, const std::int64_t *rows, int tokens);

}  // namespace tokenmill
