// Threads that compute one thing together: a team.
//
// All of them run the same function. Each takes its part of the work by its rank alone (`part`, `each`), so no result
// depends on who is faster; where the next part of the work needs all of the last one, they wait for each other. A
// meeting of two cores takes some tenths of a microsecond, starting and joining threads by OpenMP microseconds: what
// consists of short pieces, one after the other, as a decoding step does, is done by one team from beginning to end.
//
// Nothing may throw inside a team: memory is taken before.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "common.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace reqat {

struct Part {
    int64_t begin, end;
};

// Where the threads of a team meet.
class Meeting {
  public:
    void wait(int threads) {
        const uint32_t turn = turns.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            turns.store(turn + 1, std::memory_order_release);
            return;
        }
        int spins = 0;
        while (turns.load(std::memory_order_acquire) == turn) {
            if (spins < MOST_SPINS) {
                spins++;
                pause();
            } else {  // a thread that was taken off its core may need this one
                std::this_thread::yield();
            }
        }
    }

    std::atomic<int32_t> largest{INT32_MIN};

  private:
    static constexpr int MOST_SPINS = 1 << 12;

    static void pause() {
#if REQAT_X86
        _mm_pause();
#endif
    }

    // On lines of their own: who waits reads one of them again and again.
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> turns{0};
};

class Team {
  public:
    // A thread by itself.
    Team() : rank(0), threads(1), meeting(nullptr) {}
    Team(int rank, int threads, Meeting& meeting) : rank(rank), threads(threads), meeting(&meeting) {}

    // This thread's part of n, the parts as even as can be and in the order of ranks.
    Part part(int64_t n) const { return {n * rank / threads, n * (rank + 1) / threads}; }

    // function(i) for each i of its part.
    template <class Function>
    void each(int64_t n, const Function& function) const {
        const Part mine = part(n);
        for (int64_t i = mine.begin; i < mine.end; i++) function(i);
    }

    // Until all are here; what they have written is then seen by all.
    void wait() const {
        if (threads > 1) meeting->wait(threads);
    }

    // The largest of what they bring.
    int32_t largest(int32_t mine) const {
        if (threads == 1) return mine;
        int32_t before = meeting->largest.load(std::memory_order_relaxed);
        while (before < mine && !meeting->largest.compare_exchange_weak(before, mine, std::memory_order_relaxed)) {
        }
        wait();
        const int32_t found = meeting->largest.load(std::memory_order_relaxed);
        wait();  // all have read it
        if (rank == 0) meeting->largest.store(INT32_MIN, std::memory_order_relaxed);
        wait();
        return found;
    }

    const int rank, threads;

  private:
    Meeting* meeting;
};

// function(team) on so many threads, the caller one of them, each in the ordinary FloatMode.
template <class Function>
void together(int threads, const Function& function) {
    const auto as = [&](const Team& team) {
        in_float_mode([&] {
            function(team);
            return OK;
        });
    };
#if defined(_OPENMP)
    if (threads > 1) {
        Meeting meeting;
#pragma omp parallel num_threads(threads)
        as(Team(omp_get_thread_num(), omp_get_num_threads(), meeting));
        return;
    }
#endif
    as(Team());
}

}  // namespace reqat
