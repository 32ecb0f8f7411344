"""The C++ sampler chooses what the reference sampler chooses, stage by stage and all together."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import LEVELS, MAX_TOKENS, Piece, RandomWeights, Steps, load, matrix, row_program, sampling

from octavo.program.ops import Embedding, GatherRows, Linear
from octavo.program.program import Program, ProgramBuilder
from octavo.runtime.base import SamplerOutput, SamplingInputs, StepInputs
from octavo.runtime.native import NativeRuntime
from octavo.runtime.reference.sampler import sample

VOCAB = 3001
ROWS = 24


def head_program() -> Program:
    build = ProgramBuilder()
    x, rows, logits = build.tokens("x", 32), build.logit_rows("rows", 32), build.logit_rows("logits", VOCAB)
    build.add(Embedding("embed", weight=matrix("embed", 61, 32, "embedding"), out=x))
    build.add(GatherRows("gather", x=x, out=rows))
    build.add(Linear("head", x=rows, weight=matrix("head", VOCAB, 32), out=logits))
    return build.finish(hidden=rows, logits=logits, vocab_size=VOCAB, max_len=400)


@pytest.fixture(scope="module")
def runtime() -> NativeRuntime:
    program = head_program()
    weights = RandomWeights(program, scale=2.0)
    head = weights.tensors["head"].data
    head[100:140] = head[100]  # equal logits
    return load(NativeRuntime(2), program, weights)  # type: ignore[return-value]


def inputs(num_rows: int) -> StepInputs:
    indices = np.arange(num_rows, dtype=np.int32)
    return StepInputs(
        token_ids=(indices * 5 % 61).astype(np.int32),
        positions=indices,
        slots=np.arange(num_rows, dtype=np.int64)[None],
        query_start_loc=np.array([0, num_rows], np.int32),
        seq_lens=np.array([num_rows], np.int32),
        block_tables=np.arange(8, dtype=np.int32)[None, None],
        logits_indices=indices,
    )


def both(runtime: NativeRuntime, chosen: SamplingInputs) -> tuple[SamplerOutput, SamplerOutput]:
    runtime.execute(inputs(len(chosen.temperature)))
    found = runtime.sample(chosen)
    return found, sample(runtime.logits(), chosen)


def assert_same_tokens(runtime: NativeRuntime, **changes: object) -> np.ndarray:
    """Draws from many (seed, position) pairs; returns the tokens."""
    tokens = []
    for seed in range(8):
        seeds = np.random.default_rng(seed).integers(0, 1 << 63, ROWS, dtype=np.uint64) * np.uint64(2)
        positions = np.arange(ROWS, dtype=np.int64) * (seed + 1)
        found, expected = both(runtime, sampling(ROWS, **{"seeds": seeds, "positions": positions} | changes))
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        tokens.append(found.token_ids)
    return np.concatenate(tokens)


def full(value: float, dtype: type = np.float32) -> np.ndarray:
    return np.full(ROWS, value, dtype)


def test_greedy_takes_the_lowest_of_equals(runtime: NativeRuntime) -> None:
    bias = {
        "bias_start": np.arange(0, 41 * ROWS, 40, dtype=np.int32)[: ROWS + 1],
        "bias_ids": np.tile(np.arange(139, 99, -1, dtype=np.int32), ROWS),
        "bias_values": np.full(40 * ROWS, 90, np.float32),
    }
    assert set(assert_same_tokens(runtime, **bias).tolist()) == {100}


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": full(1.0)},
        {"temperature": full(0.05)},
        {"temperature": full(50.0)},
        {"temperature": full(1.0), "top_k": full(1, np.int32)},
        {"temperature": full(2.0), "top_k": full(40, np.int32)},
        {"temperature": full(2.0), "top_k": full(1 << 30, np.int32)},
        {"temperature": full(2.0), "top_k": full(3, np.int32)},  # fewer than there are chunks of logits
        {"temperature": full(1.0), "top_p": full(0.9)},
        {"temperature": full(3.0), "top_p": full(0.999)},
        {"temperature": full(1.0), "top_p": full(1e-6)},
        {"temperature": full(1.5), "min_p": full(0.05)},
        {"temperature": full(1.5), "min_p": full(1.0)},
        {"temperature": full(2.0), "top_k": full(50, np.int32), "top_p": full(0.8), "min_p": full(0.01)},
    ],
)
def test_random_draws(runtime: NativeRuntime, changes: dict[str, np.ndarray]) -> None:
    tokens = assert_same_tokens(runtime, **changes)
    if changes.get("top_k", full(0))[0] != 1 and changes.get("min_p", full(0))[0] != 1.0:
        assert len(set(tokens.tolist())) > 5 or changes.get("top_p", full(1))[0] < 0.5


def draws_of_one_row(level: str, num_seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of MAX_TOKENS positions for each of the seeds 0, 1, ..., and the row: several chunks, the last in part.
    Those of the first seeds are what the reference draws."""
    runtime = load(NativeRuntime(1, level), row_program(300, lambda build, x: x))
    step = Steps().inputs([Piece(0, 0, MAX_TOKENS)])
    step.token_ids[:] = 0
    drawn = []
    for seed in range(num_seeds):
        chosen = sampling(MAX_TOKENS, temperature=np.ones(MAX_TOKENS, np.float32), positions=np.arange(MAX_TOKENS))
        chosen.seeds[:] = seed
        runtime.execute(step)
        drawn.append(runtime.sample(chosen).token_ids)
        logits = runtime.logits()
        if seed < 2:
            assert drawn[-1].tolist() == sample(logits, chosen).token_ids.tolist()
    runtime.close()
    return np.concatenate(drawn), logits[0]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_draws_what_the_reference_draws(level: str) -> None:
    tokens, _ = draws_of_one_row(level, 2)
    assert len(set(tokens.tolist())) > 50


