#include "pool.h"

#include <chrono>

#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
static inline void pause_briefly() { _mm_pause(); }
#else
static inline void pause_briefly() { asm volatile("yield"); }
#endif

// A step of decoding is hundreds of short loops: waking a sleeper for each would cost more than the loops.
static constexpr auto AWAKE = std::chrono::microseconds(300);
static constexpr int PATIENCE = 4096;  // pauses, until a processor is given to whoever holds the last task

// A forked child has none of its parent's threads, and would wait for them for ever.
static std::atomic<int> forks{0};
static const int watching = pthread_atfork(nullptr, nullptr, [] { forks++; });

Pool::Pool(int threads) : born_(forks) {
    (void)watching;
    for (int thread = 1; thread < threads; thread++) workers_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
    if (born_ != forks) {
        for (auto& worker : workers_) worker.detach();
        return;
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        over_ = true;
        ticket_ += uint64_t(1) << (2 * BITS);
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::run(int first, int tasks, Call call, void* context) {
    if (tasks <= 1 || workers_.empty() || born_ != forks) {
        for (int task = 0; task < tasks; task++) call(context, first + task, 0);
        return;
    }
    call_ = call, context_ = context, first_ = first, left_ = tasks;
    ticket_ = ((ticket_ >> (2 * BITS)) + 1) << (2 * BITS) | uint64_t(tasks) << BITS;
    if (asleep_) {
        { std::lock_guard<std::mutex> lock(mutex_); }
        changed_.notify_all();
    }
    share(0);
    for (int spins = 0; left_.load(std::memory_order_acquire); spins++) {
        pause_briefly();
        if (spins > PATIENCE) std::this_thread::yield();
    }
}

void Pool::share(int thread) {
    for (;;) {
        uint64_t ticket = ticket_;
        if ((ticket & MOST) >= (ticket >> BITS & MOST)) return;
        const Call call = call_;
        void* const context = context_;
        const int first = first_;
        // That the ticket is still the same says that these are of its loop: a loop ends only after its last task.
        if (!ticket_.compare_exchange_strong(ticket, ticket + 1)) continue;
        call(context, first + int(ticket & MOST), thread);
        left_.fetch_sub(1, std::memory_order_release);
    }
}

void Pool::serve(int thread) {
    uint64_t seen = 0;
    for (;;) {
        const auto since = std::chrono::steady_clock::now();
        for (int spins = 0; ticket_ >> (2 * BITS) == seen; spins++) {
            pause_briefly();
            if (spins % 64 == 63 && std::chrono::steady_clock::now() - since > AWAKE) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_++;
                changed_.wait(lock, [&] { return ticket_ >> (2 * BITS) != seen; });
                asleep_--;
            }
        }
        seen = ticket_ >> (2 * BITS);
        if (over_) return;
        share(thread);
    }
}
