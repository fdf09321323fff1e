// How ops fall into chunks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace tokenmill {

// Chunks per thread that a product is cut into where its panels allow it, and the most bytes of weights in a chunk.
constexpr int CHUNKS_PER_THREAD = 8;
constexpr std::ptrdiff_t CHUNK_BYTES = 256 * 1024;

inline int divided(int count, int by) { return (count + by - 1) / by; }

// Rows of a chunk of an op that works row by row.
inline int rows_per_chunk(int rows, int threads) { return std::clamp(divided(rows, threads * 4), 4, 32); }

struct Range {
    int first;
    int last;
};

inline Range rows_of(int chunk, int rows, int threads) {
    const int step = rows_per_chunk(rows, threads);
    return {chunk * step, std::min(rows, (chunk + 1) * step)};
}

inline int row_chunks(int rows, int threads) { return rows == 0 ? 0 : divided(rows, rows_per_chunk(rows, threads)); }

// Panels of a chunk of products with `tiles` times all `panels` of a matrix: a multiple of `unit`.
inline int panels_per_chunk(int panels, int tiles, std::ptrdiff_t panel_bytes, int unit, int threads, int most_chunks) {
    const auto most = static_cast<int>(std::max<std::ptrdiff_t>(1, CHUNK_BYTES / panel_bytes));
    const int wanted = panels * tiles / (threads * CHUNKS_PER_THREAD);
    int each = std::max(std::clamp(wanted, 1, most) / unit * unit, unit);
    while (static_cast<std::int64_t>(divided(panels, each)) * tiles >= most_chunks) {
        each *= 2;
    }
    return each;
}

}  // namespace tokenmill
