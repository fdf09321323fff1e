// Python's view of mixtures of experts: methods of Plan.
#pragma once

#include <nanobind/nanobind.h>

#include "plan.h"

namespace tokenmill {

void bind_moe(nanobind::class_<Plan> &plan);

}  // namespace tokenmill
