// Python's view of the reductions of sampling.
#pragma once

#include <nanobind/nanobind.h>

namespace tokenmill {

void bind_sampling(nanobind::module_ &module);

}  // namespace tokenmill
