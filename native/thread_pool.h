// A persistent pool: the caller and num_threads - 1 workers share the tasks of one parallel loop at a time.
//
// Workers spin for a moment after each loop (the next node of the program follows within microseconds), then sleep.
// The caller waits for the tasks, not for the workers: one that the system does not schedule delays nobody.
// Which thread runs a task is free; what a task computes must not depend on it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace octavo {

class ThreadPool {
public:
    explicit ThreadPool(size_t num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    size_t num_threads() const { return workers_.size() + 1; }

    // Loops so far that woke or waited for another thread.
    uint64_t num_loops() const { return state_.load(std::memory_order_relaxed) >> 32; }

    // Calls body(task, thread) for every task in [0, num_tasks), thread in [0, num_threads()). Bodies must not throw.
    template <class Body>
    void run(size_t num_tasks, const Body& body) {
        if (num_tasks <= 1 || workers_.empty()) {
            for (size_t task = 0; task < num_tasks; ++task) body(task, size_t{0});
            return;
        }
        run_shared(
            num_tasks, [](const void* b, size_t task, size_t thread) { (*static_cast<const Body*>(b))(task, thread); },
            &body);
    }

private:
    using Call = void (*)(const void* body, size_t task, size_t thread);

    void run_shared(size_t num_tasks, Call call, const void* body);
    bool run_one(size_t thread);
    void work(size_t thread);
    void close();

    std::vector<std::thread> workers_;
    // (loop number << 32) | unclaimed tasks. One word, so a claim by compare-and-swap can only succeed within the
    // loop whose call_ and body_ were read just before: the caller replaces them only after the count reached zero.
    alignas(64) std::atomic<uint64_t> state_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> body_{nullptr};
    alignas(64) std::atomic<size_t> unfinished_{0};
    alignas(64) std::atomic<uint32_t> wake_{0};
    std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> closing_{false};
};

// The tasks of a loop in one run of neighbours for each thread, which takes them in order, so that what it asks for ahead
// is what it reads next. A thread that has none left takes the last of another's.
class Shares {
public:
    explicit Shares(size_t num_threads) : ranges_(num_threads) {}

    // The run of a thread, [first, end).
    static std::pair<size_t, size_t> of(size_t thread, size_t num_threads, size_t num_tasks) {
        return {num_tasks * thread / num_threads, num_tasks * (thread + 1) / num_threads};
    }

    void fill(size_t num_tasks) {
        for (size_t i = 0; i < ranges_.size(); ++i) {
            const auto [first, end] = of(i, ranges_.size(), num_tasks);
            ranges_[i].range.store(static_cast<uint64_t>(first) << 32 | end, std::memory_order_relaxed);
        }
    }

    // To be called once for each task.
    size_t take(size_t thread) {
        for (size_t i = 0;; ++i) {
            auto& range = ranges_[(thread + i) % ranges_.size()].range;
            uint64_t old = range.load(std::memory_order_relaxed);
            while (old >> 32 < (old & 0xffffffffu)) {
                const uint64_t rest = i == 0 ? old + (uint64_t{1} << 32) : old - 1;
                if (range.compare_exchange_weak(old, rest, std::memory_order_relaxed))
                    return i == 0 ? old >> 32 : rest & 0xffffffffu;
            }
        }
    }

private:
    struct alignas(64) Range {
        std::atomic<uint64_t> range{0};  // (first << 32) | end
    };
    std::vector<Range> ranges_;
};

}  // namespace octavo
