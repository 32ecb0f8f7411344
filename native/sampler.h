// From raw logits to tokens; runtime/reference/sampler.py is the definition, stage by stage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "kernels.h"

namespace octavo {

// Memory that one thread reuses from row to row.
struct SamplerScratch {
    std::vector<float> adjusted, maxima, adjusted_maxima, sorted;
    std::vector<uint64_t> order;
    std::vector<double> running;
};

void reserve(SamplerScratch& scratch, size_t vocab);

// Chooses the token of one row and fills in its log probabilities. The step was checked before.
void sample_row(const OctavoStep& step, size_t row, const float* logits, size_t vocab, const Kernels& kernels,
                SamplerScratch& scratch);

}  // namespace octavo
