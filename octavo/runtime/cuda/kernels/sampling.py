"""The sampler on the device, without a wait for the host: the stages of runtime/reference/sampler.py, other noise.

Top-k and top-p need few of a row's logits. `survey` reads all of them once and keeps the largest of each piece;
`bound` finds, from those alone, a logit that every kept id reaches; `collect` gathers the ids that reach it (it reads
only their pieces), and `draw_few` does the rest in the registers of one program: exact thresholds, noise, the token. A
row whose bound lets too many ids through is *wide* (a flat distribution, or one without top-k and top-p): it takes the
passes over all logits, `search` to `draw_wide`, from which other rows' programs return at once.

Everything is exact. Logits, made monotone, compare as integers; equals are kept lowest id first; sums of a row have a
fixed order, or are of integers. A draw is the largest logit / temperature + Gumbel noise (Maddison et al. 2014), where
the noise of an id comes from (seed, position, id) by Philox (Salmon et al. 2011): it depends neither on the batch nor
on the other stages, nor on the way taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

WAYS = 16
_UNITS = tl.constexpr(float(1 << 40))  # weights as integers, whose sums have no order; 2^21 of them fit


@triton.jit
def _key(logits, BITS: tl.constexpr):
    """Logits as int32 that order as the logits do; 16 bits are all that a bfloat16 has."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)  # one zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def _lowest(BITS: tl.constexpr):
    """Below every key."""
    return tl.full([], -(1 << (BITS - 1)), tl.int32)


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
def _weights(x, largest, temperature):
    """exp((x - largest) / temperature); of a greedy row, whose temperature is 0, as if it were 1."""
    return tl.exp((x - largest) / tl.where(temperature > 0, temperature, 1.0))


@triton.jit
def _scores(x, ids, keep, largest, temperature, noise_key):
    """logit / temperature + Gumbel noise of the ids that are kept; -inf of the others."""
    random = tl.randint(noise_key, ids).to(tl.uint32, bitcast=True).to(tl.float32)
    v = tl.minimum((random + 0.5) * 2.3283064365386963e-10, 0.99999994)  # in (0, 1), fine near 0
    waiting = tl.where(v < 1e-3, v * (1.0 + v * (0.5 + v * 0.33333333)), -tl.log(1.0 - v))  # -log(1 - v)
    return tl.where(keep, (x - largest) / temperature - tl.log(waiting), float("-inf"))


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
def _best_id(best, best_ids, row, num_chunks, vocab, MAX_CHUNKS: tl.constexpr):
    """The row's token from the chunks' best."""
    c = tl.arange(0, MAX_CHUNKS)
    x = tl.load(best + row * num_chunks + c, mask=c < num_chunks, other=float("-inf"))
    ids = tl.load(best_ids + row * num_chunks + c, mask=c < num_chunks, other=2147483647)
    token = tl.min(tl.where(x == tl.max(x, 0), ids, 2147483647), 0)
    return tl.minimum(token, vocab - 1)  # a row of NaN has no largest: any id that exists


