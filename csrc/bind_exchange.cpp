#include "bind_exchange.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "exchange.h"

namespace nb = nanobind;

namespace tokenmill {

namespace {

using Values = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;

void throw_if_failed(const Exchange &exchange) {
    if (exchange.failed()) {
        throw ExchangeError(exchange.failure());
    }
}

void all_reduce(Exchange &exchange, Values values) {
    {
        const nb::gil_scoped_release release;
        exchange.all_reduce(values.data(), values.shape(0));
    }
    throw_if_failed(exchange);
}

nb::list gather(Exchange &exchange, const nb::bytes &data) {
    std::vector<std::string> found;
    {
        const nb::gil_scoped_release release;
        found = exchange.gather(data.c_str(), data.size());
    }
    throw_if_failed(exchange);
    nb::list all;
    for (const std::string &one : found) {
        all.append(nb::bytes(one.data(), one.size()));
    }
    return all;
}

// Raises OSError.
void open_shared(SharedExchange *self, const std::string &path, int rank, int ranks, std::size_t part_bytes,
                 double patience, bool create) {
    try {
        new (self) SharedExchange(path, rank, ranks, part_bytes, patience, create);
    } catch (const std::system_error &error) {
        PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
        throw nb::python_error();
    }
}

// A rank's part, in place: valid as long as the exchange.
Bytes part(nb::handle self, int rank, int slot) {
    auto &exchange = nb::cast<Exchange &>(self);
    if (rank < 0 || rank >= exchange.ranks() || slot < 0 || slot > 1) {
        throw std::invalid_argument("there is no part of rank " + std::to_string(rank) + " in slot " +
                                    std::to_string(slot));
    }
    return Bytes(exchange.part(rank, slot), {exchange.part_bytes()}, self);
}

}  // namespace

void bind_exchange(nb::module_ &module) {
    nb::exception<ExchangeError>(module, "ExchangeError", PyExc_RuntimeError);
    nb::class_<Exchange>(module, "Exchange", "What ranks show one another; see csrc/exchange.h")
        .def_prop_ro("rank", &Exchange::rank)
        .def_prop_ro("ranks", &Exchange::ranks)
        .def_prop_ro("part_bytes", &Exchange::part_bytes)
        .def("part", &part, nb::arg("rank"), nb::arg("slot"))
        .def("all_reduce", &all_reduce, nb::arg("values").noconvert(), "Replace float32 values by their sums.")
        .def("gather", &gather, nb::arg("data"), "Everyone's bytes on rank 0; elsewhere an empty list.");
    nb::class_<SharedExchange, Exchange>(module, "SharedExchange")
        .def("__init__", &open_shared, nb::arg("path"), nb::arg("rank"),
             nb::arg("ranks"), nb::arg("part_bytes"), nb::arg("patience"), nb::arg("create"));
    nb::class_<CarriedExchange, Exchange>(module, "CarriedExchange")
        .def(
            "__init__",
            [](CarriedExchange *self, int rank, int ranks, std::size_t part_bytes, nb::callable carry) {
                auto call = [carry = std::move(carry)](int slot, std::size_t bytes) {
                    const nb::gil_scoped_acquire acquire;
                    try {
                        carry(slot, bytes);
                    } catch (const nb::python_error &error) {
                        // Which may be looked at without the interpreter.
                        throw std::runtime_error(nb::str(error.value()).c_str());
                    }
                };
                new (self) CarriedExchange(rank, ranks, part_bytes, std::move(call));
            },
            nb::arg("rank"), nb::arg("ranks"), nb::arg("part_bytes"), nb::arg("carry"));
}

}  // namespace tokenmill
