// A team of threads that works through the phases of a step, chunk by chunk.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <vector>

namespace tokenmill {

// Phases follow one another: none begins before the last chunk of the one before it has ended. Within a phase each
// thread takes the next chunk from a shared counter, so that a thread which lost its core is waited for only by the
// chunk in its hands. The caller is a member of the team.
//
// Each counter carries the number of the job it counts for. A thread that comes late, even one or several jobs late,
// finds another number, takes nothing, and goes to the newest job: nobody ever waits for it.
class Team {
  public:
    using Work = void (*)(void *context, int phase, int chunk, int thread);

    static constexpr int MOST_CHUNKS = 1 << 20;  // of a phase, exclusive

    // threads: members, the caller included. cpus: where each is pinned (the caller excepted), empty: nowhere.
    Team(int threads, std::vector<int> cpus);
    ~Team();
    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Run a job of chunks.size() phases, phase p in chunks[p] chunks. Not to be called by two threads at once.
    void run(std::span<const int> chunks, Work work, void *context);

  private:
    struct alignas(64) Phase {
        std::atomic<std::uint64_t> ticket{0};  // job (24 bits), chunks (20), next chunk (20)
        std::atomic<std::uint64_t> done{0};    // job (32 bits), chunks that have ended (32)
    };
    struct Phases {
        std::unique_ptr<Phase[]> list;
        int count;
    };
    struct Job {
        std::atomic<Phase *> phases{nullptr};
        std::atomic<int> count{0};
        std::atomic<Work> work{nullptr};
        std::atomic<void *> context{nullptr};
    };

    Phase *room_for(int phases);
    void serve(int thread, int cpu);
    void take_part(std::uint32_t job, int thread);

    std::vector<Phases> allocated_;  // a late thread may still look at an old list
    Job job_;
    std::atomic<std::uint32_t> number_{0};
    std::atomic<bool> ended_{false};
    std::vector<std::thread> workers_;
};

}  // namespace tokenmill