@triton.jit
def publish(best, best_ids, scores, score_ids, few_tokens, wide, temperature, rows, tokens, row_tokens, num_chunks,
            vocab, DRAWS: tl.constexpr, MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """The row's token, from where it was found, to the step's tokens and to the row it belongs to."""
    row = tl.program_id(0)
    token = _best_id(best, best_ids, row, num_chunks, vocab, MAX_CHUNKS)
    if DRAWS:
        draws = tl.load(temperature + row) > 0
        is_wide = tl.load(wide + row) > 0
        token = tl.where(draws & (not is_wide), tl.load(few_tokens + row), token)
        if draws & is_wide:
            token = _best_id(scores, score_ids, row, num_chunks, vocab, MAX_CHUNKS)
    tl.store(tokens + row, token)
    tl.store(row_tokens + tl.load(rows + row), token)


@triton.jit
def survey(logits, temperature, best, best_ids, mass, piece_best, vocab, num_chunks, CHUNK: tl.constexpr,
           PIECE: tl.constexpr):  # fmt: skip
    """Of each chunk its largest, that one's lowest id, and its weight, relative to that; of each piece its largest."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    PIECES: tl.constexpr = CHUNK // PIECE
    p = tl.arange(0, PIECES)
    ids = chunk * CHUNK + p[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    of_piece = tl.max(x, 1)
    largest = tl.max(of_piece, 0)
    lowest = tl.min(tl.min(tl.where((x == largest) & (ids < vocab), ids, 2147483647), 1), 0)
    weights = _weights(x, tl.where(largest == float("-inf"), 0.0, largest), tl.load(temperature + row))
    at = row * num_chunks + chunk
    tl.store(piece_best + at * PIECES + p, of_piece)
    tl.store(best + at, largest)
    tl.store(best_ids + at, lowest)
    tl.store(mass + at, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
def bound(best, mass, piece_best, temperature, top_k, top_p, min_p, bounds, masses, counts, num_chunks, num_pieces,
          vocab, BITS: tl.constexpr, MAX_CHUNKS: tl.constexpr, MAX_PIECES: tl.constexpr):  # fmt: skip
    """A key that every id kept by the row's first stage reaches; none (the top of all keys) where no such is known.

    As many pieces as top-k asks for reach the key, or pieces whose largest alone weigh what top-p asks for: so do at
    least as many ids. `masses` gets the weight of the whole row.
    """
    row = tl.program_id(0)
    t = tl.load(temperature + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    least = tl.load(min_p + row)
    c = tl.arange(0, MAX_CHUNKS)
    of_chunk = tl.load(best + row * num_chunks + c, mask=c < num_chunks, other=float("-inf"))
    largest = tl.max(of_chunk, 0)
    total = tl.load(mass + row * num_chunks + c, mask=c < num_chunks, other=0.0)
    total = tl.sum(tl.where(total > 0, total * _weights(of_chunk, largest, t), 0.0), 0)
    tl.store(masses + row, total)
    tl.store(counts + row, 0)

    at = tl.arange(0, MAX_PIECES)
    pieces = tl.load(piece_best + row * num_pieces + at, mask=at < num_pieces, other=float("-inf"))
    key = _key(pieces, BITS)
    by_count = (k > 0) & (k < vocab)
    by_mass = (p < 1) & (not by_count)
    what = tl.where(by_count, 1.0, _weights(pieces, largest, t))
    what = tl.where(at < num_pieces, what, 0.0)
    wanted = tl.where(by_count, k.to(tl.float32), p * total)
    low = _lowest(BITS)
    reached = tl.sum(what, 0) >= wanted
    for i in range(tl.where(by_count | by_mass, BITS, 0)):
        pivot = low + (tl.full([], 1, tl.int32) << (BITS - 1 - i))
        low = tl.where(tl.sum(tl.where(key >= pivot, what, 0.0), 0) >= wanted, pivot, low)
    if (not by_count) & (not by_mass):  # min-p alone: a little below its edge, which draw_few finds exactly
        edge = largest + t * tl.log(tl.maximum(least, 1e-37))
        low = _key(edge - 1e-4 * tl.abs(edge) - 1e-4 * t, BITS)
        reached = least > 0
    tl.store(bounds + row, tl.where((t > 0) & reached, low, 2147483647))


@triton.jit
def collect(logits, piece_best, bounds, counts, found_ids, found_logits, vocab, num_chunks, BITS: tl.constexpr,
            CHUNK: tl.constexpr, PIECE: tl.constexpr, ROOM: tl.constexpr):  # fmt: skip
    """The ids that reach the row's bound, in no certain order, as far as there is room; `counts` is how many."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    limit = tl.load(bounds + row)
    PIECES: tl.constexpr = CHUNK // PIECE
    at = tl.arange(0, PIECES)
    hit = _key(tl.load(piece_best + (row * num_chunks + chunk) * PIECES + at), BITS) >= limit
    if tl.sum(hit.to(tl.int32), 0) > 0:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        wanted = tl.reshape(tl.broadcast_to(hit[:, None], [PIECES, PIECE]), [CHUNK]) & (ids < vocab)
        x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=wanted, other=float("-inf")).to(tl.float32)
        keep = wanted & (_key(x, BITS) >= limit)
        order = tl.cumsum(keep.to(tl.int32), 0)
        first = tl.atomic_add(counts + row, tl.max(order, 0), sem="relaxed")
        place = first + order - 1
        inside = keep & (place < ROOM)
        tl.store(found_ids + row * ROOM + place, ids, mask=inside)
        tl.store(found_logits + row * ROOM + place, x, mask=inside)


