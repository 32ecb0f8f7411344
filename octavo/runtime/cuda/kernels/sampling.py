"""The sampler on the device, without a wait for the host: the stages of runtime/reference/sampler.py, other noise.

Rows are cut into chunks, one program each; a launch leaves partial results per chunk that the next launch reduces, so
every sum has a fixed order. Top-k and top-p are exact: the threshold is found by a sixteen-way search over the bits of
the logits (which, made monotone, compare as integers), counting above each pivot, and equals are kept lowest id first.
A draw is the largest logit / temperature + Gumbel noise (Maddison et al. 2014), where the noise of an id comes from
(seed, position, id) by Philox (Salmon et al. 2011): it depends neither on the batch nor on the other stages.
"""

from __future__ import annotations

import triton
import triton.language as tl

WAYS = 16


@triton.jit
def _key(logits, BITS: tl.constexpr):
    """Logits as integers of BITS bits that order as the logits do; 16 bits are all that a bfloat16 has."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) + 2147483648) >> (32 - BITS)


@triton.jit
def _total(partial, row, num_chunks, MAX_CHUNKS: tl.constexpr):
    """Sum of a row's partial results."""
    c = tl.arange(0, MAX_CHUNKS)
    return tl.sum(tl.load(partial + row * num_chunks + c, mask=c < num_chunks, other=0), 0)


@triton.jit
def _largest(partial, row, num_chunks, MAX_CHUNKS: tl.constexpr):
    c = tl.arange(0, MAX_CHUNKS)
    return tl.max(tl.load(partial + row * num_chunks + c, mask=c < num_chunks, other=float("-inf")), 0)


@triton.jit
def adjust(logits, out, vocab, CHUNK: tl.constexpr):
    """A float32 copy of the logits, to be biased and penalised."""
    row = tl.program_id(0).to(tl.int64) * vocab
    ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row + ids, mask=ids < vocab)
    tl.store(out + row + ids, values.to(tl.float32), mask=ids < vocab)


@triton.jit
def bias(logits, starts, ids, values, vocab, BLOCK: tl.constexpr):
    """logits[id] += value; the ids of a row are distinct."""
    row = tl.program_id(0)
    end = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = logits + row.to(tl.int64) * vocab + tl.load(ids + at, mask=at < end, other=0)
        old = tl.load(place, mask=at < end)
        tl.store(place, old + tl.load(values + at, mask=at < end), mask=at < end)


