// What the ranks of a divided model show one another: each writes its part, all meet, and each reads everyone's.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "ops.h"

namespace tokenmill {

// Each rank has two parts, in slots 0 and 1, which are used in turn: when a rank writes one anew, all have met over the
// other since, and so nobody reads the first any more. All ranks make the same calls in the same order.
//
// A rank that does not come within `patience` seconds, or a transport that breaks, makes the exchange `failed` for
// good: nobody waits any more, and what is read is worthless.
class ExchangeError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class Exchange {
  public:
    Exchange(int rank, int ranks, std::size_t part_bytes, double patience);
    virtual ~Exchange() = default;
    Exchange(const Exchange &) = delete;
    Exchange &operator=(const Exchange &) = delete;

    int rank() const { return rank_; }
    int ranks() const { return ranks_; }
    std::size_t part_bytes() const { return part_bytes_; }
    bool failed() const { return failed_.load(std::memory_order_relaxed); }
    const std::string &failure() const { return failure_; }

    virtual char *part(int rank, int slot) const = 0;

    // Wait until everyone's first `bytes` bytes are in the slot whose turn it is, which must be `slot`.
    void meet(int slot, std::size_t bytes);
    int slot() const { return static_cast<int>(meetings_ & 1); }
    // Make it the turn of slot 0.
    void even();

    // values[i] = the sum of all ranks' values[i], added in the order of the ranks.
    void all_reduce(float *values, std::size_t count);
    // Everyone's bytes, of any number, on rank 0; elsewhere nothing.
    std::vector<std::string> gather(const char *data, std::size_t bytes);

  protected:
    virtual void wait_for_all(std::uint64_t meeting, int slot, std::size_t bytes) = 0;
    void fail(const std::string &why);
    double patience() const { return patience_; }

  private:
    int rank_;
    int ranks_;
    std::size_t part_bytes_;
    double patience_;
    std::uint64_t meetings_ = 0;
    std::atomic<bool> failed_{false};
    std::string failure_;
};

// Among processes of one host: a file that all of them map.
class SharedExchange : public Exchange {
  public:
    // create: make the file, which must not be there, and fill it (so that a full file system is noticed now); else it
    // must be there. Throws std::system_error.
    SharedExchange(const std::string &path, int rank, int ranks, std::size_t part_bytes, double patience, bool create);
    ~SharedExchange() override;

    char *part(int rank, int slot) const override;

  protected:
    void wait_for_all(std::uint64_t meeting, int slot, std::size_t bytes) override;

  private:
    struct alignas(128) Arrival {
        std::atomic<std::uint64_t> meetings;
    };

    Arrival &arrival(int rank) const { return reinterpret_cast<Arrival *>(data_)[rank]; }
    std::size_t head_bytes() const { return round_up(static_cast<std::ptrdiff_t>(ranks() * sizeof(Arrival)), 4096); }

    char *data_ = nullptr;
    std::size_t size_ = 0;
};

// Among hosts: memory of one's own for everyone's parts, which `carry` (slot, bytes) fills; it throws where it cannot.
class CarriedExchange : public Exchange {
  public:
    using Carry = std::function<void(int slot, std::size_t bytes)>;

    CarriedExchange(int rank, int ranks, std::size_t part_bytes, Carry carry);

    char *part(int rank, int slot) const override;

  protected:
    void wait_for_all(std::uint64_t meeting, int slot, std::size_t bytes) override;

  private:
    Memory parts_;
    Carry carry_;
};

// Wait for everyone's rows of `part`, which is this rank's.
struct Meet {
    Exchange *exchange;
    const Buffer *part;
    int slot;
};

// out = the sum of everyone's rows, or what is added to it.
struct Sum {
    Exchange *exchange;
    const Buffer *part;
    int slot;
    Buffer *out;
    bool add;
};

// Throw std::invalid_argument for an op whose parts do not fit each other.
void check(const Meet &op, bool in_head);
void check(const Sum &op, bool in_head);

int chunks_of(const Meet &op, const Inputs &inputs, int threads);
int chunks_of(const Sum &op, const Inputs &inputs, int threads);

void execute(const Meet &op, const Bench &bench, int chunk, Scratch &scratch);
void execute(const Sum &op, const Bench &bench, int chunk, Scratch &scratch);

}  // namespace tokenmill