@triton.jit
def draw_few(best, temperature, top_k, top_p, min_p, noise_keys, bounds, masses, counts, found_ids, found_logits,
             tokens, wide, num_chunks, vocab, BITS: tl.constexpr, ID_BITS: tl.constexpr, ROOM: tl.constexpr,
             MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """Top-k, top-p, min-p and the draw among the ids collected; rows without a bound, or with too many, are wide."""
    row = tl.program_id(0)
    num = tl.load(counts + row)
    t = tl.load(temperature + row)
    is_wide = (num > ROOM) | (tl.load(bounds + row) == 2147483647)
    tl.store(wide + row, ((t > 0) & is_wide).to(tl.int32))
    if (t > 0) & (not is_wide):
        at = tl.arange(0, ROOM)
        here = at < num
        ids = tl.load(found_ids + row * ROOM + at, mask=here, other=0)
        x = tl.load(found_logits + row * ROOM + at, mask=here, other=float("-inf"))
        largest = _largest(best, row, num_chunks, MAX_CHUNKS)
        lowest = _lowest(BITS).to(tl.int64) << ID_BITS
        # no two are equal: among equal logits the lower id is the larger
        order = (_key(x, BITS).to(tl.int64) << ID_BITS) + ((1 << ID_BITS) - 1 - ids)
        order = tl.where(here, order, lowest)
        weight = _weights(x, largest, t)
        units = tl.where(here, (weight * _UNITS).to(tl.int64), 0)

        k = tl.load(top_k + row)
        by_count = (k > 0) & (k < vocab)
        kept = lowest
        for i in range(tl.where(by_count & (k < num), BITS + ID_BITS, 0)):
            pivot = kept + (tl.full([], 1, tl.int64) << (BITS + ID_BITS - 1 - i))
            kept = tl.where(tl.sum((order >= pivot).to(tl.int32), 0) >= k, pivot, kept)
        units = tl.where(order >= kept, units, 0)
        p = tl.load(top_p + row)
        total = tl.sum(units, 0)
        total = tl.where(by_count, total, (tl.load(masses + row).to(tl.float64) * _UNITS).to(tl.int64))
        wanted = (p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        head = lowest
        for i in range(tl.where(p < 1, BITS + ID_BITS, 0)):
            pivot = head + (tl.full([], 1, tl.int64) << (BITS + ID_BITS - 1 - i))
            mass = tl.sum(tl.where(order >= pivot, units, 0), 0)
            head = tl.where((mass >= wanted) & (mass > 0), pivot, head)
        kept = tl.where(p < 1, tl.maximum(kept, head), kept)
        keep = here & (order >= kept) & (weight >= tl.load(min_p + row))
        score = _scores(x, ids, keep, largest, t, tl.load(noise_keys + row))
        top = tl.max(score, 0)
        tl.store(tokens + row, tl.minimum(tl.min(tl.where((score == top) & keep, ids, 2147483647), 0), vocab - 1))


@triton.jit
def _found(lows, counts, wanted, row, num_chunks, number, shift, BITS: tl.constexpr, WAYS: tl.constexpr,
           MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """The lower end of the interval before pass `number`: the highest pivot of the last one with enough above it."""
    low = tl.load(lows + row * WAYS + number - 1, mask=number > 0, other=0)
    low = tl.where(number > 0, low, _lowest(BITS))
    c = tl.arange(0, MAX_CHUNKS)[:, None]
    d = tl.arange(0, WAYS)
    parts = tl.load(counts + (row * num_chunks + c) * WAYS + d[None, :], mask=c < num_chunks, other=0.0)
    above = tl.sum(parts, 0)  # [WAYS], above pivot d; pivot 0 is `low` itself
    digit = tl.max(tl.where((above >= wanted) & (d > 0), d, 0), 0)
    return low + tl.where(number > 0, digit << shift, 0)


@triton.jit(do_not_specialize=["number", "shift", "per_program"])
def search(wide, logits, best, temperature, wanted, lows, counts_in, counts_out, vocab, num_chunks, per_program, number,
           shift, BITS: tl.constexpr, MASS: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr,
           WAYS: tl.constexpr):  # fmt: skip
    """Pass `number` of the search for the highest key with at least `wanted` ids (or, MASS, weight) at or above it.

    Four bits a pass, from the top: `shift` is the place of this pass's. Rows with `wanted` <= 0 ask for nothing.
    """
    row = tl.program_id(0)
    goal = tl.load(wanted + row)
    if (tl.load(wide + row) > 0) & (goal > 0):
        first = tl.program_id(1) * per_program
        low = _found(lows, counts_in, goal, row, num_chunks, number, shift + 4, BITS, WAYS, MAX_CHUNKS)
        if first == 0:
            tl.store(lows + row * WAYS + number, low)
        largest = _largest(best, row, num_chunks, MAX_CHUNKS)
        t = tl.load(temperature + row)
        for chunk in range(first, tl.minimum(first + per_program, num_chunks)):
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            key = tl.where(ids < vocab, _key(x, BITS), _lowest(BITS))
            what = tl.where(ids < vocab, 1.0, 0.0)
            if MASS:
                what = _weights(x, largest, t)
            at = counts_out + (row * num_chunks + chunk) * WAYS
            tl.store(at, 0.0)
            for digit in range(1, WAYS):
                pivot = low + (tl.full([], 1, tl.int32) * digit << shift)
                tl.store(at + digit, tl.sum(tl.where(key >= pivot, what, 0.0), 0))


@triton.jit(do_not_specialize=["number", "per_program"])
def tally(wide, logits, best, temperature, wanted, lows, counts, thresholds, floors, above, equal, mass, vocab,
          num_chunks, per_program, number, BITS: tl.constexpr, HAS_FLOOR: tl.constexpr, CHUNK: tl.constexpr,
          MAX_CHUNKS: tl.constexpr, WAYS: tl.constexpr):  # fmt: skip
    """The key that `number` passes found (at least the row's floor), and per chunk: ids above it, at it, weight above.

    Rows that ask for nothing keep the counts that there are; they get the floor, or what lies below all keys.
    """
    row = tl.program_id(0)
    if tl.load(wide + row) > 0:
        first = tl.program_id(1) * per_program
        goal = tl.load(wanted + row)
        threshold = _lowest(BITS)
        if HAS_FLOOR:
            threshold = tl.load(floors + row)
        if goal > 0:
            found = _found(lows, counts, goal, row, num_chunks, number, 0, BITS, WAYS, MAX_CHUNKS)
            threshold = tl.maximum(found, threshold)
            largest = _largest(best, row, num_chunks, MAX_CHUNKS)
            t = tl.load(temperature + row)
            for chunk in range(first, tl.minimum(first + per_program, num_chunks)):
                ids = chunk * CHUNK + tl.arange(0, CHUNK)
                inside = ids < vocab
                x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=inside, other=float("-inf")).to(tl.float32)
                key = _key(x, BITS)
                at = row * num_chunks + chunk
                tl.store(above + at, tl.sum((inside & (key > threshold)).to(tl.int32), 0))
                tl.store(equal + at, tl.sum((inside & (key == threshold)).to(tl.int32), 0))
                tl.store(mass + at, tl.sum(tl.where(inside & (key > threshold), _weights(x, largest, t), 0.0), 0))
        if first == 0:
            tl.store(thresholds + row, threshold)


@triton.jit
def wish(wide, top_k, wanted, vocab):
    """How many ids a wide row's top-k asks for; 0 where it is off."""
    row = tl.program_id(0)
    if tl.load(wide + row) > 0:
        k = tl.load(top_k + row)
        tl.store(wanted + row, tl.where(k < vocab, k, 0).to(tl.float32))


@triton.jit
def _weight_of_key(key, largest, temperature, BITS: tl.constexpr):
    """The weight of the logits with this key."""
    ordered = key << (32 - BITS)
    if BITS == 16:
        ordered = tl.where(ordered < 0, ordered | 0xFFFF, ordered)
    ordered = tl.maximum(ordered, -2139095041)  # of -inf: what lies below all keys weighs nothing
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return _weights(bits.to(tl.float32, bitcast=True), largest, temperature)


@triton.jit
def settle_top_k(wide, best, temperature, top_k, top_p, thresholds, above, equal, mass, masses, keep_equal,
                 wanted_mass, num_chunks, BITS: tl.constexpr, MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """How many of the ids at the threshold belong to the top k, and the weight that top-p asks for of what is left."""
    row = tl.program_id(0)
    if tl.load(wide + row) > 0:
        threshold = tl.load(thresholds + row)
        t = tl.load(temperature + row)
        kept = tl.load(top_k + row) - _total(above, row, num_chunks, MAX_CHUNKS)
        kept = tl.minimum(kept, _total(equal, row, num_chunks, MAX_CHUNKS))
        has_k = threshold > _lowest(BITS)
        kept = tl.where(has_k, kept, 0)
        tl.store(keep_equal + row, kept)
        at_threshold = _weight_of_key(threshold, _largest(best, row, num_chunks, MAX_CHUNKS), t, BITS)
        total = _total(mass, row, num_chunks, MAX_CHUNKS)
        total += tl.where(kept > 0, kept.to(tl.float32) * at_threshold, 0.0)
        total = tl.where(has_k, total, tl.load(masses + row))
        p = tl.load(top_p + row)
        tl.store(wanted_mass + row, tl.where((p < 1) & (t > 0), p * total, 0.0))


@triton.jit
def settle_top_p(wide, best, temperature, wanted_mass, floors, thresholds, mass, equal, keep_equal, num_chunks,
                 BITS: tl.constexpr, MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """How many of the ids at the top-p threshold are kept: the fewest whose weight is enough, at least one."""
    row = tl.program_id(0)
    if tl.load(wide + row) > 0:
        threshold = tl.load(thresholds + row)
        goal = tl.load(wanted_mass + row)
        largest = _largest(best, row, num_chunks, MAX_CHUNKS)
        weight = _weight_of_key(threshold, largest, tl.load(temperature + row), BITS)
        missing = goal - _total(mass, row, num_chunks, MAX_CHUNKS)
        num_equal = _total(equal, row, num_chunks, MAX_CHUNKS)
        limit = tl.where(threshold == tl.load(floors + row), tl.load(keep_equal + row), num_equal)
        needed = tl.minimum(tl.ceil(missing / tl.maximum(weight, 1e-38)), limit.to(tl.float32))
        needed = tl.maximum(needed, 1.0).to(tl.int32)
        tl.store(keep_equal + row, tl.where(goal > 0, needed, tl.load(keep_equal + row)))


@triton.jit(do_not_specialize=["per_program"])
def draw_wide(wide, logits, best, temperature, min_p, noise_keys, thresholds, keep_equal, equal, scores, score_ids,
              vocab, num_chunks, per_program, BITS: tl.constexpr, CHUNK: tl.constexpr,
              MAX_CHUNKS: tl.constexpr):  # fmt: skip
    """The best of each chunk among the ids that are left: logit / temperature + noise."""
    row = tl.program_id(0)
    if tl.load(wide + row) > 0:
        first = tl.program_id(1) * per_program
        t = tl.load(temperature + row)
        largest = _largest(best, row, num_chunks, MAX_CHUNKS)
        threshold = tl.load(thresholds + row)
        noise_key = tl.load(noise_keys + row)
        for chunk in range(first, tl.minimum(first + per_program, num_chunks)):
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = ids < vocab
            x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=inside, other=float("-inf")).to(tl.float32)
            key = _key(x, BITS)
            c = tl.arange(0, MAX_CHUNKS)
            before = tl.sum(tl.load(equal + row * num_chunks + c, mask=c < chunk, other=0), 0)
            same = inside & (key == threshold)
            rank = before + tl.cumsum(same.to(tl.int32), 0)  # from 1
            keep = inside & ((key > threshold) | (same & (rank <= tl.load(keep_equal + row))))
            keep = keep & (_weights(x, largest, t) >= tl.load(min_p + row))
            score = tl.full([CHUNK], float("-inf"), tl.float32)
            if tl.sum(keep.to(tl.int32), 0) > 0:
                score = _scores(x, ids, keep, largest, t, noise_key)
            top = tl.max(score, 0)
            lowest = tl.min(tl.where((score == top) & keep, ids, 2147483647), 0)
            tl.store(scores + row * num_chunks + chunk, top)
            tl.store(score_ids + row * num_chunks + chunk, lowest)
