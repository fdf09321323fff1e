// Which instruction sets the kernels exist for, which of them this machine has, and which one is used.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tokenmill {

namespace avx2 {
const Kernels &kernels();
}
namespace avx512 {
const Kernels &kernels();
}
namespace avx512bf16 {
const Kernels &kernels();
}
namespace amx {
const Kernels &kernels();
}
namespace amx_emulated {
const Kernels &kernels();
}

// Names of what this machine can run, best first; empty: not even AVX2. Asks the system for the use of AMX's tiles.
std::vector<std::string> usable_isas();

// The kernels of an ISA by name; "amx-emulated" is AMX's kernel over a model of its tiles, for tests.
// Throws std::invalid_argument, naming what there is, for one that this machine cannot run.
const Kernels &kernels_of(const std::string &isa);

}  // namespace tokenmill
