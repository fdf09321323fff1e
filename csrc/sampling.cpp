#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace tokenmill {

namespace {

// Below so many logits in all, waking the team takes longer than the work.
constexpr std::int64_t ALONE = 1 << 16;

// How many of the most likely tokens are looked at first, in the hope that top_p ends among them, and how many of these
// are put in order first, then twice as many.
constexpr int FIRST_NUCLEUS = 256;
constexpr int FIRST_ORDERED = 32;

float finite_temperature(double temperature) {
    return static_cast<float>(std::min<double>(temperature, std::numeric_limits<float>::max()));
}

int blocks_of(int width) { return (width + WEIGHT_BLOCK - 1) / WEIGHT_BLOCK; }

// How many are looked at after `count`: all that there may be where they are not many more.
int next_nucleus(int count, int most) { return count >= most / 32 ? most : 8 * count; }

// Index of the weight in which `target` falls, counted from `before`, or of the last one before that; never of one
// that is below `least` or 0. At least one is not.
int locate(const float *weights, int n, float least, double before, double target) {
    int last = 0;
    for (int i = 0; i < n; ++i) {
        if (weights[i] >= least && weights[i] > 0.0F) {
            before += static_cast<double>(weights[i]);
            last = i;
            if (before > target) {
                break;
            }
        }
    }
    return last;
}

}  // namespace

struct Sampling::Row {
    const float *logits;
    int n;
    float largest;
    float temperature;
    Scratch &scratch;
};

Sampling::Sampling(std::shared_ptr<Team> team, const Kernels &kernels)
    : team_(std::move(team)), kernels_(kernels), scratch_(static_cast<std::size_t>(team_->threads())) {}

void Sampling::reserve(int width) {
    if (width <= width_) {
        return;
    }
    for (Scratch &scratch : scratch_) {
        scratch.ranking.reserve(width);
        scratch.weights = Memory(static_cast<std::size_t>(std::max(width, WEIGHT_BLOCK)) * sizeof(float));
        scratch.block_sums = Memory(static_cast<std::size_t>(blocks_of(width)) * sizeof(double));
    }
    width_ = width;
}

template <typename Work>
void Sampling::for_each(int count, int width, const Work &work) {
    if (count == 1 || static_cast<std::int64_t>(count) * width < ALONE) {
        for (int i = 0; i < count; ++i) {
            work(i, scratch_[0]);
        }
        return;
    }
    struct Context {
        const Work &work;
        std::vector<Scratch> &scratch;
    } context{work, scratch_};
    team_->run(
        std::span(&count, 1),
        [](void *shared, int, int chunk, int thread) {
            const auto &mine = *static_cast<Context *>(shared);
            mine.work(chunk, mine.scratch[static_cast<std::size_t>(thread)]);
        },
        &context);
}

void Sampling::best(const Logits &logits, std::int64_t *ids, float *peaks) {
    for_each(logits.rows, logits.width, [&](int i, Scratch &) {
        const Kernels::Peak peak = kernels_.peak(logits.row(i), logits.width);
        ids[i] = peak.index;
        peaks[i] = peak.value;
    });
}

void Sampling::draw(const Logits &logits, const Draws &draws, std::int64_t *ids) {
    reserve(logits.width);
    for_each(draws.count, logits.width, [&](int i, Scratch &scratch) {
        const float *row = logits.row(draws.rows[i]);
        const Kernels::Peak peak = kernels_.peak(row, logits.width);
        const float temperature = finite_temperature(draws.temperatures[i]);
        ids[i] = std::isfinite(peak.value)
                     ? draw_row({row, logits.width, peak.value, temperature, scratch}, draws, i)
                     : peak.index;
    });
}

std::int64_t Sampling::draw_row(const Row &row, const Draws &draws, int index) const {
    const std::int64_t top_k = draws.top_ks[index];
    const auto least = static_cast<float>(draws.min_ps[index]);  // the largest weight is 1
    const bool all = top_k < 0 || top_k >= row.n;
    if (all && draws.top_ps[index] >= 1.0) {
        return draw_from_blocks(row, least, draws.uniforms[index]);
    }
    return draw_ranked(row, all ? row.n : static_cast<int>(top_k), draws.top_ps[index], least, draws.uniforms[index]);
}

std::int64_t Sampling::draw_from_blocks(const Row &row, float least, double uniform) const {
    auto *sums = row.scratch.block_sums.as<double>();
    kernels_.block_sums(row.logits, row.n, row.largest, row.temperature, least, sums);
    const int blocks = blocks_of(row.n);
    const double target = uniform * std::accumulate(sums, sums + blocks, 0.0);
    double before = 0.0;
    int block = 0;
    double before_block = 0.0;
    for (int i = 0; i < blocks && before <= target; ++i) {
        if (sums[i] > 0.0) {
            block = i;
            before_block = before;
            before += sums[i];
        }
    }
    const int start = block * WEIGHT_BLOCK;
    const int n = std::min(WEIGHT_BLOCK, row.n - start);
    auto *weights = row.scratch.weights.as<float>();
    kernels_.weigh(row.logits + start, n, row.largest, row.temperature, weights);
    return start + locate(weights, n, least, before_block, target);
}

