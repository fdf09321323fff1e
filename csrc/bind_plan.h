// Python's view of matrices, teams and plans.
#pragma once

#include <nanobind/nanobind.h>

namespace tokenmill {

void bind_plan(nanobind::module_ &module);

}  // namespace tokenmill
