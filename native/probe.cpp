// Measures what the engine's threads can do at most; the profile tells nodes as a share of it.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <numeric>

#include "engine.h"

using namespace octavo;

namespace {

constexpr size_t kReadBytes = size_t{256} << 20;  // beyond any cache
constexpr size_t kPiece = size_t{1} << 20;
constexpr size_t kTurns = 400'000;
constexpr int kRepeats = 5;

}  // namespace

void OctavoEngine::probe(double* rates) {
    using Clock = std::chrono::steady_clock;
    const Mapping memory(kReadBytes, true);
    std::vector<float> sinks(pool_.num_threads() * 16);  // a cache line each
    pool_.run(kReadBytes / kPiece, [&](size_t piece, size_t) { std::memset(memory.as<char>() + piece * kPiece, 0, kPiece); });
    double (*const arithmetics[])(size_t, float*) = {kernels_.float_multiply_adds, kernels_.multiply_adds,
                                                     kernels_.int8->multiply_adds};
    std::fill_n(rates, 1 + std::size(arithmetics), 0.0);
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        auto start = Clock::now();
        pool_.run(kReadBytes / kPiece, [&](size_t piece, size_t thread) {
            kernels_.read_all(memory.as<float>() + piece * kPiece / sizeof(float), kPiece / sizeof(float), &sinks[thread * 16]);
        });
        std::chrono::duration<double> took = Clock::now() - start;
        rates[0] = std::max(rates[0], static_cast<double>(kReadBytes) / took.count());
        for (size_t i = 0; i < std::size(arithmetics); ++i) {
            std::vector<double> done(pool_.num_threads() * 4);
            start = Clock::now();
            pool_.run(done.size(), [&](size_t task, size_t thread) { done[task] = arithmetics[i](kTurns, &sinks[thread * 16]); });
            took = Clock::now() - start;
            rates[1 + i] = std::max(rates[1 + i], std::accumulate(done.begin(), done.end(), 0.0) / took.count());
        }
    }
}
