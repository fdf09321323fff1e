// A model's step, recorded once and replayed by one call.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "attention.h"
#include "check_ops.h"
#include "exchange.h"
#include "moe.h"
#include "ops.h"
#include "team.h"

namespace tokenmill {

struct Attend {
    Attention attention;
};

struct Merge {
    Attention attention;
};

using Op = std::variant<Embedding, EmbeddingSum, Angles, Norm, AddNorm, LayerNorm, Pool, Narrow, Linear, RotaryStore,
                        Attend, Merge, Route, Group, ExpertProduct, Combine, Meet, Sum>;

// Ops with resolved weights and buffers, in the order in which they run. The ops after `begin_head` work on the picked
// rows of a step and may be run again for other rows of it.
class Plan {
  public:
    // exchange: with the other ranks of the model; null where there are none.
    Plan(std::shared_ptr<Team> team, const Kernels &kernels, std::shared_ptr<Exchange> exchange = nullptr);

    int add_buffer(int width, Dtype type, int rows_each);
    Buffer &buffer(int index) { return *buffers_.at(static_cast<std::size_t>(index)); }

    // A buffer whose rows the other ranks see; each is summed (into a buffer, or on top of it) before the next is made.
    int add_part(int width);
    void sum_parts(int part, int out, bool add_to_it);

    // Attention is laid out once a step for each window, causal or not. Returns the layout's index.
    int layout_of(bool causal, int window, int group, int kv_heads);

    // A router's decisions, which a layer's ops share; returns its index.
    int add_routing(int experts, int top_k);
    Routing &routing(int index) { return *routings_.at(static_cast<std::size_t>(index)); }

    // Tokens of the last step.
    int tokens() const { return inputs_.tokens; }

    // Throws std::invalid_argument for an op that check_ops.h or moe.h refuses.
    void add(Op op);
    // pooling: what the head gets of the sequences that end with the picked rows, which must then lie wholly in the step.
    // With `first` it is their first rows that are picked.
    void begin_head(Pooling pooling);
    Pooling pooling() const { return pooling_; }

    // Run a step. Buffers grow to the most tokens and picked rows seen; nothing else is allocated per step but the
    // lists of attention's work. Throws std::bad_alloc, std::invalid_argument for inputs that check_ops.h refuses, and
    // ExchangeError where another rank stays away.
    // slots: how many context slots there are.
    void run(const Inputs &inputs, std::int64_t slots);
    // The head for other rows of the last step; only `picked` and `picked_rows` of the inputs are looked at.
    void run_head(int picked, const std::int64_t *rows);

    const Kernels &kernels() const { return kernels_; }
    Team &team() { return *team_; }

    // Microseconds spent in each kind of op since it was last asked for, while `set_profiling` is on.
    std::map<std::string, double> take_profile();
    void set_profiling(bool on) { profiling_ = on; }

  private:
    struct Window {
        bool causal;
        int window;
        int group;
        int kv_heads;
        AttentionLayout layout;
    };

    static void work(void *context, int phase, int chunk, int thread);
    int chunks(const Op &op) const;
    void run_chunk(const Op &op, int chunk, Scratch &scratch);
    void run_ops(std::size_t first, std::size_t last);
    void reserve();
    void pick(int picked, const std::int64_t *rows);

    std::shared_ptr<Team> team_;
    const Kernels &kernels_;
    std::shared_ptr<Exchange> exchange_;
    std::map<int, int> part_slots_;  // of the exchange, by buffer
    std::vector<std::unique_ptr<Buffer>> buffers_;
    std::vector<std::unique_ptr<Routing>> routings_;
    std::vector<Op> ops_;
    std::size_t head_ = 0;
    bool in_head_ = false;
    Pooling pooling_ = Pooling::row;
    Limits limits_;
    std::vector<std::int64_t> row_starts_;     // see whole_sequences in check_ops.h
    std::vector<std::int64_t> picked_starts_;  // of the sequences of the picked rows
    std::vector<Window> windows_;
    std::vector<Scratch> scratch_;
    std::size_t tile_bytes_ = TILE_BYTES;
    std::size_t scratch_bytes_ = 0;
    std::size_t gathered_bytes_ = 0;
    std::size_t record_floats_ = 0;
    Memory records_;
    std::vector<int> counts_;
    Inputs inputs_;
    std::size_t running_ = 0;
    bool profiling_ = false;
    std::map<std::string, double> profile_;
};

}  // namespace tokenmill
