// What this machine can do at most: the limits that the kernels are measured against.
#pragma once

#include "kernels.h"
#include "team.h"

namespace tokenmill {

// Read `bytes` of memory once with the whole team; returns bytes per second. Throws std::bad_alloc.
double read_rate(Team &team, std::size_t bytes);

// Multiply with operands that stay in the first-level cache, on every thread of the team; returns floating-point
// operations per second. type: of the weights.
double product_rate(Team &team, const Kernels &kernels, Dtype type);

}  // namespace tokenmill
