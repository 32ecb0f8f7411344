"""The sampler's definition: each stage by itself, the order of stages, the noise, the log probabilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from octavo.runtime.base import Float32, SamplingInputs
from octavo.runtime.reference.sampler import sample, uniform

MASK = (1 << 64) - 1


def inputs(num_rows: int, **changes: Any) -> SamplingInputs:
    """Greedy inputs with fields replaced; scalars are spread over the rows."""
    base = SamplingInputs.greedy(num_rows)
    for name, value in changes.items():
        old = getattr(base, name)
        spread = np.asarray(value, dtype=old.dtype)
        changes[name] = np.full(old.shape, spread) if spread.ndim == 0 else spread
    return dataclasses.replace(base, **changes)


def frequencies(logits: list[float], num_draws: int = 4000, **changes: Any) -> Float32:
    """How often each token is drawn over seeds 0, 1, 2, ..."""
    rows = np.tile(np.array(logits, dtype=np.float32), (num_draws, 1))
    settings = inputs(num_draws, **{"temperature": 1.0, "seeds": np.arange(num_draws), **changes})
    drawn = sample(rows, settings).token_ids
    return np.bincount(drawn, minlength=len(logits)) / num_draws


def log(*probabilities: float) -> list[float]:
    return [float(np.log(p)) for p in probabilities]


def test_noise_is_splitmix_in_plain_integers() -> None:
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, position in ((0, 0), (1, 0), (0, 1), (MASK, 123456), (42, 1 << 40)):
        h = mix((mix((seed + golden) & MASK) + (position + 1) * golden) & MASK)
        u = uniform(np.array([seed], dtype=np.uint64), np.array([position]))[0]
        assert u == (h >> 40) / (1 << 24)


def test_noise_is_uniform_over_seeds_and_over_positions() -> None:
    for seeds, positions in ((np.arange(20000), np.zeros(20000)), (np.full(20000, 7), np.arange(20000))):
        u = uniform(seeds.astype(np.uint64), positions.astype(np.int64))
        counts, _ = np.histogram(u, bins=20, range=(0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([[1, 5, 5, 0], [2, 2, 2, 2]], dtype=np.float32)
    assert sample(logits, inputs(2)).token_ids.tolist() == [1, 0]


def test_draws_follow_the_distribution() -> None:
    assert np.abs(frequencies(log(0.5, 0.2, 0.3)) - [0.5, 0.2, 0.3]).max() < 0.03


def test_temperature_sharpens() -> None:
    squared = np.array([0.25, 0.04, 0.09]) / 0.38
    assert np.abs(frequencies(log(0.5, 0.2, 0.3), temperature=0.5) - squared).max() < 0.03


def test_tiny_temperature_is_greedy_and_finite() -> None:
    assert frequencies([50.0, 60.0, -80.0], num_draws=50, temperature=1e-30)[1] == 1.0


def test_top_k_keeps_the_lower_ids_among_equals() -> None:
    seen = frequencies(log(0.1, 0.3, 0.3, 0.3), num_draws=500, top_k=2)
    assert (seen > 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.5, 1), (0.501, 2), (0.79, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_shortest_head_that_reaches_it(top_p: float, kept: int) -> None:
    seen = frequencies(log(0.5, 0.3, 0.15, 0.05), num_draws=500, top_p=top_p)
    assert (seen > 0).sum() == kept


def test_top_p_is_over_what_top_k_left() -> None:
    # of 0.4, 0.3 (renormalised 0.57, 0.43) the first alone reaches 0.5; of the whole it would not
    assert frequencies(log(0.4, 0.3, 0.3), num_draws=300, top_k=2, top_p=0.5)[0] == 1.0
    assert frequencies(log(0.4, 0.3, 0.3), num_draws=300, top_p=0.5)[1] > 0


def test_min_p_is_relative_to_the_most_likely() -> None:
    seen = frequencies(log(0.5, 0.3, 0.15, 0.05), num_draws=500, min_p=0.29)
    assert (seen > 0).tolist() == [True, True, True, False]
    assert frequencies(log(0.5, 0.3, 0.2), num_draws=100, min_p=1.0)[0] == 1.0


def test_bias_moves_and_bans() -> None:
    logits = np.array([[3, 2, 1], [3, 2, 1]], dtype=np.float32)
    settings = inputs(2, bias_start=[0, 1, 3], bias_ids=[0, 0, 2], bias_values=[-np.inf, -2.0, 10.0])
    assert sample(logits, settings).token_ids.tolist() == [1, 2]
    settings.temperature[:] = 5.0
    assert sample(logits, settings).token_ids[0] != 0
    assert logits[0].tolist() == [3, 2, 1]


def test_a_mask_allows_what_has_a_bit() -> None:
    logits = np.arange(70, dtype=np.float32)[None].repeat(3, 0)
    settings = inputs(3)
    settings.mask_of = np.array([1, -1, 0], np.int32)
    settings.masks = np.array([[1 << 5, 0, 1 << 2], [1 << 31 | 3, 0, 0]], np.uint32)
    assert sample(logits, settings).token_ids.tolist() == [31, 69, 66]
    settings.temperature[:] = 50.0
    drawn = set()
    for seed in range(60):
        settings.seeds = np.full(3, seed, np.uint64)
        drawn.add(int(sample(logits, settings).token_ids[0]))
    assert drawn == {0, 1, 31}


def penalised(logits: list[float], ids: list[int], counts: list[int], **changes: float) -> int:
    settings = inputs(1, seen_start=[0, len(ids)], seen_ids=ids, seen_counts=counts, **changes)
    return int(sample(np.array([logits], dtype=np.float32), settings).token_ids[0])


def test_repetition_penalty_is_on_prompt_and_output_and_follows_the_sign() -> None:
    assert penalised([4.0, 3.0], [0], [0], repetition_penalty=2.0) == 1  # 4 / 2 < 3
    assert penalised([-1.0, -1.5], [0], [1], repetition_penalty=2.0) == 1  # -1 * 2 < -1.5
    assert penalised([4.0, 3.0], [0], [0], repetition_penalty=1.2) == 0


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    assert penalised([4.0, 3.5], [0], [0], presence_penalty=2.0, frequency_penalty=2.0) == 0  # in the prompt only
    assert penalised([4.0, 3.5], [0], [3], presence_penalty=1.0) == 1
    assert penalised([4.0, 3.5], [0], [3], presence_penalty=0.4) == 0  # once, however often it came
    assert penalised([4.0, 3.5], [0], [3], frequency_penalty=0.2) == 1  # 0.6 in all
    assert penalised([4.0, 3.5], [0], [2], frequency_penalty=0.2) == 0


def test_repetition_comes_before_presence() -> None:
    # (4 / 2) - 1 = 1; the other order would give (4 - 1) / 2 = 1.5
    assert penalised([4.0, 1.2], [0], [1], repetition_penalty=2.0, presence_penalty=1.0) == 1


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = np.random.default_rng(1).standard_normal((3, 9), dtype=np.float32)
    bias = {"bias_start": [0, 1, 1, 1], "bias_ids": [int(logits[0].argmin())], "bias_values": [100.0]}
    settings = inputs(3, num_logprobs=[3, -1, 0], **bias)
    out = sample(logits, settings)
    expected = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    assert out.token_ids[0] == logits[0].argmin()
    assert out.ranks.tolist() == [9, 0, 1]
    assert np.allclose(out.logprobs[[0, 2]], [expected[0].min(), expected[2].max()], atol=1e-6)
    assert np.isnan(out.logprobs[1])
    best = np.argsort(-expected[0])[:3]
    assert out.top_ids[0].tolist() == best.tolist()
    assert np.allclose(out.top_logprobs[0], expected[0][best], atol=1e-6)
    assert (out.top_ids[1:] == -1).all()
    assert np.isnan(out.top_logprobs[1:]).all()


def test_rank_counts_strictly_larger_logits() -> None:
    logits = np.array([[5, 7, 7, 7]], dtype=np.float32)
    assert sample(logits, inputs(1, num_logprobs=1)).ranks.tolist() == [1]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    random = np.random.default_rng(2)
    logits = random.standard_normal((16, 50), dtype=np.float32)
    changes = {
        "temperature": random.uniform(0.0, 2.0, 16).round(1),
        "top_k": random.integers(0, 20, 16),
        "top_p": random.uniform(0.2, 1.0, 16),
        "seeds": random.integers(0, 1 << 60, 16),
        "positions": random.integers(0, 1000, 16),
    }
    together = sample(logits, inputs(16, **changes)).token_ids
    alone = [
        int(sample(logits[r : r + 1], inputs(1, **{k: v[r : r + 1] for k, v in changes.items()})).token_ids[0])
        for r in range(16)
    ]
    assert together.tolist() == alone


def test_no_rows() -> None:
    out = sample(np.zeros((0, 5), dtype=np.float32), inputs(0))
    assert out.token_ids.shape == (0,)
    assert out.top_ids.shape == (0, 0)
