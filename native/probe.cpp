// Measures what the engine's threads can do at most; the profile tells nodes as a share of it.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "engine.h"

using namespace octavo;

namespace {

constexpr size_t kReadBytes = size_t{256} << 20;  // beyond any cache
constexpr size_t kPiece = size_t{1} << 20;
constexpr size_t kTurns = 400'000;
constexpr int kRepeats = 5;

}  // namespace

void OctavoEngine::probe(double& bytes_per_second, double& operations_per_second) {
    using Clock = std::chrono::steady_clock;
    const Mapping memory(kReadBytes, true);
    std::vector<float> sinks(pool_.num_threads() * 16);  // a cache line each
    pool_.run(kReadBytes / kPiece, [&](size_t piece, size_t) { std::memset(memory.as<char>() + piece * kPiece, 0, kPiece); });
    bytes_per_second = operations_per_second = 0.0;
    const bool int8 = std::any_of(weights_.begin(), weights_.end(), [](const Weight& weight) { return weight.is_int8(); });
    const auto multiply_adds = int8 ? kernels_.int8->multiply_adds : kernels_.multiply_adds;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        auto start = Clock::now();
        pool_.run(kReadBytes / kPiece, [&](size_t piece, size_t thread) {
            kernels_.read_all(memory.as<float>() + piece * kPiece / sizeof(float), kPiece / sizeof(float), &sinks[thread * 16]);
        });
        std::chrono::duration<double> took = Clock::now() - start;
        bytes_per_second = std::max(bytes_per_second, static_cast<double>(kReadBytes) / took.count());

        std::vector<double> done(pool_.num_threads() * 4);
        start = Clock::now();
        pool_.run(done.size(), [&](size_t task, size_t thread) {
            done[task] = multiply_adds(kTurns, &sinks[thread * 16]);
        });
        took = Clock::now() - start;
        double operations = 0.0;
        for (const double part : done) operations += part;
        operations_per_second = std::max(operations_per_second, operations / took.count());
    }
}
