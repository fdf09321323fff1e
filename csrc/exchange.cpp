#include "exchange.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "chunks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenmill {

namespace {

// Looks at the others before the core is given away, and at the clock after each so many of those.
constexpr int SPINS = 2000;
constexpr int YIELDS_PER_LOOK = 512;

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

[[noreturn]] void fail_system(const std::string &what) { throw std::system_error(errno, std::generic_category(), what); }

}  // namespace

Exchange::Exchange(int rank, int ranks, std::size_t part_bytes, double patience)
    : rank_(rank), ranks_(ranks), part_bytes_(static_cast<std::size_t>(round_up(static_cast<std::ptrdiff_t>(part_bytes), 4096))),
      patience_(patience) {
    if (ranks < 1 || rank < 0 || rank >= ranks) {
        throw std::invalid_argument("rank is " + std::to_string(rank) + " of " + std::to_string(ranks));
    }
    if (part_bytes == 0) {
        throw std::invalid_argument("part_bytes is 0; it must be at least 1");
    }
}

void Exchange::fail(const std::string &why) {
    if (!failed()) {
        failure_ = why;
        failed_.store(true);
    }
}

void Exchange::meet(int slot, std::size_t bytes) {
    if (slot != this->slot() || bytes > part_bytes_) {
        fail("the ranks' slots or parts have gone out of step");
    }
    ++meetings_;
    if (!failed()) {
        wait_for_all(meetings_, slot, bytes);
    }
}

void Exchange::even() {
    if (slot() != 0) {
        meet(1, 0);
    }
}

void Exchange::all_reduce(float *values, std::size_t count) {
    const std::size_t most = part_bytes_ / sizeof(float);
    for (std::size_t start = 0; start < count; start += most) {
        const std::size_t here = std::min(most, count - start);
        const int turn = slot();
        std::memcpy(part(rank_, turn), values + start, here * sizeof(float));
        meet(turn, here * sizeof(float));
        std::memcpy(values + start, part(0, turn), here * sizeof(float));
        for (int rank = 1; rank < ranks_; ++rank) {
            const auto *from = reinterpret_cast<const float *>(part(rank, turn));
            for (std::size_t i = 0; i < here; ++i) {
                values[start + i] += from[i];
            }
        }
    }
}

std::vector<std::string> Exchange::gather(const char *data, std::size_t bytes) {
    const std::uint64_t own = bytes;
    int turn = slot();
    std::memcpy(part(rank_, turn), &own, sizeof(own));
    meet(turn, sizeof(own));
    std::vector<std::uint64_t> sizes(static_cast<std::size_t>(ranks_));
    std::vector<std::string> found(rank_ == 0 ? sizes.size() : 0);
    for (int rank = 0; rank < ranks_; ++rank) {
        std::memcpy(&sizes[static_cast<std::size_t>(rank)], part(rank, turn), sizeof(own));
    }
    if (failed()) {
        return found;
    }
    const std::uint64_t most = *std::max_element(sizes.begin(), sizes.end());
    for (std::uint64_t start = 0; start < most && !failed(); start += part_bytes_) {
        const auto piece = [&](std::uint64_t size) {
            return size <= start ? 0 : static_cast<std::size_t>(std::min<std::uint64_t>(size - start, part_bytes_));
        };
        turn = slot();
        std::memcpy(part(rank_, turn), data + start, piece(own));
        meet(turn, piece(most));
        for (std::size_t rank = 0; rank < found.size(); ++rank) {
            found[rank].append(part(static_cast<int>(rank), turn), piece(sizes[rank]));
        }
    }
    return found;
}

SharedExchange::SharedExchange(const std::string &path, int rank, int ranks, std::size_t part_bytes, double patience,
                               bool create)
    : Exchange(rank, ranks, part_bytes, patience) {
    size_ = head_bytes() + 2 * static_cast<std::size_t>(ranks) * this->part_bytes();
    const int file = open(path.c_str(), create ? O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC : O_RDWR | O_CLOEXEC, 0600);
    if (file < 0) {
        fail_system(path);
    }
    // A part that the file system has no room for must not be found out by writing to it: that would be a SIGBUS.
    const int error = create ? posix_fallocate(file, 0, static_cast<off_t>(size_)) : 0;
    struct stat found {};
    if (error != 0 || fstat(file, &found) != 0 || found.st_size != static_cast<off_t>(size_)) {
        close(file);
        if (create) {
            unlink(path.c_str());
        }
        errno = error != 0 ? error : EINVAL;
        fail_system(path + ", " + std::to_string(size_) + " bytes");
    }
    void *address = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (address == MAP_FAILED) {
        fail_system(path);
    }
    data_ = static_cast<char *>(address);
}

