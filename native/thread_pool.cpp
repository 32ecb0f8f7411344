#include "thread_pool.h"

#include <chrono>

namespace octavo {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until done() or the time is up; tells which.
template <class Done>
bool spin_until(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return done();
}

}  // namespace

ThreadPool::ThreadPool(size_t num_threads) {
    try {
        for (size_t thread = 1; thread < num_threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
    } catch (...) {  // the system has no more threads: end those that run before the vector is destroyed
        close();
        throw;
    }
}

ThreadPool::~ThreadPool() { close(); }

void ThreadPool::close() {
    closing_.store(true);
    wake_.fetch_add(1);
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_shared(size_t num_tasks, Call call, const void* body) {
    call_.store(call, std::memory_order_relaxed);
    body_.store(body, std::memory_order_relaxed);
    unfinished_.store(num_tasks, std::memory_order_relaxed);
    const uint64_t loop = (state_.load(std::memory_order_relaxed) >> 32) + 1;
    state_.store((loop << 32) | num_tasks);
    if (sleepers_.load() != 0) {
        wake_.fetch_add(1);
        wake_.notify_all();
    }
    while (run_one(0)) {
    }
    const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
    while (!spin_until(finished)) std::this_thread::yield();
}

bool ThreadPool::run_one(size_t thread) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while ((state & 0xffffffffu) != 0) {
        const Call call = call_.load(std::memory_order_relaxed);
        const void* body = body_.load(std::memory_order_relaxed);
        if (state_.compare_exchange_weak(state, state - 1, std::memory_order_acq_rel)) {
            call(body, static_cast<size_t>((state & 0xffffffffu) - 1), thread);
            unfinished_.fetch_sub(1, std::memory_order_release);
            return true;
        }
    }
    return false;
}

void ThreadPool::work(size_t thread) {
    const auto wanted = [this] { return (state_.load() & 0xffffffffu) != 0 || closing_.load(); };
    while (true) {
        while (run_one(thread)) {
        }
        if (closing_.load()) return;
        if (spin_until(wanted)) continue;
        const uint32_t ticket = wake_.load();
        sleepers_.fetch_add(1);
        if (!wanted()) wake_.wait(ticket);  // a loop published after this check sees the sleeper and moves the ticket
        sleepers_.fetch_sub(1);
    }
}

}  // namespace octavo
