// The reductions of sampling over rows of logits: engine/kernels/table.py says what each means.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "ranking.h"
#include "team.h"

namespace tokenmill {

// Rows of `width` logits (at least 1), `stride` floats apart.
struct Logits {
    const float *data;
    std::ptrdiff_t stride;
    int rows;
    int width;

    const float *row(std::int64_t index) const { return data + index * stride; }
};

// Columns of `count` draws, each from the row of logits that it names.
struct Draws {
    int count;
    const std::int64_t *rows;
    const double *temperatures;
    const std::int64_t *top_ks;
    const double *top_ps;
    const double *min_ps;
    const double *uniforms;
};

// Columns of `count` rows whose logprobs are wanted: of one token, of the `tops` most likely, and of `id_counts` of the
// `ids` of all rows, which lie end to end.
struct WantedLogprobs {
    int count;
    const std::int64_t *rows;
    const double *temperatures;
    const std::int64_t *tokens;
    const std::int64_t *tops;
    const std::int64_t *id_counts;
    const std::int64_t *ids;
};

// Where they go; what is of many per row lies end to end.
struct FoundLogprobs {
    float *tokens;
    std::int64_t *top_ids;
    float *tops;
    float *ids;
};

// A row is worked on by one thread from beginning to end, so that its results depend on nothing else. Rows, ids and
// counts must be in range. Not to be called by two threads at once.
class Sampling {
  public:
    Sampling(std::shared_ptr<Team> team, const Kernels &kernels);
    Sampling(const Sampling &) = delete;
    Sampling &operator=(const Sampling &) = delete;

    void best(const Logits &logits, std::int64_t *ids, float *peaks);
    void draw(const Logits &logits, const Draws &draws, std::int64_t *ids);
    void logprobs(const Logits &logits, const WantedLogprobs &wanted, const FoundLogprobs &found);

  private:
    // A thread's working memory, kept from call to call.
    struct Scratch {
        Ranking ranking;
        Memory weights;     // float [width], at least WEIGHT_BLOCK
        Memory block_sums;  // double, one for each WEIGHT_BLOCK
    };

    struct Row;  // what the steps on one row share

    void reserve(int width);
    std::int64_t draw_row(const Row &row, const Draws &draws, int index) const;
    std::int64_t draw_ranked(const Row &row, int top_k, double top_p, float least, double uniform) const;
    std::int64_t draw_from_blocks(const Row &row, float least, double uniform) const;
    void logprobs_of_row(const Row &row, const WantedLogprobs &wanted, int index, const FoundLogprobs &found) const;

    template <typename Work>
    void for_each(int count, int width, const Work &work);

    std::shared_ptr<Team> team_;
    const Kernels &kernels_;
    std::vector<Scratch> scratch_;
    int width_ = 0;
    std::vector<std::int64_t> top_starts_;
    std::vector<std::int64_t> id_starts_;
};

}  // namespace tokenmill
