// The largest entries of a row, in order.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels.h"
#include "memory.h"

namespace tokenmill {

// Ranks one row at a time, in memory that it keeps. Entries are keys: in the upper half the bits of the value, turned
// so that they grow with it as an unsigned number, in the lower the complement of the index. So the larger key is the
// larger value, the lower index among equals, and no comparison ever meets a NaN.
class Ranking {
  public:
    // Make room for rows of `width` entries. Throws std::bad_alloc.
    void reserve(int width);

    // Find the `count` largest entries of row[n] and all that equal the last of them. Returns how many they are: at
    // least `count`, which is at most n, in a row without NaN.
    int find(const Kernels &kernels, const float *row, int n, int count);

    // Put ranks [first, last) of what was found in order; all before `first` are already.
    void order(int first, int last);

    int index(int rank) const { return static_cast<int>(~static_cast<std::uint32_t>(keys_[rank])); }
    float value(int rank) const {
        const auto bits = static_cast<std::uint32_t>(keys_[rank] >> 32);
        return std::bit_cast<float>(bits ^ ((bits >> 31) != 0 ? 0x80000000U : 0xFFFFFFFFU));
    }

  private:
    void sort_all();

    Memory memory_;
    int width_ = 0;
    int found_ = 0;
    std::uint64_t *keys_ = nullptr;   // [width]
    std::uint64_t *other_ = nullptr;  // [width]: where sort_all moves the keys to
    float *maxima_ = nullptr;
};

}  // namespace tokenmill