@triton.jit
def penalties(logits, starts, ids, counts, repetition, presence, frequency, vocab, BLOCK: tl.constexpr):
    """Repetition on every id seen, then frequency and presence on those that were generated."""
    row = tl.program_id(0)
    end = tl.load(starts + row + 1)
    r = tl.load(repetition + row)
    for start in range(tl.load(starts + row), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < end
        place = logits + row.to(tl.int64) * vocab + tl.load(ids + at, mask=mask, other=0)
        value = tl.load(place, mask=mask, other=0.0)
        count = tl.load(counts + at, mask=mask, other=0).to(tl.float32)
        value = tl.where(value > 0, value / r, value * r) - tl.load(frequency + row) * count
        value -= tl.where(count > 0, tl.load(presence + row), 0.0)
        tl.store(place, value, mask=mask)


@triton.jit
def chunk_argmax(logits, best, best_ids, vocab, num_chunks, CHUNK: tl.constexpr):
    """The largest of each chunk and its lowest id."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, 0)
    lowest = tl.min(tl.where((x == largest) & (ids < vocab), ids, 2147483647), 0)
    tl.store(best + row * num_chunks + chunk, largest)
    tl.store(best_ids + row * num_chunks + chunk, lowest)


@triton.jit
def argmax(best, best_ids, tokens, num_chunks, vocab, MAX_CHUNKS: tl.constexpr):
    """The row's token from the chunks' best."""
    row = tl.program_id(0)
    c = tl.arange(0, MAX_CHUNKS)
    x = tl.load(best + row * num_chunks + c, mask=c < num_chunks, other=float("-inf"))
    ids = tl.load(best_ids + row * num_chunks + c, mask=c < num_chunks, other=2147483647)
    token = tl.min(tl.where(x == tl.max(x, 0), ids, 2147483647), 0)
    tl.store(tokens + row, tl.minimum(token, vocab - 1))  # a row of NaN has no largest: any id that exists


@triton.jit
def _weights(x, largest, temperature):
    """exp((x - largest) / temperature); of a greedy row, whose temperature is 0, as if it were 1."""
    return tl.exp((x - largest) / tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _found(lows, counts, wanted, row, num_chunks, number, shift, WAYS: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """The lower end of the interval before pass `number`: the highest pivot of the last one with enough above it."""
    low = tl.load(lows + row * WAYS + number - 1, mask=number > 0, other=0)
    c = tl.arange(0, MAX_CHUNKS)[:, None]
    d = tl.arange(0, WAYS)
    parts = tl.load(counts + (row * num_chunks + c) * WAYS + d[None, :], mask=c < num_chunks, other=0.0)
    above = tl.sum(parts, 0)  # [WAYS], above pivot d; pivot 0 is `low` itself
    digit = tl.max(tl.where((above >= wanted) & (d > 0), d, 0), 0)
    return low + tl.where(number > 0, digit.to(tl.int64) << shift, 0)


@triton.jit(do_not_specialize=["number", "shift"])
def search(logits, best, temperature, wanted, lows, counts_in, counts_out, vocab, num_chunks, number, shift,
           BITS: tl.constexpr, MASS: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr,
           WAYS: tl.constexpr):  # fmt: skip
    """Pass `number` of the search for the highest key with at least `wanted` ids (or, MASS, weight) at or above it.

    Four bits a pass, from the top: `shift` is the place of this pass's. `wanted` <= 0 finds the top of all keys: the
    caller ignores such rows.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    low = _found(lows, counts_in, tl.load(wanted + row), row, num_chunks, number, shift + 4, WAYS, MAX_CHUNKS)
    if chunk == 0:
        tl.store(lows + row * WAYS + number, low)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    key = tl.where(ids < vocab, _key(x, BITS), -1)
    what = tl.full([CHUNK], 1.0, tl.float32)
    if MASS:
        what = _weights(x, _largest(best, row, num_chunks, MAX_CHUNKS), tl.load(temperature + row))
    at = counts_out + (row * num_chunks + chunk) * WAYS
    tl.store(at, 0.0)
    for digit in range(1, WAYS):
        pivot = low + (tl.full([], 1, tl.int64) * digit << shift)
        tl.store(at + digit, tl.sum(tl.where(key >= pivot, what, 0.0), 0))


@triton.jit(do_not_specialize=["number"])
def tally(logits, best, temperature, wanted, lows, counts, thresholds, floors, above, equal, mass, vocab, num_chunks,
          number, BITS: tl.constexpr, HAS_FLOOR: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr,
          WAYS: tl.constexpr):  # fmt: skip
    """The key that `number` passes found (at least the row's floor), and per chunk: ids above it, at it, weight above.

    Rows that ask for nothing (wanted <= 0) get the floor, or -1, which all keys exceed.
    """
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    goal = tl.load(wanted + row)
    key_found = _found(lows, counts, goal, row, num_chunks, number, 0, WAYS, MAX_CHUNKS)
    floor = tl.full([], -1, tl.int64)
    if HAS_FLOOR:
        floor = tl.load(floors + row)
    threshold = tl.where(goal > 0, tl.maximum(key_found, floor), floor)
    if chunk == 0:
        tl.store(thresholds + row, threshold)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    key = tl.where(ids < vocab, _key(x, BITS), -2)
    weight = _weights(x, _largest(best, row, num_chunks, MAX_CHUNKS), tl.load(temperature + row))
    at = row * num_chunks + chunk
    tl.store(above + at, tl.sum((key > threshold).to(tl.int32), 0))
    tl.store(equal + at, tl.sum((key == threshold).to(tl.int32), 0))
    tl.store(mass + at, tl.sum(tl.where(key > threshold, weight, 0.0), 0))


@triton.jit
def _weight_of_key(key, largest, temperature, BITS: tl.constexpr):
    """The weight of the logits with this key."""
    ordered = ((key << (32 - BITS)) - 2147483648).to(tl.int32)
    if BITS == 16:
        ordered = tl.where(ordered < 0, ordered | 0xFFFF, ordered)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return _weights(bits.to(tl.float32, bitcast=True), largest, temperature)


@triton.jit
def settle_top_k(best, temperature, top_k, top_p, thresholds, above, equal, mass, keep_equal, wanted_mass, num_chunks,
                 BITS: tl.constexpr, MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """How many of the ids at the threshold belong to the top k, and the weight that top-p asks for of what is left."""
    row = tl.program_id(0)
    threshold = tl.load(thresholds + row)
    t = tl.load(temperature + row)
    kept = tl.load(top_k + row) - _total(above, row, num_chunks, MAX_CHUNKS)
    kept = tl.minimum(kept, _total(equal, row, num_chunks, MAX_CHUNKS))
    kept = tl.where(threshold >= 0, kept, 0)
    tl.store(keep_equal + row, kept)
    at_threshold = _weight_of_key(tl.maximum(threshold, 0), _largest(best, row, num_chunks, MAX_CHUNKS), t, BITS)
    total = _total(mass, row, num_chunks, MAX_CHUNKS)
    total += tl.where(kept > 0, kept.to(tl.float32) * at_threshold, 0.0)
    p = tl.load(top_p + row)
    tl.store(wanted_mass + row, tl.where((p < 1) & (t > 0), p * total, 0.0))


@triton.jit
def settle_top_p(best, temperature, wanted_mass, floors, thresholds, mass, equal, keep_equal, num_chunks,
                 BITS: tl.constexpr, MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """How many of the ids at the top-p threshold are kept: the fewest whose weight is enough, at least one."""
    row = tl.program_id(0)
    threshold = tl.load(thresholds + row)
    goal = tl.load(wanted_mass + row)
    weight = _weight_of_key(tl.maximum(threshold, 0), _largest(best, row, num_chunks, MAX_CHUNKS),
                            tl.load(temperature + row), BITS)  # fmt: skip
    missing = goal - _total(mass, row, num_chunks, MAX_CHUNKS)
    num_equal = _total(equal, row, num_chunks, MAX_CHUNKS)
    limit = tl.where(threshold == tl.load(floors + row), tl.load(keep_equal + row), num_equal)
    needed = tl.minimum(tl.ceil(missing / tl.maximum(weight, 1e-38)), limit.to(tl.float32)).to(tl.int32)
    tl.store(keep_equal + row, tl.where(goal > 0, tl.maximum(needed, 1), tl.load(keep_equal + row)))


@triton.jit
def chunk_draw(logits, best, temperature, min_p, keys, thresholds, keep_equal, equal, scores, score_ids, vocab,
               num_chunks, BITS: tl.constexpr, HAS_THRESHOLD: tl.constexpr, CHUNK: tl.constexpr,
               MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """The best of each chunk among the ids that are left: logit / temperature + noise; greedy rows have no noise."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    t = tl.load(temperature + row)
    largest = _largest(best, row, num_chunks, MAX_CHUNKS)
    keep = ids < vocab
    if t > 0:
        keep = keep & (_weights(x, largest, t) >= tl.load(min_p + row))
        if HAS_THRESHOLD:
            threshold = tl.load(thresholds + row)
            key = _key(x, BITS)
            c = tl.arange(0, MAX_CHUNKS)
            before = tl.sum(tl.load(equal + row * num_chunks + c, mask=c < chunk, other=0), 0)
            same = (key == threshold) & (ids < vocab)
            rank = before + tl.cumsum(same.to(tl.int32), 0)  # from 1
            keep = keep & ((key > threshold) | (same & (rank <= tl.load(keep_equal + row))))
    score = tl.where(keep, x, float("-inf"))
    if (t > 0) & (tl.sum(keep.to(tl.int32), 0) > 0):
        random = tl.randint(tl.load(keys + row), ids).to(tl.uint32, bitcast=True).to(tl.float32)
        v = tl.minimum((random + 0.5) * 2.3283064365386963e-10, 0.99999994)  # in (0, 1), fine near 0
        waiting = tl.where(v < 1e-3, v * (1.0 + v * (0.5 + v * 0.33333333)), -tl.log(1.0 - v))  # -log(1 - v)
        score = tl.where(keep, (x - largest) / t - tl.log(waiting), float("-inf"))
    top = tl.max(score, 0)
    lowest = tl.min(tl.where((score == top) & keep, ids, 2147483647), 0)
    tl.store(scores + row * num_chunks + chunk, top)
    tl.store(score_ids + row * num_chunks + chunk, lowest)
