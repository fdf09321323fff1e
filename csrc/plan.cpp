#include "plan.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "check_ops.h"

namespace tokenmill {

namespace {

constexpr std::ptrdiff_t CACHE_LINE = 64;

// An odd number of cache lines: rows at strides of powers of two would fight for the same sets of the cache.
std::ptrdiff_t stride_of(int width, Dtype type) {
    const auto size = static_cast<std::ptrdiff_t>(size_of(type));
    const std::ptrdiff_t lines = round_up(round_up(width, PANEL) * size, CACHE_LINE) / CACHE_LINE;
    return (lines | 1) * CACHE_LINE / size;
}

template <typename... Cases>
struct Overloaded : Cases... {
    using Cases::operator()...;
};

constexpr const char *NAMES[] = {"embedding", "embedding_sum", "angles",       "norm",      "add_norm", "layer_norm",
                                 "pool",      "narrow",        "linear",       "rotary_store", "attention", "merge",
                                 "route",     "group",         "experts",      "combine",   "meet",     "sum"};
static_assert(std::size(NAMES) == std::variant_size_v<Op>);

}  // namespace

Buffer::Buffer(int width, Dtype type, bool of_head, int rows_each)
    : width_(width), type_(type), of_head_(of_head), rows_each_(rows_each), stride_(stride_of(width, type)) {
    if (width < 1 || rows_each < 1) {
        throw std::invalid_argument("a buffer's width and rows_each are at least 1, not " + std::to_string(width) +
                                    " and " + std::to_string(rows_each));
    }
}

void Buffer::lie_in(char *memory, std::size_t bytes) {
    data_ = memory;
    lent_bytes_ = bytes;
}

void Buffer::reserve(int rows) {
    if (rows <= rows_) {
        return;
    }
    const std::size_t bytes = static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride_) * size_of(type_);
    if (lent_bytes_ == 0) {
        memory_ = Memory(bytes);
        data_ = memory_.as<char>();
    } else if (bytes > lent_bytes_) {
        throw std::invalid_argument("a step of " + std::to_string(rows) + " rows does not fit what ranks exchange: " +
                                    std::to_string(bytes) + " bytes, and there is room for " +
                                    std::to_string(lent_bytes_));
    }
    rows_ = rows;
}

Plan::Plan(std::shared_ptr<Team> team, const Kernels &kernels, std::shared_ptr<Exchange> exchange)
    : team_(std::move(team)), kernels_(kernels), exchange_(std::move(exchange)), scratch_(static_cast<std::size_t>(team_->threads())) {}

int Plan::add_buffer(int width, Dtype type, int rows_each) {
    buffers_.push_back(std::make_unique<Buffer>(width, type, in_head_, rows_each));
    return static_cast<int>(buffers_.size()) - 1;
}

int Plan::add_part(int width) {
    if (exchange_ == nullptr) {
        throw std::invalid_argument("this plan has nobody to exchange parts with");
    }
    const int index = add_buffer(width, Dtype::f32, 1);
    part_slots_[index] = static_cast<int>(part_slots_.size()) & 1;
    buffer(index).lie_in(exchange_->part(exchange_->rank(), part_slots_[index]), exchange_->part_bytes());
    return index;
}

void Plan::sum_parts(int part, int out, bool add_to_it) {
    const int slot = part_slots_.at(part);
    add(Meet{exchange_.get(), &buffer(part), slot});
    add(Sum{exchange_.get(), &buffer(part), slot, &buffer(out), add_to_it});
}

int Plan::add_routing(int experts, int top_k) {
    routings_.push_back(std::make_unique<Routing>(experts, top_k));
    return static_cast<int>(routings_.size()) - 1;
}

int Plan::layout_of(bool causal, int window, int group, int kv_heads) {
    const auto known = std::find_if(windows_.begin(), windows_.end(), [&](const Window &entry) {
        return entry.causal == causal && entry.window == window && entry.group == group && entry.kv_heads == kv_heads;
    });
    if (known != windows_.end()) {
        return static_cast<int>(known - windows_.begin());
    }
    windows_.push_back({causal, window, group, kv_heads, {}});
    return static_cast<int>(windows_.size()) - 1;
}

void Plan::add(Op op) {
    std::visit(Overloaded{
                   [&](const Attend &it) { check(it.attention, in_head_); },
                   [&](const Merge &it) { check(it.attention, in_head_); },
                   [&](const auto &it) { check(it, in_head_); },
               },
               op);
    if (const auto *attend = std::get_if<Attend>(&op)) {
        scratch_bytes_ = std::max(scratch_bytes_, attention_scratch(attend->attention));
        record_floats_ = std::max(record_floats_, record_floats(attend->attention));
    }
    if (const auto *experts = std::get_if<ExpertProduct>(&op)) {
        gathered_bytes_ = std::max(gathered_bytes_, gathered_bytes(*experts));
    }
    if (const auto *embedding = std::get_if<Embedding>(&op)) {
        tile_bytes_ = std::max(tile_bytes_, static_cast<std::size_t>(embedding->table->inputs()) * sizeof(float));
        limits_.vocabulary = std::min(limits_.vocabulary, embedding->vocabulary);
    }
    if (const auto *sum = std::get_if<Sum>(&op)) {
        tile_bytes_ = std::max(tile_bytes_, static_cast<std::size_t>(sum->out->padded()) * sizeof(float));
    }
    if (const auto *sum = std::get_if<EmbeddingSum>(&op)) {
        const auto room = 2 * static_cast<std::size_t>(sum->out->padded()) * sizeof(float);
        tile_bytes_ = std::max(tile_bytes_, room);
        limits_.vocabulary = std::min(limits_.vocabulary, sum->vocabulary);
        if (sum->positions != nullptr) {
            limits_.positions = std::min(limits_.positions, sum->positions->outputs() - sum->first_position);
        }
        if (sum->types != nullptr) {
            limits_.types = std::min<std::int64_t>(limits_.types, sum->types->outputs());
        }
    }
    ops_.push_back(op);
    if (!in_head_) {
        head_ = ops_.size();
    }
}

