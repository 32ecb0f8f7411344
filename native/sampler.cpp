#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace octavo {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double uniform(uint64_t seed, int64_t position) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
    const uint64_t h = mix(mix(seed + golden) + (static_cast<uint64_t>(position) + 1) * golden);
    return static_cast<double>(h >> 40) * 0x1p-24;
}

bool adjusts(const OctavoStep& s, size_t row) {
    return s.bias_start[row] != s.bias_start[row + 1] || s.seen_start[row] != s.seen_start[row + 1] ||
           (s.mask_of && s.mask_of[row] >= 0);
}

// Most words of a grammar's mask are all zeros or all ones.
void apply_mask(const uint32_t* mask, float* logits, size_t vocab) {
    for (size_t first = 0; first < vocab; first += 32) {
        const uint32_t bits = mask[first / 32];
        const size_t end = std::min(vocab, first + 32);
        if (bits == 0)
            std::fill(logits + first, logits + end, kNever);
        else if (bits != 0xFFFFFFFFu)
            for (size_t id = first; id < end; ++id)
                if (!(bits >> (id - first) & 1)) logits[id] = kNever;
    }
}

void adjust(const OctavoStep& s, size_t row, float* logits, size_t vocab) {
    for (int32_t i = s.bias_start[row]; i < s.bias_start[row + 1]; ++i) logits[s.bias_ids[i]] += s.bias_values[i];
    if (s.mask_of && s.mask_of[row] >= 0)
        apply_mask(s.masks + static_cast<size_t>(s.mask_of[row]) * ((vocab + 31) / 32), logits, vocab);
    const float repetition = s.repetition_penalty[row];
    for (int32_t i = s.seen_start[row]; i < s.seen_start[row + 1]; ++i) {
        float& logit = logits[s.seen_ids[i]];
        if (repetition != 1.0f) logit = logit > 0.0f ? logit / repetition : logit * repetition;
        logit -= s.frequency_penalty[row] * static_cast<float>(s.seen_counts[i]);
        if (s.seen_counts[i] > 0) logit -= s.presence_penalty[row];
    }
}

// Logits with the largest of each kLogitsChunk of them: most chunks have nothing that a draw looks at.
struct Row {
    const float* logits;
    size_t vocab;
    const Kernels& kernels;
    const std::vector<float>& maxima;
    float top;

    Row(const float* values, size_t count, const Kernels& level, std::vector<float>& scratch)
        : logits(values), vocab(count), kernels(level), maxima(scratch) {
        scratch.resize((count + kLogitsChunk - 1) / kLogitsChunk);
        kernels.chunk_maxima(values, count, scratch.data());
        top = *std::max_element(scratch.begin(), scratch.end());
    }

    // Calls visit(id) for all logits of the chunks whose largest is at least `floor`; ends early when it says so.
    template <class Visit>
    void visit(float floor, const Visit& visit) const {
        for (size_t chunk = 0; chunk < maxima.size(); ++chunk) {
            if (maxima[chunk] < floor) continue;
            const size_t end = std::min(vocab, (chunk + 1) * kLogitsChunk);
            for (size_t id = chunk * kLogitsChunk; id < end; ++id)
                if (visit(id)) return;
        }
    }

    size_t largest() const {  // the lowest id among equals; 0 where there is nothing but NaN
        size_t found = 0;
        visit(top, [&](size_t id) { return logits[id] == top ? (found = id, true) : false; });
        return found;
    }

    double weight(size_t id, float temperature) const {
        return std::exp(static_cast<double>((logits[id] - top) / temperature));
    }

    // The sum of all weights; those of the chunks are left in `sums`.
    double sum_weights(float temperature, std::vector<double>& sums) const {
        sums.resize(maxima.size());
        kernels.sum_exp(logits, vocab, maxima.data(), top, temperature, sums.data());
        double total = 0.0;
        for (const double sum : sums) total += sum;
        return total;
    }
};

uint64_t rank_of(float logit, size_t id) {
    logit += 0.0f;  // -0 equals 0
    uint32_t bits;
    std::memcpy(&bits, &logit, sizeof bits);
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{~ascending} << 32 | id;
}

