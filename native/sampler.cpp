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
};

size_t largest(const Row& row) {  // the lowest id among equals; 0 where there is nothing but NaN
    size_t found = 0;
    row.visit(row.top, [&](size_t id) { return row.logits[id] == row.top ? (found = id, true) : false; });
    return found;
}

// A number that sorts by descending logit, then by ascending id.
uint64_t rank_key(float logit, size_t id) {
    logit += 0.0f;  // -0 equals 0
    uint32_t bits;
    std::memcpy(&bits, &logit, sizeof bits);
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return uint64_t{~ascending} << 32 | id;
}

// Ids by descending logit, the lowest first among equals, ranked only as far as somebody asks: each pass takes what
// lies above a lower threshold, so that a draw from 50,000 tokens sorts some dozens.
class Ranking {
public:
    Ranking(const Row& row, float temperature, SamplerScratch& scratch)
        : row_(row), top_(row.top), temperature_(temperature), order_(scratch.order), running_(scratch.running) {
        order_.clear();
        running_.clear();
    }

    bool complete() const { return complete_; }
    size_t size() const { return order_.size(); }
    size_t id(size_t rank) const { return static_cast<size_t>(order_[rank] & 0xffffffffu); }
    double weight(size_t rank) const {
        return std::exp(static_cast<double>((row_.logits[id(rank)] - top_) / temperature_));
    }
    double running(size_t rank) const { return running_[rank]; }  // sum of weights up to and with this rank

    // Ranks at least `count` ids where there are so many. As many chunks hold one that is not below the count-th
    // largest maximum.
    void reach(size_t count, std::vector<float>& scratch) {
        if (count <= row_.maxima.size()) {
            scratch = row_.maxima;
            const auto last = scratch.begin() + static_cast<ptrdiff_t>(count) - 1;
            std::nth_element(scratch.begin(), last, scratch.end(), std::greater<float>());
            extend_to(*last);
        }
        while (size() < count && !complete()) extend();
    }

    void extend() {
        reach_ *= 1.5f;
        const float floor = top_ - reach_ * temperature_;
        extend_to(!(floor < above_) || reach_ > 256.0f ? kNever : floor);
    }

    void extend_to(float floor) {
        const size_t first = order_.size();
        row_.visit(floor, [&](size_t id) {
            const float logit = row_.logits[id];
            if (logit >= floor && logit < above_) order_.push_back(rank_key(logit, id));
            return false;
        });
        std::sort(order_.begin() + static_cast<ptrdiff_t>(first), order_.end());
        for (size_t rank = first; rank < order_.size(); ++rank)
            running_.push_back((rank == 0 ? 0.0 : running_[rank - 1]) + weight(rank));
        above_ = floor;
        complete_ = floor == kNever;
    }

private:
    const Row& row_;
    float top_, temperature_;
    float above_ = std::numeric_limits<float>::infinity();
    float reach_ = 2.0f;  // in temperatures below the top
    bool complete_ = false;
    std::vector<uint64_t>& order_;
    std::vector<double>& running_;
};

// The first rank in [0, count) whose running sum passes the target, or the last rank; count may be "all".
template <class Passes>
size_t first_rank(Ranking& ranking, size_t count, const Passes& passes) {
    for (size_t rank = 0;; ++rank) {
        while (rank >= ranking.size() && !ranking.complete()) ranking.extend();
        if (rank >= ranking.size() || rank >= count) return std::min(count, ranking.size()) - 1;
        if (passes(rank)) return rank;
    }
}

size_t draw(const OctavoStep& s, size_t row, const Row& logits, SamplerScratch& scratch) {
    const size_t best = largest(logits);
    const float temperature = s.temperature[row], top = logits.logits[best];
    if (!(temperature > 0.0f) || !std::isfinite(top)) return best;
    Ranking ranking(logits, temperature, scratch);
    const size_t all = std::numeric_limits<size_t>::max();

    size_t count = all;  // ranks that are left
    if (s.top_k[row] > 0 && static_cast<size_t>(s.top_k[row]) < logits.vocab) {
        count = static_cast<size_t>(s.top_k[row]);
        ranking.reach(count, scratch.sorted);
        count = std::min(count, ranking.size());
    }
    double total = 0.0;
    if (count != all) {
        total = ranking.running(count - 1);
    } else {
        total = logits.kernels.sum_exp(logits.logits, logits.vocab, top, temperature);
    }
    if (s.top_p[row] < 1.0f) {
        const double wanted = static_cast<double>(s.top_p[row]) * total;
        count = first_rank(ranking, count, [&](size_t rank) { return ranking.running(rank) >= wanted; }) + 1;
        total = ranking.running(count - 1);
    }
    if (s.min_p[row] > 0.0f) {
        const double least = static_cast<double>(s.min_p[row]);
        const size_t end = first_rank(ranking, count, [&](size_t rank) { return ranking.weight(rank) < least; });
        count = ranking.weight(end) < least ? end : end + 1;
        total = ranking.running(count - 1);
    }
    const double target = uniform(s.seeds[row], s.sample_positions[row]) * total;
    const size_t rank = first_rank(ranking, count, [&](size_t r) { return ranking.running(r) > target; });
    return ranking.id(rank);
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

    const float top = raw.top;
    const double log_total = std::log(raw.kernels.sum_exp(raw.logits, raw.vocab, top, 1.0f));
    const auto logprob = [&](size_t id) {
        return static_cast<float>(static_cast<double>(raw.logits[id] - top) - log_total);
    };
    int32_t larger = 0;
    for (size_t i = 0; i < raw.vocab; ++i) larger += raw.logits[i] > raw.logits[token];
    s.out_logprobs[row] = logprob(token);
    s.out_ranks[row] = 1 + larger;

    Ranking ranking(raw, 1.0f, scratch);
    const size_t wanted = std::min(static_cast<size_t>(s.num_logprobs[row]), raw.vocab);
    if (wanted > 0) ranking.reach(wanted, scratch.sorted);
    for (size_t rank = 0; rank < std::min(wanted, ranking.size()); ++rank) {
        top_ids[rank] = static_cast<int32_t>(ranking.id(rank));
        top_logprobs[rank] = logprob(ranking.id(rank));
    }
}

}  // namespace

void reserve(SamplerScratch& scratch, size_t vocab) {
    scratch.adjusted.resize(vocab);
    scratch.order.reserve(vocab);
    scratch.running.reserve(vocab);
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