void Plan::begin_head(Pooling pooling) {
    pooling_ = pooling;
    in_head_ = true;
    head_ = ops_.size();
}

void Plan::reserve() {
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
        buffers_[i]->reserve((buffers_[i]->of_head() ? inputs_.picked : inputs_.tokens) * buffers_[i]->rows_each());
    }
    for (const auto &routing : routings_) {
        routing->reserve(inputs_.tokens);
    }
    for (Scratch &scratch : scratch_) {
        scratch.reserve(tile_bytes_, scratch_bytes_, gathered_bytes_);
    }
}

void Plan::run(const Inputs &inputs, std::int64_t slots) {
    check(inputs, slots, limits_);
    if (pooling_ != Pooling::row) {
        std::vector<std::int64_t> starts = whole_sequences(inputs);
        check_whole(inputs.picked, inputs.picked_rows, starts);
        row_starts_ = std::move(starts);
    }
    inputs_ = inputs;
    pick(inputs.picked, inputs.picked_rows);
    int records = 0;
    for (Window &entry : windows_) {
        entry.layout.plan(inputs.sequences, entry.causal, entry.window, entry.group, entry.kv_heads, team_->threads());
        records = std::max(records, entry.layout.records);
    }
    const std::size_t bytes = static_cast<std::size_t>(records) * record_floats_ * sizeof(float);
    if (records_.size() < bytes) {
        records_ = Memory(bytes + bytes / 2);
    }
    reserve();
    if (exchange_ != nullptr) {
        exchange_->even();
    }
    run_ops(0, inputs.picked > 0 ? ops_.size() : head_);
    if (exchange_ != nullptr && exchange_->failed()) {
        throw ExchangeError(exchange_->failure());
    }
}

void Plan::run_head(int picked, const std::int64_t *rows) {
    check_picked(picked, rows, inputs_.tokens);
    if (pooling_ != Pooling::row) {
        check_whole(picked, rows, row_starts_);
    }
    pick(picked, rows);
    reserve();
    run_ops(head_, ops_.size());
}

// rows: of whole sequences, unless each row is the head's by itself.
void Plan::pick(int picked, const std::int64_t *rows) {
    inputs_.picked = picked;
    inputs_.picked_rows = rows;
    if (pooling_ == Pooling::row) {
        return;
    }
    picked_starts_.clear();
    for (int i = 0; i < picked; ++i) {
        picked_starts_.push_back(row_starts_[static_cast<std::size_t>(rows[i])]);
    }
    (pooling_ == Pooling::first ? inputs_.picked_rows : inputs_.picked_starts) = picked_starts_.data();
}

void Plan::run_ops(std::size_t first, std::size_t last) {
    counts_.clear();
    for (std::size_t i = first; i < last; ++i) {
        counts_.push_back(chunks(ops_[i]));
    }
    if (!profiling_) {
        running_ = first;
        team_->run(counts_, &Plan::work, this);
        return;
    }
    for (std::size_t i = first; i < last; ++i) {
        const auto started = std::chrono::steady_clock::now();
        running_ = i;
        team_->run(std::span(&counts_[i - first], 1), &Plan::work, this);
        const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() - started;
        profile_[NAMES[ops_[i].index()]] += spent.count();
    }
}

std::map<std::string, double> Plan::take_profile() { return std::exchange(profile_, {}); }

void Plan::work(void *context, int phase, int chunk, int thread) {
    auto &plan = *static_cast<Plan *>(context);
    plan.run_chunk(plan.ops_[plan.running_ + static_cast<std::size_t>(phase)], chunk,
                   plan.scratch_[static_cast<std::size_t>(thread)]);
}

int Plan::chunks(const Op &op) const {
    const auto layout = [&](const Attention &attention) -> const AttentionLayout & {
        return windows_[static_cast<std::size_t>(attention.layout)].layout;
    };
    return std::visit(
        Overloaded{
            [&](const Attend &it) {
                return static_cast<int>(layout(it.attention).items.size()) * it.attention.kv_heads;
            },
            [&](const Merge &it) {
                return static_cast<int>(layout(it.attention).merged.size()) * it.attention.kv_heads;
            },
            [&](const auto &it) { return chunks_of(it, inputs_, team_->threads()); },
        },
        op);
}

void Plan::run_chunk(const Op &op, int chunk, Scratch &scratch) {
    const Bench bench{kernels_, inputs_, team_->threads()};
    const auto layout = [&](const Attention &attention) -> const AttentionLayout & {
        return windows_[static_cast<std::size_t>(attention.layout)].layout;
    };
    std::visit(Overloaded{
                   [&](const Attend &it) {
                       attend(it.attention, kernels_, layout(it.attention), chunk, team_->threads(),
                              records_.as<float>(), scratch.attention.as<char>());
                   },
                   [&](const Merge &it) {
                       merge(it.attention, kernels_, layout(it.attention), chunk, records_.as<float>(),
                             scratch.attention.as<char>());
                   },
                   [&](const auto &it) { execute(it, bench, chunk, scratch); },
               },
               op);
}

}  // namespace tokenmill