std::int64_t Sampling::draw_ranked(const Row &row, int top_k, double top_p, float least, double uniform) const {
    Ranking &ranking = row.scratch.ranking;
    auto *weights = row.scratch.weights.as<float>();
    double most = std::numeric_limits<double>::infinity();  // weight before the last token that is kept
    if (top_p < 1.0) {
        auto *sums = row.scratch.block_sums.as<double>();
        kernels_.block_sums(row.logits, row.n, row.largest, row.temperature, 0.0F, sums);
        most = top_p * std::accumulate(sums, sums + blocks_of(row.n), 0.0);
    }
    int kept = 0;
    double kept_weight = 0.0;
    bool ended = false;
    for (int count = top_p < 1.0 ? std::min(top_k, FIRST_NUCLEUS) : top_k;; count = next_nucleus(count, top_k)) {
        ranking.find(kernels_, row.logits, row.n, count);
        kept = 0;
        kept_weight = 0.0;
        double before = 0.0;
        for (int step = top_p < 1.0 && count <= FIRST_NUCLEUS ? FIRST_ORDERED : count; kept < count && !ended; step *= 2) {
            const int first = kept;
            const int last = std::min(count, first + std::min(step, count));
            ranking.order(first, last);
            for (int i = first; i < last; ++i) {
                weights[i] = ranking.value(i);
            }
            kernels_.weigh(weights + first, last - first, row.largest, row.temperature, weights + first);
            for (; kept < last; ++kept) {
                ended = before > most;
                if (ended) {
                    break;
                }
                before += static_cast<double>(weights[kept]);
                kept_weight += weights[kept] >= least ? static_cast<double>(weights[kept]) : 0.0;
            }
        }
        if (ended || count == top_k) {
            break;
        }
    }
    return ranking.index(locate(weights, kept, least, 0.0, uniform * kept_weight));
}

void Sampling::logprobs(const Logits &logits, const WantedLogprobs &wanted, const FoundLogprobs &found) {
    reserve(logits.width);
    top_starts_.assign(1, 0);
    id_starts_.assign(1, 0);
    for (int i = 0; i < wanted.count; ++i) {
        top_starts_.push_back(top_starts_.back() + wanted.tops[i]);
        id_starts_.push_back(id_starts_.back() + wanted.id_counts[i]);
    }
    for_each(wanted.count, logits.width, [&](int i, Scratch &scratch) {
        const float *row = logits.row(wanted.rows[i]);
        const Kernels::Peak peak = kernels_.peak(row, logits.width);
        const float temperature = finite_temperature(wanted.temperatures[i]);
        logprobs_of_row({row, logits.width, peak.value, temperature, scratch}, wanted, i, found);
    });
}

void Sampling::logprobs_of_row(const Row &row, const WantedLogprobs &wanted, int index,
                               const FoundLogprobs &found) const {
    const auto i = static_cast<std::size_t>(index);
    const bool finite = std::isfinite(row.largest);
    double log_total = 0.0;
    if (finite) {
        auto *sums = row.scratch.block_sums.as<double>();
        kernels_.block_sums(row.logits, row.n, row.largest, row.temperature, 0.0F, sums);
        log_total = std::log(std::accumulate(sums, sums + blocks_of(row.n), 0.0));
    }
    const auto value = [&](float logit) {
        const double difference = static_cast<double>(logit) - static_cast<double>(row.largest);
        return finite ? static_cast<float>(difference / static_cast<double>(row.temperature) - log_total)
                      : std::numeric_limits<float>::quiet_NaN();
    };
    found.tokens[index] = value(row.logits[wanted.tokens[index]]);
    for (std::int64_t entry = id_starts_[i]; entry < id_starts_[i + 1]; ++entry) {
        found.ids[entry] = value(row.logits[wanted.ids[entry]]);
    }
    const auto top = static_cast<int>(wanted.tops[index]);
    if (top == 0) {
        return;
    }
    Ranking &ranking = row.scratch.ranking;
    if (finite) {
        ranking.find(kernels_, row.logits, row.n, top);
        ranking.order(0, top);
    }
    for (int rank = 0; rank < top; ++rank) {
        const int id = finite ? ranking.index(rank) : rank;
        found.top_ids[top_starts_[i] + rank] = id;
        found.tops[top_starts_[i] + rank] = value(row.logits[id]);
    }
}

}  // namespace tokenmill
