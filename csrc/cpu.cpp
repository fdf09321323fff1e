// The module engine.kernels._cpu.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "bind_plan.h"
#include "bind_sampling.h"
#include "noise.h"

namespace nb = nanobind;

namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<nb::numpy, double, nb::ndim<1>>;

Doubles uniforms(Column<std::uint64_t> seeds, Column<std::int64_t> positions) {
    const std::size_t count = seeds.shape(0);
    if (positions.shape(0) != count) {
        throw std::invalid_argument("seeds and positions differ in length");
    }
    auto *values = new double[count];
    nb::capsule owner(values, [](void *memory) noexcept { delete[] static_cast<double *>(memory); });
    for (std::size_t i = 0; i < count; ++i) {
        values[i] = tokenmill::uniform(seeds.data()[i], positions.data()[i]);
    }
    return Doubles(values, {count}, owner);
}

}  // namespace

NB_MODULE(_cpu, module) {
    nb::set_leak_warnings(false);  // a team that lives to the end of its process is no leak
    tokenmill::bind_plan(module);
    tokenmill::bind_sampling(module);
    module.def("uniforms", &uniforms, nb::arg("seeds").noconvert(), nb::arg("positions").noconvert(),
               "uint64[N] seeds, int64[N] positions -> float64[N] in [0, 1); see engine/kernels/noise.py");
}
