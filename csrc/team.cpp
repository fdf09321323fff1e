#include "team.h"

#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#endif

namespace tokenmill {

namespace {

constexpr int JOB_BITS = 24;
constexpr int CHUNK_BITS = 20;
constexpr std::uint64_t CHUNK_MASK = (1U << CHUNK_BITS) - 1;
constexpr std::uint32_t JOB_MASK = (1U << JOB_BITS) - 1;

// How often a thread looks again before it gives its core away: some microseconds between steps, in which other
// processes want the core, and some tens within one.
constexpr int SPINS_FOR_A_JOB = 400;
constexpr int SPINS_IN_A_JOB = 2000;

void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

std::uint64_t first_ticket(std::uint32_t job, int chunks) {
    return (std::uint64_t{job & JOB_MASK} << (2 * CHUNK_BITS)) | (static_cast<std::uint64_t>(chunks) << CHUNK_BITS);
}

}  // namespace

Team::Team(int threads, std::vector<int> cpus) {
    for (int thread = 1; thread < threads; ++thread) {
        const auto index = static_cast<std::size_t>(thread);
        workers_.emplace_back(&Team::serve, this, thread, index < cpus.size() ? cpus[index] : -1);
    }
}

Team::~Team() {
    ended_.store(true);
    number_.fetch_add(1);
    number_.notify_all();
    for (std::thread &worker : workers_) {
        worker.join();
    }
}

Team::Phase *Team::room_for(int phases) {
    if (allocated_.empty() || allocated_.back().count < phases) {
        // The last phase belongs to no job: it ends a late thread that has an old list and a newer, larger count.
        allocated_.push_back({std::make_unique<Phase[]>(static_cast<std::size_t>(phases) + 1), phases});
    }
    return allocated_.back().list.get();
}

void Team::run(std::span<const int> chunks, Work work, void *context) {
    const auto count = static_cast<int>(chunks.size());
    if (count == 0) {
        return;
    }
    Phase *phases = room_for(count);
    const std::uint32_t job = number_.load(std::memory_order_relaxed) + 1;
    for (int phase = 0; phase < count; ++phase) {
        phases[phase].done.store(std::uint64_t{job} << 32, std::memory_order_relaxed);
        phases[phase].ticket.store(first_ticket(job, chunks[static_cast<std::size_t>(phase)]),
                                   std::memory_order_release);
    }
    job_.phases.store(phases, std::memory_order_relaxed);
    job_.count.store(count, std::memory_order_relaxed);
    job_.work.store(work, std::memory_order_relaxed);
    job_.context.store(context, std::memory_order_relaxed);
    number_.store(job, std::memory_order_release);
    number_.notify_all();
    take_part(job, 0);
}

void Team::serve(int thread, int cpu) {
#if defined(__linux__)
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(static_cast<unsigned>(cpu), &set);
        pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // a wish: elsewhere works as well
    }
#endif
    std::uint32_t last = 0;
    for (;;) {
        std::uint32_t job = number_.load(std::memory_order_acquire);
        for (int spin = 0; job == last && spin < SPINS_FOR_A_JOB; ++spin) {
            pause_briefly();
            job = number_.load(std::memory_order_acquire);
        }
        if (job == last) {
            number_.wait(last, std::memory_order_acquire);
            continue;
        }
        if (ended_.load()) {
            return;
        }
        last = job;
        take_part(job, thread);
    }
}

void Team::take_part(std::uint32_t job, int thread) {
    Phase *phases = job_.phases.load(std::memory_order_relaxed);
    const int count = job_.count.load(std::memory_order_relaxed);
    const Work work = job_.work.load(std::memory_order_relaxed);
    void *context = job_.context.load(std::memory_order_relaxed);
    for (int phase = 0; phase < count; ++phase) {
        Phase &mine = phases[phase];
        std::uint64_t ticket = mine.ticket.load(std::memory_order_acquire);
        const std::uint64_t chunks = (ticket >> CHUNK_BITS) & CHUNK_MASK;
        for (;;) {
            if ((ticket >> (2 * CHUNK_BITS)) != (job & JOB_MASK)) {
                return;  // another job has begun
            }
            if ((ticket & CHUNK_MASK) >= chunks) {
                break;
            }
            if (mine.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
                work(context, phase, static_cast<int>(ticket & CHUNK_MASK), thread);
                mine.done.fetch_add(1, std::memory_order_acq_rel);
                ticket = mine.ticket.load(std::memory_order_acquire);
            }
        }
        const std::uint64_t complete = (std::uint64_t{job} << 32) | chunks;
        for (int spin = 0;; ++spin) {
            const std::uint64_t done = mine.done.load(std::memory_order_acquire);
            if (done == complete) {
                break;
            }
            if ((done >> 32) != job) {
                return;
            }
            if (spin < SPINS_IN_A_JOB) {
                pause_briefly();
            } else {
                sched_yield();  // a member has lost its core, perhaps to a process that wants this one
            }
        }
    }
}

}  // namespace tokenmill
