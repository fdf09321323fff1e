#include "bind_moe.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "moe.h"

namespace nb = nanobind;

namespace tokenmill {

namespace {

using Ids = nb::ndarray<nb::numpy, std::int32_t, nb::ndim<2>>;

void add_route(Plan &plan, int logits, int routing, bool normalise) {
    plan.add(Route{&plan.buffer(logits), &plan.routing(routing), normalise});
    plan.add(Group{&plan.routing(routing)});
}

void add_experts(Plan &plan, int in, const nb::tuple &weights, int out, int routing) {
    auto matrices = std::make_shared<std::vector<const Matrix *>>();
    for (const nb::handle one : weights) {
        matrices->push_back(&nb::cast<const Matrix &>(one));
    }
    if (matrices->empty()) {
        throw std::invalid_argument("there are no experts");
    }
    plan.add(ExpertProduct{&plan.buffer(in), std::move(matrices), &plan.buffer(out), &plan.routing(routing)});
}

void add_combine(Plan &plan, int outputs, int shared, int shared_gate, int residual, int routing, bool afresh) {
    const auto optional = [&](int index) { return index < 0 ? nullptr : &plan.buffer(index); };
    plan.add(Combine{&plan.buffer(outputs), optional(shared), optional(shared_gate), &plan.buffer(residual),
                     &plan.routing(routing), afresh});
}

Ids routed(Plan &plan, int index) {
    const Routing &routing = plan.routing(index);
    const auto tokens = static_cast<std::size_t>(plan.tokens());
    const auto top_k = static_cast<std::size_t>(routing.top_k());
    auto *ids = new std::int32_t[tokens * top_k + 1];
    nb::capsule owner(ids, [](void *memory) noexcept { delete[] static_cast<std::int32_t *>(memory); });
    if (tokens > 0) {
        std::copy_n(routing.ids(0), tokens * top_k, ids);
    }
    return Ids(ids, {tokens, top_k}, owner);
}

}  // namespace

void bind_moe(nb::class_<Plan> &plan) {
    plan.def("routing", &Plan::add_routing, nb::arg("experts"), nb::arg("top_k"))
        .def("route", &add_route, nb::arg("logits"), nb::arg("routing"), nb::arg("normalise"))
        .def("experts", &add_experts, nb::arg("input"), nb::arg("weights"), nb::arg("out"), nb::arg("routing"),
             nb::keep_alive<1, 3>())
        .def("combine", &add_combine, nb::arg("outputs"), nb::arg("shared"), nb::arg("shared_gate"),
             nb::arg("residual"), nb::arg("routing"), nb::arg("afresh") = false, "shared, shared_gate: -1 where there is no shared expert.")
        .def("routed", &routed, nb::arg("routing"),
             "The experts of each token of the last step, best first: int32 [tokens, top_k], copied.");
}

}  // namespace tokenmill
