#include "bind_sampling.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "sampling.h"

namespace nb = nanobind;

namespace tokenmill {

namespace {

template <typename T>
using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = Column<const std::int64_t>;
using Doubles = Column<const double>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

Logits logits_of(const Rows &rows) {
    constexpr auto MOST = static_cast<std::size_t>(std::numeric_limits<int>::max() / 16);
    if (rows.shape(1) < 1 || rows.shape(1) > MOST || rows.shape(0) >= static_cast<std::size_t>(Team::MOST_CHUNKS) ||
        (rows.shape(1) > 1 && rows.stride(1) != 1)) {
        throw std::invalid_argument("the logits are not rows of contiguous floats");
    }
    return {rows.data(), rows.stride(0), static_cast<int>(rows.shape(0)), static_cast<int>(rows.shape(1))};
}

template <typename T>
void check_length(const char *name, const Column<T> &column, std::size_t length) {
    if (column.shape(0) != length) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(column.shape(0)) + " entries, not " +
                                    std::to_string(length));
    }
}

// Entries are in [0, size).
void check_entries(const char *name, const Longs &column, std::int64_t size) {
    for (std::size_t i = 0; i < column.shape(0); ++i) {
        if (column.data()[i] < 0 || column.data()[i] >= size) {
            throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] is " +
                                    std::to_string(column.data()[i]) + ", not in [0, " + std::to_string(size) + ")");
        }
    }
}

// The rows that columns name; returns their count.
std::size_t check_rows(const Longs &indices, const Logits &logits) {
    check_entries("rows", indices, logits.rows);
    if (indices.shape(0) >= static_cast<std::size_t>(Team::MOST_CHUNKS)) {
        throw std::invalid_argument("too many rows for one call");
    }
    return indices.shape(0);
}

std::size_t sum_of(const Longs &counts) {
    std::size_t sum = 0;
    for (std::size_t i = 0; i < counts.shape(0); ++i) {
        sum += static_cast<std::size_t>(counts.data()[i]);
    }
    return sum;
}

void best(Sampling &self, const Rows &rows, Column<std::int64_t> ids, Column<float> peaks) {
    const Logits logits = logits_of(rows);
    check_length("ids", ids, rows.shape(0));
    check_length("peaks", peaks, rows.shape(0));
    const nb::gil_scoped_release release;
    self.best(logits, ids.data(), peaks.data());
}

void draw(Sampling &self, const Rows &rows, const Longs &indices, const Doubles &temperatures, const Longs &top_ks,
          const Doubles &top_ps, const Doubles &min_ps, const Doubles &uniforms, Column<std::int64_t> ids) {
    const Logits logits = logits_of(rows);
    const std::size_t count = check_rows(indices, logits);
    check_length("temperatures", temperatures, count);
    check_length("top_ks", top_ks, count);
    check_length("top_ps", top_ps, count);
    check_length("min_ps", min_ps, count);
    check_length("uniforms", uniforms, count);
    check_length("ids", ids, count);
    for (std::size_t i = 0; i < count; ++i) {
        if (top_ks.data()[i] == 0) {
            throw std::invalid_argument("top_ks must be -1 or at least 1");
        }
    }
    const Draws draws{static_cast<int>(count), indices.data(), temperatures.data(), top_ks.data(),
                      top_ps.data(),           min_ps.data(),  uniforms.data()};
    const nb::gil_scoped_release release;
    self.draw(logits, draws, ids.data());
}

void logprobs(Sampling &self, const Rows &rows, const Longs &indices, const Doubles &temperatures, const Longs &tokens,
              const Longs &tops, const Longs &id_counts, const Longs &ids, Column<float> token_values,
              Column<std::int64_t> top_ids, Column<float> top_values, Column<float> id_values) {
    const Logits logits = logits_of(rows);
    const std::size_t count = check_rows(indices, logits);
    check_length("temperatures", temperatures, count);
    check_length("tokens", tokens, count);
    check_entries("tokens", tokens, logits.width);
    check_length("tops", tops, count);
    check_entries("tops", tops, std::int64_t{logits.width} + 1);
    check_length("id_counts", id_counts, count);
    check_entries("id_counts", id_counts, static_cast<std::int64_t>(ids.shape(0)) + 1);
    check_length("ids", ids, sum_of(id_counts));
    check_entries("ids", ids, logits.width);
    check_length("token_values", token_values, count);
    check_length("top_ids", top_ids, sum_of(tops));
    check_length("top_values", top_values, sum_of(tops));
    check_length("id_values", id_values, ids.shape(0));
    const WantedLogprobs wanted{static_cast<int>(count), indices.data(),   temperatures.data(), tokens.data(),
                                tops.data(),             id_counts.data(), ids.data()};
    const FoundLogprobs found{token_values.data(), top_ids.data(), top_values.data(), id_values.data()};
    const nb::gil_scoped_release release;
    self.logprobs(logits, wanted, found);
}

}  // namespace

void bind_sampling(nb::module_ &module) {
    nb::class_<Sampling>(module, "Sampling", "The reductions of sampling; see csrc/sampling.h")
        .def(
            "__init__",
            [](Sampling *self, std::shared_ptr<Team> team, const std::string &isa) {
                new (self) Sampling(std::move(team), kernels_of(isa));
            },
            nb::arg("team"), nb::arg("isa"))
        .def("best", &best, nb::arg("logits").noconvert(), nb::arg("ids").noconvert(), nb::arg("peaks").noconvert())
        .def("draw", &draw, nb::arg("logits").noconvert(), nb::arg("rows").noconvert(),
             nb::arg("temperatures").noconvert(), nb::arg("top_ks").noconvert(), nb::arg("top_ps").noconvert(),
             nb::arg("min_ps").noconvert(), nb::arg("uniforms").noconvert(), nb::arg("ids").noconvert())
        .def("logprobs", &logprobs, nb::arg("logits").noconvert(), nb::arg("rows").noconvert(),
             nb::arg("temperatures").noconvert(), nb::arg("tokens").noconvert(), nb::arg("tops").noconvert(),
             nb::arg("id_counts").noconvert(), nb::arg("ids").noconvert(), nb::arg("token_values").noconvert(),
             nb::arg("top_ids").noconvert(), nb::arg("top_values").noconvert(), nb::arg("id_values").noconvert());
}

}  // namespace tokenmill
