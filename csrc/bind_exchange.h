// Python's view of what ranks exchange.
#pragma once

#include <nanobind/nanobind.h>

namespace tokenmill {

void bind_exchange(nanobind::module_ &module);

}  // namespace tokenmill
