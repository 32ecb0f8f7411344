"""The definition of the sampler: from raw logits [R, vocab] to one token a row, and its log probabilities.

The stages, in this order, each skipped where it is off:

1. bias           logits[id] += value; -inf bans; then -inf where the row's mask has no bit
2. penalties      repetition on every id seen (prompt and output): l / r where l > 0, else l * r (Keskar et al. 2019);
                  then l -= frequency * count and l -= presence where count > 0, count over generated tokens only
3. temperature 0  the largest logit wins, the lowest id among equals; nothing below applies
4. order          ids by descending logit, the lowest id first among equals; where none of the next three is on, by
                  id, so that nothing is ever sorted; weight w = exp((l - l_max) / temperature)
5. top-k          the first k
6. top-p          the shortest head whose weights reach top_p of what is left, at least one (Holtzman et al. 2020)
7. min-p          w >= min_p * w_max
8. draw           the first id in this order whose running sum of weights exceeds u * total

u is one uniform number in [0, 1) of (seed, position): results do not depend on batch mates. Weights and sums are
float64, so that another implementation can only differ where u * total lies within its own rounding of a boundary.
"""

import numpy as np
import numpy.typing as npt

from octavo.runtime.base import Float32, SamplerOutput, SamplingInputs

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014, constants of Stafford's mix 13); wraps modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def noise_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """One number for each (seed, position), mixed so that neighbours share nothing: h of uniform()."""
    counter = positions.astype(np.uint64) + np.uint64(1)
    return mix(mix(seeds + _GOLDEN) + counter * _GOLDEN)


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position): the upper 24 bits of

    h = mix(mix(seed + golden) + (position + 1) * golden)   (all modulo 2^64), times 2^-24.
    """
    return (noise_keys(seeds, positions) >> np.uint64(40)).astype(np.float64) * 2.0**-24


def sample(logits: Float32, sampling: SamplingInputs) -> SamplerOutput:
    """Chooses a token for each row of raw logits [R, vocab]; `logits` is not changed.

    Rows that asked for fewer than K alternatives are filled up with id -1 and NaN.
    """
    num_rows = len(logits)
    noise = uniform(sampling.seeds, sampling.positions)
    token_ids = np.empty(num_rows, dtype=np.int32)
    for row in range(num_rows):
        token_ids[row] = _choose(_adjusted(logits[row], sampling, row), sampling, row, float(noise[row]))
    return _with_logprobs(logits, token_ids, sampling)


def _adjusted(raw: Float32, sampling: SamplingInputs, row: int) -> Float32:
    """Stages 1 and 2 on a copy of one row."""
    logits = raw.copy()
    biased = slice(sampling.bias_start[row], sampling.bias_start[row + 1])
    np.add.at(logits, sampling.bias_ids[biased], sampling.bias_values[biased])

    if sampling.masks is not None and sampling.mask_of is not None and sampling.mask_of[row] >= 0:
        bits = np.unpackbits(sampling.masks[sampling.mask_of[row]].view(np.uint8), bitorder="little")
        logits[bits[: len(logits)] == 0] = -np.inf

    seen = slice(sampling.seen_start[row], sampling.seen_start[row + 1])
    ids, counts = sampling.seen_ids[seen], sampling.seen_counts[seen]
    repetition = sampling.repetition_penalty[row]
    values = logits[ids]
    if repetition != 1.0:
        values = np.where(values > 0, values / repetition, values * repetition)
    values = values - sampling.frequency_penalty[row] * counts.astype(np.float32)
    logits[ids] = values - sampling.presence_penalty[row] * (counts > 0)
    return logits


def _choose(logits: Float32, sampling: SamplingInputs, row: int, noise: float) -> int:
    """Stages 3 to 8 on one row."""
    temperature = sampling.temperature[row]
    if temperature == 0:
        return int(np.argmax(logits))
    top_k, top_p, min_p = int(sampling.top_k[row]), float(sampling.top_p[row]), float(sampling.min_p[row])
    order = np.arange(len(logits))
    if 0 < top_k < len(logits) or top_p < 1 or min_p > 0:
        order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp(((logits[order] - logits.max()) / temperature).astype(np.float64))
    running = np.cumsum(weights)
    if top_p < 1:
        running = running[: np.searchsorted(running, top_p * running[-1]) + 1]
    if min_p > 0:
        likely = int(np.count_nonzero(weights[: len(running)] >= min_p))
        running = running[:likely]
    return int(order[np.searchsorted(running, noise * running[-1], side="right")])


def _with_logprobs(logits: Float32, token_ids: npt.NDArray[np.int32], sampling: SamplingInputs) -> SamplerOutput:
    """Log probabilities of the raw distribution, rank and alternatives, for the rows that asked for them."""
    wanted = sampling.num_logprobs
    output = SamplerOutput.without_logprobs(token_ids, wanted)
    for row in np.flatnonzero(wanted >= 0):
        raw, token = logits[row], token_ids[row]
        shifted = (raw - raw.max()).astype(np.float64)
        logprobs = shifted - np.log(np.exp(shifted).sum())
        output.logprobs[row] = logprobs[token]
        output.ranks[row] = 1 + np.count_nonzero(raw > raw[token])
        best = np.argsort(-raw, kind="stable")[: wanted[row]]
        output.top_ids[row, : len(best)] = best
        output.top_logprobs[row, : len(best)] = logprobs[best]
    return output