def test_200000_draws_follow_the_distribution() -> None:
    """Chi-square; the seeds are fixed, so nothing is left to luck."""
    tokens, logits = draws_of_one_row("auto", 200_000 // MAX_TOKENS)
    expected = np.exp(logits.astype(np.float64))
    expected *= len(tokens) / expected.sum()
    counts = np.bincount(tokens, minlength=300)
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 400  # 299 degrees of freedom: p < 1e-4


def test_bias_and_penalties(runtime: NativeRuntime) -> None:
    random = np.random.default_rng(3)
    seen = [random.choice(VOCAB, 300, replace=False) for _ in range(ROWS)]
    changes = {
        "temperature": np.where(np.arange(ROWS) % 2, 0.0, 1.3).astype(np.float32),
        "repetition_penalty": random.uniform(0.5, 2, ROWS).astype(np.float32),
        "presence_penalty": random.uniform(-2, 2, ROWS).astype(np.float32),
        "frequency_penalty": random.uniform(-2, 2, ROWS).astype(np.float32),
        "seen_start": np.arange(0, 300 * (ROWS + 1), 300, dtype=np.int32),
        "seen_ids": np.concatenate(seen).astype(np.int32),
        "seen_counts": random.integers(0, 4, 300 * ROWS).astype(np.int32),
        "bias_start": np.arange(0, 3 * (ROWS + 1), 3, dtype=np.int32),
        "bias_ids": random.integers(0, VOCAB, 3 * ROWS).astype(np.int32),
        "bias_values": np.where(np.arange(3 * ROWS) % 3, 4.0, -np.inf).astype(np.float32),
    }
    plain = assert_same_tokens(runtime, temperature=changes["temperature"])
    assert (assert_same_tokens(runtime, **changes) != plain).any()


def test_masks_bound_every_way_of_drawing(runtime: NativeRuntime) -> None:
    """Every third row has none; one mask allows a single token, one the last there is, others a random half."""
    random = np.random.default_rng(5)
    words = -(-VOCAB // 32)
    masks = random.integers(0, 1 << 32, (5, words), dtype=np.uint32)
    masks[0] = 0
    masks[0, 1] = 1 << 7
    masks[1] = 0
    masks[1, (VOCAB - 1) // 32] = 1 << ((VOCAB - 1) % 32)
    masks[2, 2:] = 0xFFFFFFFF
    mask_of = np.where(np.arange(ROWS) % 3 == 0, -1, np.arange(ROWS) % 5).astype(np.int32)
    for temperature in (0.0, 1.5):
        changes = {"temperature": full(temperature), "mask_of": mask_of, "masks": masks}
        tokens = assert_same_tokens(runtime, **changes).reshape(-1, ROWS)
        assert (tokens[:, mask_of == 0] == 39).all()
        assert (tokens[:, mask_of == 1] == VOCAB - 1).all()
        for row in np.flatnonzero(mask_of >= 0):
            allowed = masks[mask_of[row], tokens[:, row] // 32] >> (tokens[:, row] % 32).astype(np.uint32) & 1
            assert allowed.all()
        free = assert_same_tokens(runtime, temperature=full(temperature)).reshape(-1, ROWS)
        assert (tokens[:, mask_of < 0] == free[:, mask_of < 0]).all()
    wanted = {"num_logprobs": full(3, np.int32), "mask_of": mask_of, "masks": masks}
    found, _ = both(runtime, sampling(ROWS, **wanted))
    raw, _ = both(runtime, sampling(ROWS, num_logprobs=full(3, np.int32)))
    assert np.array_equal(found.top_ids, raw.top_ids), "log probabilities are of the raw distribution"


def test_logprobs_and_ranks(runtime: NativeRuntime) -> None:
    wanted = (np.arange(ROWS, dtype=np.int32) % 7) - 1
    found, expected = both(runtime, sampling(ROWS, temperature=full(2.0), num_logprobs=wanted))
    assert found.top_ids.shape == (ROWS, 5)
    assert np.array_equal(found.top_ids, expected.top_ids)
    assert np.array_equal(found.ranks, expected.ranks)
    assert (found.ranks[wanted >= 0] >= 1).all()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-6)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-6)


def test_extreme_logits_never_leave_the_vocabulary(runtime: NativeRuntime) -> None:
    everything = {
        "bias_start": np.array([0, VOCAB], np.int32),
        "bias_ids": np.arange(VOCAB, dtype=np.int32),
    }
    for value in (-np.inf, np.inf, np.nan, 3e38):
        runtime.execute(inputs(1))
        values = np.full(VOCAB, value, np.float32)
        one = sampling(1, **everything, bias_values=values, temperature=np.ones(1, np.float32))
        one.num_logprobs[:] = 3
        found = runtime.sample(one)
        assert 0 <= found.token_ids[0] < VOCAB


def test_a_row_draws_the_same_token_in_any_batch(runtime: NativeRuntime) -> None:
    found, _ = both(runtime, sampling(ROWS, temperature=full(1.0)))
    for row in (0, 11):
        step = inputs(ROWS)
        step.logits_indices = np.array([row], np.int32)
        runtime.execute(step)
        seeds = np.array([row], np.uint64)
        alone = runtime.sample(sampling(1, temperature=np.ones(1, np.float32), seeds=seeds))
        assert alone.token_ids[0] == found.token_ids[row]


def test_equal_logits_in_many_chunks_are_ranked_by_id(runtime: NativeRuntime) -> None:
    """Every chunk's largest is the same number, so that the count-th largest of them leaves more than `count`."""
    everything = {
        "bias_start": np.arange(0, VOCAB * (ROWS + 1), VOCAB, dtype=np.int32)[: ROWS + 1],
        "bias_ids": np.tile(np.arange(VOCAB, dtype=np.int32), ROWS),
        "bias_values": np.full(VOCAB * ROWS, 1e30, np.float32),
    }
    assert set(assert_same_tokens(runtime, **everything).tolist()) == {0}
    tokens = assert_same_tokens(runtime, temperature=full(1.0), top_k=full(3, np.int32), **everything)
    assert set(tokens.tolist()) == {0, 1, 2}