// The largest logits of a row, gathered only as far down as somebody asks, and never sorted: a rank is found by halving.
class Candidates {
public:
    Candidates(const Row& row, float temperature, SamplerScratch& scratch)
        : row_(row), temperature_(temperature), found_(scratch.candidates) {
        found_.clear();
    }

    size_t size() const { return found_.size(); }
    const Candidate& operator[](size_t place) const { return found_[place]; }

    // The `count` first in rank, or all there are, come to lie in front; returns how many. As many chunks hold one that
    // is not below the count-th largest maximum.
    size_t first(size_t count, std::vector<float>& scratch) {
        if (count <= row_.maxima.size()) {
            scratch = row_.maxima;
            const auto last = scratch.begin() + static_cast<ptrdiff_t>(count) - 1;
            std::nth_element(scratch.begin(), last, scratch.end(), std::greater<float>());
            gather(*last);
        }
        if (size() < count) gather(kNever);
        if (count < size()) std::nth_element(found_.begin(), at(count), found_.end());
        return std::min(count, size());
    }

    // Gathers until the weights of all reach `wanted`, or there are no more.
    void reach(double wanted) {
        double mass = sum(0, size());
        for (float below = 2.0f; mass < wanted && floor_ != kNever; below *= 1.5f) {
            const size_t before = size();
            const float floor = row_.top - below * temperature_;
            gather(below > -kNegligible ? kNever : floor);
            mass += sum(before, size());
        }
    }

    // The place, below `count`, of the first in rank at which the running sum of weights passes; the last in rank where
    // none does. Those before it come to lie in front of it.
    template <class Passes>
    size_t select(size_t count, const Passes& passes) {
        size_t first = 0, last = count;
        double running = 0.0;
        while (last - first > 1) {
            const size_t middle = first + (last - first) / 2;
            std::nth_element(at(first), at(middle), at(last));
            const double upper = running + sum(first, middle);
            if (passes(upper)) {
                last = middle;
            } else {
                running = upper;
                first = middle;
            }
        }
        return first;
    }

    double sum(size_t first, size_t last) const {
        double total = 0.0;
        for (size_t place = first; place < last; ++place) total += found_[place].weight;
        return total;
    }

    // Of the first `count`, those whose weight is at least so much come to lie in front; returns how many.
    size_t likely(size_t count, double least) {
        const auto end = std::partition(at(0), at(count), [&](const Candidate& c) { return c.weight >= least; });
        return static_cast<size_t>(end - at(0));
    }

    void sort(size_t count) { std::sort(at(0), at(count)); }

    // Adds what is not smaller than `floor`.
    void gather(float floor) {
        row_.visit(floor, [&](size_t id) {
            const float logit = row_.logits[id];
            if (logit >= floor && logit < floor_) found_.push_back({rank_of(logit, id), row_.weight(id, temperature_)});
            return false;
        });
        floor_ = floor;
    }

private:
    std::vector<Candidate>::iterator at(size_t place) { return found_.begin() + static_cast<ptrdiff_t>(place); }

    const Row& row_;
    float temperature_;
    float floor_ = std::numeric_limits<float>::infinity();  // of what has been gathered
    std::vector<Candidate>& found_;
};

// The first id whose running sum of weights exceeds u times their total.
size_t draw_from_all(const Row& row, float temperature, double u, std::vector<double>& sums) {
    const double target = u * row.sum_weights(temperature, sums);
    double running = 0.0;
    size_t chunk = 0;
    while (chunk < sums.size() && !(running + sums[chunk] > target)) running += sums[chunk++];
    if (chunk == sums.size()) return row.largest();  // there is a NaN
    const size_t end = std::min(row.vocab, (chunk + 1) * kLogitsChunk);
    size_t token = 0;
    for (size_t id = chunk * kLogitsChunk; id < end && !(running > target); ++id) {
        const double weight = row.weight(id, temperature);
        if (weight > 0.0) token = id;  // the last one, where a rounding leaves the sum behind that of the chunk
        running += weight;
    }
    return token;
}

