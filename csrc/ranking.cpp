#include "ranking.h"

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <utility>

namespace tokenmill {

namespace {

// Sets of entries per entry that is wanted: less than half as many again are then collected, as a rule.
constexpr int SETS_EACH = 2;
constexpr int LARGEST_GROUP = 64;
constexpr int PADDING = 64;  // maxima beyond one per entry: see Kernels::maxima

// From so many keys on all are sorted at once, by their digits.
constexpr int MANY = 2048;
constexpr int DIGIT_BITS = 11;
constexpr int DIGITS = 3;  // of the 32 bits of a value

std::size_t digit_of(std::uint64_t key, int digit) {
    return static_cast<std::size_t>(~key >> (32 + digit * DIGIT_BITS)) & ((1U << DIGIT_BITS) - 1U);
}

}  // namespace

void Ranking::reserve(int width) {
    if (width <= width_) {
        return;
    }
    const auto size = static_cast<std::size_t>(width);
    memory_ = Memory(2 * size * sizeof(std::uint64_t) + (size + PADDING) * sizeof(float));
    width_ = width;
    keys_ = memory_.as<std::uint64_t>();
    other_ = keys_ + width;
    maxima_ = reinterpret_cast<float *>(other_ + width);
}

int Ranking::find(const Kernels &kernels, const float *row, int n, int count) {
    // The count-th largest of the maxima of disjoint sets is no more than the count-th largest entry: what is below
    // it need not be looked at again.
    float threshold = -std::numeric_limits<float>::infinity();
    if (const int group = std::min(n / SETS_EACH / count, LARGEST_GROUP); group > 1) {
        const int sets = kernels.maxima(row, n, group, maxima_);
        if (count <= sets) {
            std::nth_element(maxima_, maxima_ + count - 1, maxima_ + sets, std::greater<>());
            threshold = maxima_[count - 1];
        }
    }
    found_ = kernels.collect(row, n, threshold, keys_);
    return found_;
}

void Ranking::order(int first, int last) {
    if (first == 0 && last >= MANY) {
        sort_all();
        return;
    }
    if (last < found_) {
        std::nth_element(keys_ + first, keys_ + last, keys_ + found_, std::greater<>());
    }
    std::sort(keys_ + first, keys_ + last, std::greater<>());
}

// From the last digit of the values to the first; the indices ascend as they were collected, and each pass keeps the
// order of equals.
void Ranking::sort_all() {
    std::array<std::array<int, 1U << DIGIT_BITS>, DIGITS> places{};
    for (int i = 0; i < found_; ++i) {
        for (int digit = 0; digit < DIGITS; ++digit) {
            ++places[static_cast<std::size_t>(digit)][digit_of(keys_[i], digit)];
        }
    }
    for (int digit = 0; digit < DIGITS; ++digit) {
        auto &place = places[static_cast<std::size_t>(digit)];
        int before = 0;
        for (int &entry : place) {
            before += std::exchange(entry, before);
        }
        for (int i = 0; i < found_; ++i) {
            other_[place[digit_of(keys_[i], digit)]++] = keys_[i];
        }
        std::swap(keys_, other_);
    }
}

}  // namespace tokenmill