SharedExchange::~SharedExchange() {
    if (data_ != nullptr) {
        munmap(data_, size_);
    }
}

char *SharedExchange::part(int rank, int slot) const {
    return data_ + head_bytes() + static_cast<std::size_t>(2 * rank + slot) * part_bytes();
}

void SharedExchange::wait_for_all(std::uint64_t meeting, int, std::size_t) {
    arrival(rank()).meetings.store(meeting, std::memory_order_release);
    const auto began = std::chrono::steady_clock::now();
    for (int other = 0; other < ranks(); ++other) {
        const std::atomic<std::uint64_t> &theirs = arrival(other).meetings;
        for (int spin = 0; theirs.load(std::memory_order_acquire) < meeting; ++spin) {
            if (spin < SPINS) {
                pause_briefly();
                continue;
            }
            sched_yield();  // it has lost its core, perhaps to a process that wants this one
            const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - began;
            if (spin % YIELDS_PER_LOOK == 0 && spent.count() > patience()) {
                fail("rank " + std::to_string(other) + " has not come for " + std::to_string(spent.count()) + " s");
                return;
            }
        }
    }
}

CarriedExchange::CarriedExchange(int rank, int ranks, std::size_t part_bytes, Carry carry)
    : Exchange(rank, ranks, part_bytes, 0.0), parts_(2 * static_cast<std::size_t>(ranks) * this->part_bytes()),
      carry_(std::move(carry)) {}

char *CarriedExchange::part(int rank, int slot) const {
    return parts_.as<char>() + static_cast<std::size_t>(slot * ranks() + rank) * part_bytes();
}

void CarriedExchange::wait_for_all(std::uint64_t, int slot, std::size_t bytes) {
    if (bytes == 0) {
        return;  // parts are one's own: there is nobody to wait for
    }
    try {
        carry_(slot, bytes);
    } catch (const std::exception &error) {
        fail(error.what());
    }
}

namespace {

constexpr const char *UNFIT = "a sum of parts takes float32 buffers of one width, before begin_head";

}  // namespace

void check(const Meet &op, bool in_head) {
    if (in_head || op.part->type() != Dtype::f32) {
        throw std::invalid_argument(UNFIT);
    }
}

void check(const Sum &op, bool in_head) {
    if (in_head || op.part->type() != Dtype::f32 || op.out->type() != Dtype::f32 ||
        op.part->width() != op.out->width() || op.out == op.part) {
        throw std::invalid_argument(UNFIT);
    }
}

int chunks_of(const Meet &, const Inputs &inputs, int) { return inputs.tokens == 0 ? 0 : 1; }

void execute(const Meet &op, const Bench &bench, int, Scratch &) {
    op.exchange->meet(op.slot, static_cast<std::size_t>(bench.inputs.tokens * op.part->stride()) * sizeof(float));
}

int chunks_of(const Sum &, const Inputs &inputs, int threads) { return row_chunks(inputs.tokens, threads); }

void execute(const Sum &op, const Bench &bench, int chunk, Scratch &scratch) {
    const auto [first, last] = rows_of(chunk, bench.inputs.tokens, bench.threads);
    const int padded = op.out->padded();
    const auto part_of = [&](int rank, int row) {
        return reinterpret_cast<const float *>(op.exchange->part(rank, op.slot)) + row * op.part->stride();
    };
    for (int row = first; row < last; ++row) {
        auto *out = op.out->row<float>(row);
        float *total = op.add ? scratch.tile.as<float>() : out;
        std::copy_n(part_of(0, row), padded, total);
        for (int rank = 1; rank < op.exchange->ranks(); ++rank) {
            bench.kernels.add_to(part_of(rank, row), nullptr, total, padded);
        }
        if (op.add) {
            bench.kernels.add_to(total, nullptr, out, padded);
        }
    }
}

}  // namespace tokenmill
