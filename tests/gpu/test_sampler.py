"""The device sampler: greedy and logprobs equal the reference; draws stay in its kept set and follow its weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.runtime.cuda.sampler import Sampler  # noqa: E402
from octavo.runtime.reference.sampler import sample  # noqa: E402
from tests.runtime.programs import sampling  # noqa: E402

VOCAB = 150
CHUNK = 128  # so that rows have several chunks, the last one short


def draw(device, logits, inputs, dtype=torch.float32):
    sampler = Sampler(len(logits), logits.shape[1], dtype, torch.device(device), chunk=CHUNK)
    raw = torch.from_numpy(logits).to(device, dtype)
    return sampler.with_logprobs(raw, sampler.choose(raw, inputs), inputs)


def random_logits(rows, seed=0, scale=3.0, step=0.0):
    """With `step`, values are rounded to multiples of it, so that there are ties."""
    values = np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32) * np.float32(scale)
    return np.round(values / step).astype(np.float32) * np.float32(step) if step else values


def kept(logits, temperature, top_k, top_p, min_p):
    """Ids and probabilities that the reference's stages leave, from its definition."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp(((logits[order] - logits[order[0]]) / np.float32(temperature)).astype(np.float64))
    if top_p < 1:
        running = np.cumsum(weights)
        count = np.searchsorted(running, float(np.float32(top_p)) * running[-1]) + 1
        order, weights = order[:count], weights[:count]
    keep = weights >= float(np.float32(min_p))
    return order[keep], weights[keep] / weights[keep].sum()


def test_greedy_takes_the_lowest_of_equals(device):
    logits = random_logits(6, step=1.0)
    expected = sample(logits, sampling(6)).token_ids
    assert (logits == logits.max(1, keepdims=True)).sum() > 6, "no ties: the test shows nothing"
    assert draw(device, logits, sampling(6)).token_ids.tolist() == expected.tolist()


def test_bias_and_penalties_equal_the_reference(device):
    logits = random_logits(3, seed=1)
    best = np.argsort(-logits, axis=1)
    changes = {
        "bias_start": np.array([0, 1, 1, 3], np.int32),
        "bias_ids": np.array([best[0, 0], best[2, 0], best[2, 5]], np.int32),
        "bias_values": np.array([-np.inf, -50.0, 90.0], np.float32),
        "repetition_penalty": np.array([1.0, 1.7, 1.3], np.float32),
        "presence_penalty": np.array([0.0, 0.4, -0.3], np.float32),
        "frequency_penalty": np.array([0.0, 0.6, 0.2], np.float32),
        "seen_start": np.array([0, 0, 3, 5], np.int32),
        "seen_ids": np.array([best[1, 0], best[1, 1], 7, best[2, 5], 9], np.int32),
        "seen_counts": np.array([2, 0, 1, 3, 0], np.int32),
        "num_logprobs": np.array([3, -1, 0], np.int32),
    }
    expected, found = sample(logits, sampling(3, **changes)), draw(device, logits, sampling(3, **changes))
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.token_ids[0] != best[0, 0]
    assert found.token_ids[2] == best[2, 5]
    assert found.ranks.tolist() == expected.ranks.tolist()
    assert found.top_ids.tolist() == expected.top_ids.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, atol=1e-5)


def test_alternatives_among_equals_are_the_lowest_ids(device):
    logits = random_logits(18, step=2.0)
    inputs = sampling(18, num_logprobs=np.full(18, 20, np.int32))
    assert draw(device, logits, inputs).top_ids.tolist() == sample(logits, inputs).top_ids.tolist()


STAGES = [(12, 0.7, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1), (40, 0.9, 0.05), (1, 1.0, 0.0), (0, 1e-6, 0.0)]
ON_CARD = [
    pytest.param(*stages, dtype, step, marks=pytest.mark.gpu)
    for stages in STAGES
    for dtype in ("float32", "bfloat16")
    for step in (0.0, 1.0)
]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "dtype", "step"),
    [(12, 0.7, 0.0, "float32", 0.0), (0, 0.6, 0.05, "bfloat16", 1.0), (5, 1.0, 0.0, "bfloat16", 1.0), *ON_CARD],
)
def test_draws_stay_in_the_kept_set_and_reach_all_of_it(device, top_k, top_p, min_p, step, dtype):
    rows = 512 if device == "cuda" else 4
    logits = np.repeat(random_logits(1, seed=3, scale=2.0, step=step), rows, axis=0)
    logits = torch.from_numpy(logits).to(getattr(torch, dtype)).float().numpy()
    inputs = sampling(
        rows,
        temperature=np.full(rows, 1.5, np.float32),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
    )
    tokens = draw(device, logits, inputs, getattr(torch, dtype)).token_ids
    ids, weights = kept(logits[0], 1.5, top_k, top_p, min_p)
    assert set(tokens.tolist()) <= set(ids.tolist())
    expected_distinct = (1 - (1 - weights) ** rows).sum()
    assert len(set(tokens.tolist())) >= 0.6 * expected_distinct


def test_draws_depend_on_seed_and_position_only(device):
    logits = random_logits(4)
    same = np.repeat(logits[:1], 8, axis=0)
    inputs = sampling(
        8,
        temperature=np.ones(8, np.float32),
        seeds=np.array([5, 5, 6, 5, 7, 8, 5, 9], np.uint64),
        positions=np.array([2, 2, 2, 3, 2, 2, 2, 2], np.int64),
    )
    tokens = draw(device, same, inputs).token_ids
    assert tokens[0] == tokens[1] == tokens[6]
    assert len(set(tokens.tolist())) > 2
    alone = sampling(
        1, temperature=np.ones(1, np.float32), seeds=np.array([5], np.uint64), positions=np.array([2], np.int64)
    )
    assert draw(device, same[:1], alone).token_ids[0] == tokens[0]


def test_mixed_rows_each_keep_their_own_rule(device):
    logits = random_logits(4, seed=5)
    inputs = sampling(
        4,
        temperature=np.array([0.0, 1.0, 0.7, 2.0], np.float32),
        top_k=np.array([3, 1, 0, 0], np.int32),
        top_p=np.array([0.5, 1.0, 1e-9, 1.0], np.float32),
        min_p=np.array([0.0, 0.0, 0.0, 1.0], np.float32),
    )
    assert draw(device, logits, inputs).token_ids.tolist() == logits.argmax(1).tolist()


def test_frequencies_follow_the_weights(device):
    """Chi-square of draws over 8 ids; a wrong temperature or noise is far beyond the bound."""
    rows = 200_000 if device == "cuda" else 300
    logits = np.zeros((1, 8), np.float32)
    logits[0] = [0.0, 0.5, -0.5, 1.0, 1.5, -1.0, 0.2, 0.9]
    inputs = sampling(rows, temperature=np.full(rows, 0.8, np.float32), seeds=np.full(rows, 3, np.uint64))
    inputs.positions[:] = np.arange(rows)
    tokens = draw(device, np.repeat(logits, rows, axis=0), inputs).token_ids
    _, weights = kept(logits[0], 0.8, 0, 1.0, 0.0)
    expected = np.zeros(8)
    expected[np.argsort(-logits[0], kind="stable")] = weights * rows
    statistic = ((np.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum()
    assert statistic < 29.9  # 7 degrees of freedom, one in ten thousand
