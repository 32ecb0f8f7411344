// From raw logits to tokens; runtime/reference/sampler.py is the definition, stage by stage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "kernels.h"

namespace octavo {

// A token that a draw may choose.
struct Candidate {
    uint64_t rank;  // sorts by descending logit, then by ascending id, which is its lower half
    double weight;

    size_t id() const { return static_cast<size_t>(rank & 0xffffffffu); }
    bool operator<(const Candidate& other) const { return rank < other.rank; }
};

// Memory that one thread reuses from row to row.
struct SamplerScratch {
    std::vector<float> adjusted, maxima, adjusted_maxima, sorted;
    std::vector<double> sums;
    std::vector<Candidate> candidates;
};

void reserve(SamplerScratch& scratch, size_t vocab);

// Chooses the token of one row and fills in its log probabilities. The step was checked before.
void sample_row(const OctavoStep& step, size_t row, const float* logits, size_t vocab, const Kernels& kernels,
                SamplerScratch& scratch);

}  // namespace octavo
