// Threads that share a loop. One loop at a time; the caller works too.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    int threads() const { return (int)workers_.size() + 1; }

    // work(task, thread) for each task of 0..tasks-1, in any order; back when all are done.
    template <class Work>
    void each(int tasks, const Work& work) {
        for (int first = 0; first < tasks; first += MOST)
            run(first, tasks - first < MOST ? tasks - first : MOST,
                [](void* context, int task, int thread) { (*(const Work*)context)(task, thread); }, (void*)&work);
    }

  private:
    using Call = void (*)(void*, int, int);
    static constexpr int BITS = 20, MOST = (1 << BITS) - 1;
    void run(int first, int tasks, Call call, void* context);
    void share(int thread);
    void serve(int thread);

    const int born_;  // after how many forks
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable changed_;
    // The loop's number, how many tasks it has, and the next one. All in one word, so that a worker that comes late, since
    // its processor was busy elsewhere, takes nothing: nobody waits for a worker that has no task.
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int> left_{0}, asleep_{0}, first_{0};
    std::atomic<bool> over_{false};
    std::atomic<Call> call_{nullptr};
    std::atomic<void*> context_{nullptr};
};