size_t draw(const OctavoStep& s, size_t step_row, const Row& row, SamplerScratch& scratch) {
    const float temperature = s.temperature[step_row], top_p = s.top_p[step_row], min_p = s.min_p[step_row];
    if (!(temperature > 0.0f) || !std::isfinite(row.top)) return row.largest();
    const double u = uniform(s.seeds[step_row], s.sample_positions[step_row]);
    const bool ranked = s.top_k[step_row] > 0 && static_cast<size_t>(s.top_k[step_row]) < row.vocab;
    if (!ranked && !(top_p < 1.0f) && !(min_p > 0.0f)) return draw_from_all(row, temperature, u, scratch.sums);

    Candidates candidates(row, temperature, scratch);
    size_t count = 0;  // of those in front that are left
    if (ranked) count = candidates.first(static_cast<size_t>(s.top_k[step_row]), scratch.sorted);
    if (top_p < 1.0f) {
        const double wanted =
            top_p * (ranked ? candidates.sum(0, count) : row.sum_weights(temperature, scratch.sums));
        if (!ranked) {
            candidates.reach(wanted);
            count = candidates.size();
        }
        count = candidates.select(count, [&](double running) { return running >= wanted; }) + 1;
    } else if (!ranked) {
        candidates.gather(row.top + temperature * (std::log(min_p) - 1e-3f));  // lower by more than roundings
        count = candidates.size();
    }
    if (min_p > 0.0f) count = candidates.likely(count, min_p);
    const double target = u * candidates.sum(0, count);
    return candidates[candidates.select(count, [&](double running) { return running > target; })].id();
}

void write_logprobs(const OctavoStep& s, size_t row, const Row& raw, size_t token, SamplerScratch& scratch) {
    const size_t most = static_cast<size_t>(s.max_logprobs);
    int32_t* top_ids = s.out_top_ids + row * most;
    float* top_logprobs = s.out_top_logprobs + row * most;
    std::fill(top_ids, top_ids + most, -1);
    std::fill(top_logprobs, top_logprobs + most, std::numeric_limits<float>::quiet_NaN());
    s.out_logprobs[row] = std::numeric_limits<float>::quiet_NaN();
    s.out_ranks[row] = 0;
    if (s.num_logprobs[row] < 0) return;

    const double log_total = std::log(raw.sum_weights(1.0f, scratch.sums));
    const auto logprob = [&](size_t id) {
        return static_cast<float>(static_cast<double>(raw.logits[id] - raw.top) - log_total);
    };
    int32_t larger = 0;
    raw.visit(raw.logits[token], [&](size_t id) {
        larger += raw.logits[id] > raw.logits[token];
        return false;
    });
    s.out_logprobs[row] = logprob(token);
    s.out_ranks[row] = 1 + larger;

    const size_t wanted = static_cast<size_t>(s.num_logprobs[row]);
    if (wanted == 0) return;
    Candidates candidates(raw, 1.0f, scratch);
    const size_t found = candidates.first(wanted, scratch.sorted);
    candidates.sort(found);
    for (size_t rank = 0; rank < found; ++rank) {
        top_ids[rank] = static_cast<int32_t>(candidates[rank].id());
        top_logprobs[rank] = logprob(candidates[rank].id());
    }
}

}  // namespace

void reserve(SamplerScratch& scratch, size_t vocab) {
    scratch.adjusted.resize(vocab);
    scratch.candidates.reserve(vocab);
}

void sample_row(const OctavoStep& s, size_t row, const float* logits, size_t vocab, const Kernels& kernels,
                SamplerScratch& scratch) {
    const Row raw(logits, vocab, kernels, scratch.maxima);
    size_t token;
    if (adjusts(s, row)) {
        std::memcpy(scratch.adjusted.data(), logits, vocab * sizeof(float));
        adjust(s, row, scratch.adjusted.data(), vocab);
        token = draw(s, row, Row(scratch.adjusted.data(), vocab, kernels, scratch.adjusted_maxima), scratch);
    } else {
        token = draw(s, row, raw, scratch);
    }
    s.out_token_ids[row] = static_cast<int32_t>(token);
    write_logprobs(s, row, raw, token, scratch);
}

}  // namespace octavo
