#include "matrix.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tokenmill {

namespace {

int panels_of(int outputs, bool gated) {
    if (gated && outputs % 2 != 0) {
        throw std::invalid_argument("a gated matrix has an even number of outputs, not " + std::to_string(outputs));
    }
    return gated ? 2 * static_cast<int>(round_up(outputs / 2, PANEL) / PANEL)
                 : static_cast<int>(round_up(outputs, PANEL) / PANEL);
}

// Words per row that are written before the next row of the panel gets its turn: what they touch stays in the cache.
constexpr int BLOCK = 64;

// Words that lie a panel's width apart, one behind the other. Each comes from a cache line of its own: the loop is kept so
// short that many are on their way at once.
template <typename Word>
void collect(const Word *from, int count, char *to) {
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        std::memcpy(to + i * static_cast<std::ptrdiff_t>(sizeof(Word)), from + i * PANEL, sizeof(Word));
    }
}

}  // namespace

Matrix::Matrix(Arena &arena, int outputs, int inputs, Dtype type, bool gated, bool biased)
    : outputs_(outputs),
      inputs_(inputs),
      type_(type),
      gated_(gated),
      panels_(panels_of(outputs, gated)),
      depth_(type == Dtype::bf16 ? static_cast<int>(round_up(inputs, PANEL)) : inputs),
      memory_(arena.take(static_cast<std::size_t>(panels_) * static_cast<std::size_t>(depth_) * PANEL * size_of(type))),
      bias_(biased ? arena.take(static_cast<std::size_t>(panels_) * PANEL * sizeof(float)) : Arena::Piece{}) {}

std::ptrdiff_t Matrix::panel_bytes() const {
    return static_cast<std::ptrdiff_t>(depth_) * PANEL * static_cast<std::ptrdiff_t>(size_of(type_));
}

const float *Matrix::bias(int panel) const {
    return bias_.bytes == 0 ? nullptr : reinterpret_cast<float *>(bias_.data) + static_cast<std::ptrdiff_t>(panel) * PANEL;
}

Matrix::Place Matrix::place_of(int row) const {
    if (!gated_) {
        return {row / PANEL, row % PANEL};
    }
    const int half = outputs_ / 2;
    const int side = row < half ? 0 : 1;
    const int within = row - side * half;
    return {2 * (within / PANEL) + side, within % PANEL};
}

template <typename Word>
Word *Matrix::words(Place place) const {
    return reinterpret_cast<Word *>(memory_.data + place.panel * panel_bytes()) + place.lane;
}

void Matrix::write(int start, int count, const void *rows) {
    const auto *source = static_cast<const char *>(rows);
    const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(inputs_) * static_cast<std::ptrdiff_t>(size_of(type_));
    for (int first = 0; first < count;) {
        // The rows that share a panel are written together.
        int last = first + 1;
        while (last < count && place_of(start + last).panel == place_of(start + first).panel) {
            ++last;
        }
        for (int column = 0; column < inputs_; column += 2 * BLOCK) {
            const int end = std::min(inputs_, column + 2 * BLOCK);
            for (int row = first; row < last; ++row) {
                const char *line = source + row * row_bytes;
                const Place place = place_of(start + row);
                if (type_ == Dtype::f32) {
                    auto *target = words<std::uint32_t>(place);
                    for (int k = column; k < end; ++k) {
                        std::memcpy(&target[static_cast<std::ptrdiff_t>(k) * PANEL], line + 4L * k, 4);
                    }
                } else if (type_ == Dtype::f16) {
                    auto *target = words<std::uint16_t>(place);
                    for (int k = column; k < end; ++k) {
                        std::memcpy(&target[static_cast<std::ptrdiff_t>(k) * PANEL], line + 2L * k, 2);
                    }
                } else {
                    auto *target = words<std::uint32_t>(place);
                    for (int k = column; k < end; k += 2) {
                        std::memcpy(&target[static_cast<std::ptrdiff_t>(k / 2) * PANEL], line + 2L * k,
                                    k + 1 < inputs_ ? 4 : 2);
                    }
                }
            }
        }
        first = last;
    }
}

void Matrix::read(int start, int count, void *rows) const {
    auto *target = static_cast<char *>(rows);
    const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(inputs_) * static_cast<std::ptrdiff_t>(size_of(type_));
    for (int row = 0; row < count; ++row) {
        char *line = target + row * row_bytes;
        const Place place = place_of(start + row);
        if (type_ == Dtype::f32) {
            collect(words<std::uint32_t>(place), inputs_, line);
        } else if (type_ == Dtype::f16) {
            collect(words<std::uint16_t>(place), inputs_, line);
        } else {
            const auto *pairs = words<std::uint32_t>(place);
            collect(pairs, inputs_ / 2, line);
            if (inputs_ % 2 != 0) {
                std::memcpy(line + 2L * (inputs_ - 1), pairs + static_cast<std::ptrdiff_t>(inputs_ / 2) * PANEL, 2);
            }
        }
    }
}

void Matrix::write_bias(int start, int count, const float *values) {
    for (int i = 0; i < count; ++i) {
        const Place place = place_of(start + i);
        reinterpret_cast<float *>(bias_.data)[static_cast<std::ptrdiff_t>(place.panel) * PANEL + place.lane] = values[i];
    }
}

void Matrix::read_bias(int start, int count, float *values) const {
    for (int i = 0; i < count; ++i) {
        const Place place = place_of(start + i);
        values[i] = reinterpret_cast<float *>(bias_.data)[static_cast<std::ptrdiff_t>(place.panel) * PANEL + place.lane];
    }
}

}  // namespace tokenmill
