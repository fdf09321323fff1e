#include "roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "memory.h"

namespace tokenmill {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr std::ptrdiff_t PIECE = 1 << 20;

struct Reading {
    const char *data;
    std::atomic<std::uint64_t> sum{0};
};

void read_piece(void *context, int, int chunk, int) {
    auto &reading = *static_cast<Reading *>(context);
    const auto *words = reinterpret_cast<const std::uint64_t *>(reading.data + chunk * PIECE);
    constexpr std::ptrdiff_t COUNT = PIECE / 8;
    constexpr int LINES = 8;
    std::uint64_t sums[LINES] = {};
    for (std::ptrdiff_t i = 0; i < COUNT; i += LINES) {
        __builtin_prefetch(words + i + 512);
        for (int line = 0; line < LINES; ++line) {
            sums[line] += words[i + line];
        }
    }
    for (const std::uint64_t sum : sums) {
        reading.sum += sum;
    }
}

constexpr int ROWS = 224;  // a multiple of every kernel's tile: 14, 16 and 32
constexpr int DEPTH = 192;
constexpr int REPEATS = 64;

struct Multiplying {
    Multiply multiply;
    Dtype type;
    std::vector<Memory> operands;
};

void multiply_piece(void *context, int, int, int thread) {
    auto &work = *static_cast<Multiplying *>(context);
    char *base = work.operands[static_cast<std::size_t>(thread)].as<char>();
    auto *out = reinterpret_cast<float *>(base);
    char *x = base + 64 * 1024;
    const char *panel = base + 192 * 1024;
    constexpr int TILE = 28;
    for (int i = 0; i < REPEATS; ++i) {
        for (int row = 0; row < ROWS; row += TILE) {
            work.multiply(x, DEPTH, TILE, panel, DEPTH, out, PANEL, false);
        }
    }
}

}  // namespace

double read_rate(Team &team, std::size_t bytes) {
    const Memory memory(bytes);
    std::fill(memory.as<char>(), memory.as<char>() + bytes, 1);
    Reading reading{memory.as<char>()};
    const int chunks[] = {static_cast<int>(bytes / PIECE)};
    const auto start = Clock::now();
    team.run(chunks, &read_piece, &reading);
    return static_cast<double>(chunks[0]) * PIECE / seconds_since(start);
}

double product_rate(Team &team, const Kernels &kernels, Dtype type) {
    Multiplying work{kernels.multiply[static_cast<int>(type)], type, {}};
    for (int thread = 0; thread < team.threads(); ++thread) {
        work.operands.emplace_back(256 * 1024);
    }
    const int chunks[] = {16 * team.threads()};
    const auto start = Clock::now();
    team.run(chunks, &multiply_piece, &work);
    return 2.0 * ROWS * DEPTH * PANEL * REPEATS * chunks[0] / seconds_since(start);
}

}  // namespace tokenmill
