#include "bind_plan.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>

#include "bind_exchange.h"
#include "bind_moe.h"
#include "isa.h"
#include "matrix.h"
#include "plan.h"
#include "roofline.h"

namespace nb = nanobind;

namespace tokenmill {

namespace {

using Longs = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix2d = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Dtype dtype_of(int number) {
    if (number < 0 || number > 2) {
        throw std::invalid_argument("dtype is " + std::to_string(number) + "; allowed are 0 to 2");
    }
    return static_cast<Dtype>(number);
}

bool is_of(const Rows &rows, Dtype type) {
    const nb::dlpack::dtype found = rows.dtype();
    const auto code = static_cast<std::uint8_t>(type == Dtype::bf16 ? nb::dlpack::dtype_code::Bfloat
                                                                    : nb::dlpack::dtype_code::Float);
    return found.code == code && found.bits == size_of(type) * 8 && found.lanes == 1;
}

void check_range(const char *what, std::int64_t start, std::int64_t count, std::int64_t size) {
    if (start < 0 || count < 0 || start + count > size) {
        throw std::invalid_argument(std::string(what) + " [" + std::to_string(start) + ", " +
                                    std::to_string(start + count) + ") are not within [0, " + std::to_string(size) +
                                    ")");
    }
}

void check_rows(const Matrix &matrix, int start, const Rows &rows) {
    check_range("rows", start, static_cast<std::int64_t>(rows.shape(0)), matrix.outputs());
    if (static_cast<int>(rows.shape(1)) != matrix.inputs() || !is_of(rows, matrix.type())) {
        throw std::invalid_argument("the rows are not of the matrix's width and dtype");
    }
}

constexpr float LOG2_E = 1.44269504088896341F;

const float *floats_at(std::uintptr_t address) { return reinterpret_cast<const float *>(address); }

LayerPool pool_of(std::uintptr_t keys, std::uintptr_t values, int dtype, std::ptrdiff_t slot_stride,
                  std::ptrdiff_t head_stride) {
    return {reinterpret_cast<char *>(keys), reinterpret_cast<char *>(values), dtype_of(dtype), slot_stride,
            head_stride};
}

// The value of a name. Throws std::invalid_argument for a name that there is not.
template <typename Value>
Value named(const char *what, const std::string &name, const std::map<std::string, Value> &values) {
    const auto found = values.find(name);
    if (found != values.end()) {
        return found->second;
    }
    std::string allowed;
    for (const auto &[each, _] : values) {
        allowed += allowed.empty() ? each : ", " + each;
    }
    throw std::invalid_argument(std::string(what) + " is '" + name + "'; allowed are " + allowed);
}

Function function_of(const std::string &name) {
    return named<Function>("activation", name,
                           {{"identity", Function::identity},
                            {"silu", Function::silu},
                            {"gelu", Function::gelu},
                            {"gelu_tanh", Function::gelu_tanh},
                            {"relu", Function::relu},
                            {"tanh", Function::tanh}});
}

void begin_head(Plan &plan, const std::string &pooling) {
    plan.begin_head(named<Pooling>(
        "pooling", pooling,
        {{"row", Pooling::row}, {"first", Pooling::first}, {"mean", Pooling::mean}, {"max", Pooling::max}}));
}

void add_linear(Plan &plan, int in, const Matrix &weights, int out, const std::string &epilogue, bool picked,
                const std::string &activation) {
    const auto kind = named<Epilogue>(
        "epilogue", epilogue, {{"store", Epilogue::store}, {"add", Epilogue::add}, {"gate", Epilogue::gate}});
    plan.add(Linear{&plan.buffer(in), &weights, &plan.buffer(out), kind, function_of(activation), picked});
}

Buffer *buffer_or_none(Plan &plan, std::optional<int> index) { return index ? &plan.buffer(*index) : nullptr; }

void add_attention(Plan &plan, int queries, std::uintptr_t keys, std::uintptr_t values, int dtype,
                   std::ptrdiff_t slot_stride, std::ptrdiff_t head_stride, int out, float scale, int heads,
                   int kv_heads, int head_dim, int window, bool causal) {
    const int layout = plan.layout_of(causal, window, heads / std::max(kv_heads, 1), kv_heads);
    const Attention attention{&plan.buffer(queries), pool_of(keys, values, dtype, slot_stride, head_stride),
                              &plan.buffer(out), scale * LOG2_E, heads, kv_heads, head_dim, window, causal, layout};
    plan.add(Attend{attention});
    plan.add(Merge{attention});
}

void run_step(Plan &plan, Longs token_ids, Longs positions, Longs slots, Longs query_starts, Longs context_starts,
         Longs context_slots, Longs picked, std::optional<Longs> type_ids) {
    Inputs inputs;
    inputs.tokens = static_cast<int>(token_ids.shape(0));
    inputs.token_ids = token_ids.data();
    inputs.positions = positions.data();
    inputs.type_ids = type_ids ? type_ids->data() : nullptr;
    inputs.slots = slots.data();
    inputs.sequences = {static_cast<int>(query_starts.shape(0)) - 1, query_starts.data(), context_starts.data(),
                        context_slots.data()};
    inputs.picked = static_cast<int>(picked.shape(0));
    inputs.picked_rows = picked.data();
    if (inputs.sequences.count < 0 || context_starts.shape(0) != query_starts.shape(0) ||
        positions.shape(0) != token_ids.shape(0) || slots.shape(0) != token_ids.shape(0) ||
        (type_ids && type_ids->shape(0) != token_ids.shape(0))) {
        throw std::invalid_argument("the step's arrays disagree in length");
    }
    const nb::gil_scoped_release release;
    plan.run(inputs, static_cast<std::int64_t>(context_slots.shape(0)));
}

void run_head(Plan &plan, Longs picked) {
    const nb::gil_scoped_release release;
    plan.run_head(static_cast<int>(picked.shape(0)), picked.data());
}

// The first `count` rows of a float32 buffer, in place: valid until the plan runs again.
Matrix2d view(nb::handle self, int index, int count) {
    Buffer &buffer = nb::cast<Plan &>(self).buffer(index);
    check_range("rows", 0, count, buffer.rows());
    if (buffer.type() != Dtype::f32) {
        throw std::invalid_argument("only float32 buffers can be viewed");
    }
    const std::size_t shape[] = {static_cast<std::size_t>(count), static_cast<std::size_t>(buffer.width())};
    const std::int64_t strides[] = {buffer.stride(), 1};
    return Matrix2d(buffer.row<float>(0), 2, shape, self, strides);
}

// Rows of a buffer as float32, copied.
Matrix2d read(Plan &plan, int index, int count) {
    Buffer &buffer = plan.buffer(index);
    check_range("rows", 0, count, buffer.rows());
    const auto width = static_cast<std::size_t>(buffer.width());
    auto *values = new float[static_cast<std::size_t>(count) * width + 1];
    nb::capsule owner(values, [](void *memory) noexcept { delete[] static_cast<float *>(memory); });
    for (int row = 0; row < count; ++row) {
        plan.kernels().widen(buffer.row(row), buffer.type(), values + static_cast<std::size_t>(row) * width,
                             buffer.width());
    }
    return Matrix2d(values, {static_cast<std::size_t>(count), width}, owner);
}

void write(Plan &plan, int index, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> rows) {
    Buffer &buffer = plan.buffer(index);
    if (static_cast<int>(rows.shape(1)) != buffer.width()) {
        throw std::invalid_argument("the rows are not of the buffer's width");
    }
    buffer.reserve(static_cast<int>(rows.shape(0)));
    for (std::size_t row = 0; row < rows.shape(0); ++row) {
        plan.kernels().narrow(rows.data() + row * rows.shape(1), buffer.row(static_cast<std::ptrdiff_t>(row)),
                              buffer.width(), buffer.type());
    }
}

void bind_matrix(nb::module_ &module) {
    nb::class_<Arena>(module, "Arena", "Memory that matrices share; see csrc/memory.h").def(nb::init<>());
    nb::class_<Matrix>(module, "Matrix", "Packed weights [outputs, inputs]; see csrc/matrix.h")
        .def(
            "__init__",
            [](Matrix *self, int outputs, int inputs, int dtype, bool gated, bool biased, Arena *arena) {
                if (outputs < 1 || inputs < 1) {
                    throw std::invalid_argument("outputs and inputs must be at least 1");
                }
                Arena own;
                new (self) Matrix(arena == nullptr ? own : *arena, outputs, inputs, dtype_of(dtype), gated, biased);
            },
            nb::arg("outputs"), nb::arg("inputs"), nb::arg("dtype"), nb::arg("gated"), nb::arg("biased"),
            nb::arg("arena").none() = nb::none())
        .def_prop_ro("nbytes", &Matrix::bytes)
        .def(
            "write",
            [](Matrix &self, int start, const Rows &rows) {
                check_rows(self, start, rows);
                const nb::gil_scoped_release release;
                self.write(start, static_cast<int>(rows.shape(0)), rows.data());
            },
            nb::arg("start"), nb::arg("rows"))
        .def(
            "read",
            [](const Matrix &self, int start, const Rows &rows) {
                check_rows(self, start, rows);
                const nb::gil_scoped_release release;
                self.read(start, static_cast<int>(rows.shape(0)), rows.data());
            },
            nb::arg("start"), nb::arg("rows").noconvert(), "Fill `rows` with rows [start, start + len(rows)).")
        .def(
            "write_bias",
            [](Matrix &self, int start, Floats values) {
                check_range("entries", start, static_cast<std::int64_t>(values.shape(0)),
                            self.bias(0) == nullptr ? 0 : self.outputs());
                self.write_bias(start, static_cast<int>(values.shape(0)), values.data());
            },
            nb::arg("start"), nb::arg("values"))
        .def(
            "read_bias",
            [](const Matrix &self, int start, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> values) {
                check_range("entries", start, static_cast<std::int64_t>(values.shape(0)),
                            self.bias(0) == nullptr ? 0 : self.outputs());
                self.read_bias(start, static_cast<int>(values.shape(0)), values.data());
            },
            nb::arg("start"), nb::arg("values").noconvert(), "Fill `values` with entries [start, start + len(values)).");
}

}  // namespace

void bind_plan(nb::module_ &module) {
    module.def("usable_isas", &usable_isas, "ISAs that this machine can run, best first; see csrc/isa.h");
    bind_matrix(module);
    nb::class_<Team>(module, "Team", "Threads; see csrc/team.h")
        .def(
            "__init__",
            [](Team *self, int threads, std::vector<int> cpus) {
                if (threads < 1) {
                    throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be at least 1");
                }
                new (self) Team(threads, std::move(cpus));
            },
            nb::arg("threads"), nb::arg("cpus"))
        .def_prop_ro("threads", &Team::threads);
    module.def("read_rate", &read_rate, nb::arg("team"), nb::arg("bytes"), "Bytes per second that the team reads.");
    module.def(
        "product_rate",
        [](Team &team, const std::string &isa, int dtype) {
            return product_rate(team, kernels_of(isa), dtype_of(dtype));
        },
        nb::arg("team"), nb::arg("isa"), nb::arg("dtype"), "FLOP per second of products from the first-level cache.");
    bind_exchange(module);
    auto plan = nb::class_<Plan>(module, "Plan", "A recorded step; see csrc/plan.h");
    bind_moe(plan);
    plan.def(
            "__init__",
            [](Plan *self, std::shared_ptr<Team> team, const std::string &isa, std::shared_ptr<Exchange> exchange) {
                new (self) Plan(std::move(team), kernels_of(isa), std::move(exchange));
            },
            nb::arg("team"), nb::arg("isa"), nb::arg("exchange").none() = nb::none())
        .def("part", &Plan::add_part, nb::arg("width"))
        .def("sum_parts", &Plan::sum_parts, nb::arg("part"), nb::arg("out"), nb::arg("add"))
        .def(
            "buffer",
            [](Plan &plan, int width, int dtype, int rows_each) {
                return plan.add_buffer(width, dtype_of(dtype), rows_each);
            },
            nb::arg("width"), nb::arg("dtype"), nb::arg("rows_each") = 1)
        .def(
            "embedding",
            [](Plan &plan, const Matrix &table, int out, float scale, std::int64_t first,
               std::optional<std::int64_t> vocabulary) {
                plan.add(Embedding{&table, &plan.buffer(out), scale, first,
                                   vocabulary.value_or(first + table.outputs())});
            },
            nb::arg("table"), nb::arg("out"), nb::arg("scale") = 1.0F, nb::arg("first") = 0,
            nb::arg("vocabulary").none() = nb::none(), nb::keep_alive<1, 2>())
        .def(
            "embedding_sum",
            [](Plan &plan, const Matrix &tokens, const Matrix *positions, const Matrix *types,
               std::int64_t first_position, int out, std::int64_t first, std::optional<std::int64_t> vocabulary) {
                plan.add(EmbeddingSum{&tokens, positions, types, first_position, &plan.buffer(out), first,
                                      vocabulary.value_or(first + tokens.outputs())});
            },
            nb::arg("tokens"), nb::arg("positions").none(), nb::arg("types").none(), nb::arg("first_position"),
            nb::arg("out"), nb::arg("first") = 0, nb::arg("vocabulary").none() = nb::none(),
            nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
        .def(
            "angles",
            [](Plan &plan, std::uintptr_t inverse, int half, float factor, int cosines, int sines) {
                plan.add(Angles{floats_at(inverse), half, factor, &plan.buffer(cosines), &plan.buffer(sines)});
            },
            nb::arg("inverse"), nb::arg("half"), nb::arg("factor"), nb::arg("cosines"), nb::arg("sines"))
        .def(
            "norm",
            [](Plan &plan, int in, std::uintptr_t weight, float eps, int out, bool picked) {
                plan.add(Norm{&plan.buffer(in), floats_at(weight), eps, &plan.buffer(out), picked});
            },
            nb::arg("input"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"), nb::arg("picked"))
        .def(
            "add_norm",
            [](Plan &plan, int branch, std::uintptr_t weight, float eps, int residual) {
                plan.add(AddNorm{&plan.buffer(branch), floats_at(weight), eps, &plan.buffer(residual)});
            },
            nb::arg("branch"), nb::arg("weight"), nb::arg("eps"), nb::arg("residual"))
        .def(
            "layer_norm",
            [](Plan &plan, int in, std::uintptr_t weight, std::uintptr_t bias, float eps, int out,
               std::optional<int> narrowed) {
                plan.add(LayerNorm{&plan.buffer(in), floats_at(weight), floats_at(bias), eps, &plan.buffer(out),
                                   buffer_or_none(plan, narrowed)});
            },
            nb::arg("input"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"), nb::arg("out"),
            nb::arg("narrowed").none())
        .def(
            "pool",
            [](Plan &plan, int in, int out) { plan.add(Pool{&plan.buffer(in), plan.pooling(), &plan.buffer(out)}); },
            nb::arg("input"), nb::arg("out"))
        .def(
            "narrow", [](Plan &plan, int in, int out) { plan.add(Narrow{&plan.buffer(in), &plan.buffer(out)}); },
            nb::arg("input"), nb::arg("out"))
        .def("linear", &add_linear, nb::arg("input"), nb::arg("weights"), nb::arg("out"), nb::arg("epilogue"),
             nb::arg("picked"), nb::arg("activation") = "identity", nb::keep_alive<1, 3>())
        .def(
            "rotary_store",
            [](Plan &plan, int projections, std::optional<int> cosines, std::optional<int> sines, int queries,
               std::uintptr_t q_norm, std::uintptr_t k_norm, float eps, std::uintptr_t keys, std::uintptr_t values, int dtype,
               std::ptrdiff_t slot_stride, std::ptrdiff_t head_stride, int heads, int kv_heads, int head_dim, int half) {
                plan.add(RotaryStore{&plan.buffer(projections), buffer_or_none(plan, cosines),
                                     buffer_or_none(plan, sines), &plan.buffer(queries), floats_at(q_norm), floats_at(k_norm), eps,
                                     pool_of(keys, values, dtype, slot_stride, head_stride), heads, kv_heads,
                                     head_dim, half});
            },
            nb::arg("projections"), nb::arg("cosines").none(), nb::arg("sines").none(), nb::arg("queries"), nb::arg("q_norm"),
            nb::arg("k_norm"), nb::arg("eps"), nb::arg("keys"), nb::arg("values"), nb::arg("dtype"),
            nb::arg("slot_stride"), nb::arg("head_stride"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"),
            nb::arg("half"))
        .def("attention", &add_attention, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("dtype"),
             nb::arg("slot_stride"), nb::arg("head_stride"), nb::arg("out"), nb::arg("scale"), nb::arg("heads"),
             nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("window"), nb::arg("causal") = true)
        .def("begin_head", &begin_head, nb::arg("pooling") = "row")
        .def("run", &run_step, nb::arg("token_ids"), nb::arg("positions"), nb::arg("slots"), nb::arg("query_starts"),
             nb::arg("context_starts"), nb::arg("context_slots"), nb::arg("picked"), nb::arg("type_ids").none() = nb::none())
        .def("run_head", &run_head, nb::arg("picked"))
        .def("view", &view, nb::arg("buffer"), nb::arg("count"))
        .def("read", &read, nb::arg("buffer"), nb::arg("count"))
        .def("write", &write, nb::arg("buffer"), nb::arg("rows"))
        .def("set_profiling", &Plan::set_profiling, nb::arg("on"))
        .def("take_profile", &Plan::take_profile);
}

}  // namespace tokenmill
