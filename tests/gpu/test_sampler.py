"""The device sampler: greedy and logprobs equal the reference; draws stay in its kept set and follow its weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.runtime.base import SamplerOutput  # noqa: E402
from octavo.runtime.cuda.sampler import Sampler, SamplerRows  # noqa: E402
from octavo.runtime.reference.sampler import noise_keys, sample  # noqa: E402
from tests.runtime.programs import sampling  # noqa: E402

VOCAB = 150
CHUNK = 128  # so that rows have several chunks, the last one short


WAYS = {"few": {"piece": 2, "room": 64}, "wide": {"piece": 128, "room": 2}}


def rows_of(inputs, device):
    """What staging makes of SamplingInputs, row by row."""
    rows = np.arange(len(inputs.top_k), dtype=np.int32)
    arrays = (rows, inputs.top_k, inputs.temperature, inputs.top_p, inputs.min_p)
    keys = noise_keys(inputs.seeds, inputs.positions).view(np.int64)
    return SamplerRows(*(torch.from_numpy(a).to(device) for a in (*arrays, keys)))


def draw(device, logits, inputs, dtype=torch.float32, way="few", repeat=1):
    """Samples rows of logits, each `repeat` times; returns the output, and how many rows took the passes over all."""
    num_rows = len(inputs.top_k)
    options = {"num_rows_kept": num_rows, "chunk": CHUNK, **WAYS[way]}
    sampler = Sampler(num_rows, logits.shape[1], torch.device(device), **options)
    raw = torch.from_numpy(logits).to(device, dtype)
    raw = raw.repeat_interleave(repeat, 0) if repeat > 1 else raw
    draws = bool((inputs.temperature > 0).any())
    is_plain = not len(inputs.bias_ids) and not len(inputs.seen_ids) and inputs.masks is None
    sampler.launch(raw if is_plain else sampler.adjust(raw, inputs), rows_of(inputs, device), draws=draws)
    tokens = sampler.tokens.cpu().numpy()
    np.testing.assert_array_equal(sampler.row_tokens.cpu().numpy()[:num_rows], tokens)
    output = SamplerOutput.without_logprobs(tokens, inputs.num_logprobs)
    if (inputs.num_logprobs >= 0).any():
        fill = sampler.logprobs(raw, inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        fill(output)
    draw.num_wide = sampler.num_wide if draws else 0
    return output


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
        "mask_of": np.array([1, -1, 0], np.int32),
        "masks": np.full((2, -(-logits.shape[1] // 32)), 0xFFFFFFFF, np.uint32),
    }
    changes["masks"][1, best[0, 1] // 32] ^= np.uint32(1 << best[0, 1] % 32)  # the second best of row 0, too
    expected, found = sample(logits, sampling(3, **changes)), draw(device, logits, sampling(3, **changes))
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.token_ids[0] == best[0, 2]
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
    pytest.param(*stages, dtype, step, way, marks=pytest.mark.gpu)
    for stages in STAGES
    for dtype in ("float32", "bfloat16")
    for step in (0.0, 1.0)
    for way in WAYS
]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "dtype", "step", "way"),
    [
        (12, 0.7, 0.0, "float32", 0.0, "few"),
        (0, 0.6, 0.05, "bfloat16", 1.0, "few"),
        (5, 1.0, 0.0, "bfloat16", 1.0, "few"),
        (0, 1.0, 0.1, "float32", 0.0, "few"),
        (5, 0.9, 0.0, "bfloat16", 1.0, "wide"),
        (0, 0.6, 0.0, "float32", 1.0, "wide"),
        *ON_CARD,
    ],
)
def test_draws_stay_in_the_kept_set_and_reach_all_of_it(device, top_k, top_p, min_p, step, dtype, way):
    rows = 512 if device == "cuda" else 2
    logits = np.repeat(random_logits(1, seed=3, scale=2.0, step=step), rows, axis=0)
    logits = torch.from_numpy(logits).to(getattr(torch, dtype)).float().numpy()
    inputs = sampling(
        rows,
        temperature=np.full(rows, 1.5, np.float32),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
    )
    tokens = draw(device, logits, inputs, getattr(torch, dtype), way).token_ids
    has_bound = bool(top_k or top_p < 1 or min_p)
    if way == "few" or (top_k != 1 and top_p > 1e-3):  # of one id a bound is always found
        assert draw.num_wide == (0 if way == "few" and has_bound else rows)
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
        min_p=np.full(8, 1e-6, np.float32),
        seeds=np.array([5, 5, 6, 5, 7, 8, 5, 9], np.uint64),
        positions=np.array([2, 2, 2, 3, 2, 2, 2, 2], np.int64),
    )
    tokens = draw(device, same, inputs).token_ids
    assert tokens[0] == tokens[1] == tokens[6]
    assert len(set(tokens.tolist())) > 2
    alone = sampling(
        1, temperature=np.ones(1, np.float32), seeds=np.array([5], np.uint64), positions=np.array([2], np.int64)
    )
    assert draw(device, same[:1], alone, way="wide").token_ids[0] == tokens[0]


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


LAWS = {  # logits, and what else shapes the law
    "temperature": ([0.0, 0.5, -0.5, 1.0, 1.5, -1.0, 0.2, 0.9], {}),
    "a min-p below all": ([0.0, 0.5, -0.5, 1.0, 1.5, -1.0, 0.2, 0.9], {"min_p": 1e-4}),
    "top-k in the middle of equals": ([1.0, 0.5, 0.5, 0.5, 0.5, -1.0, 0.2, 0.9], {"top_k": 4}),
    "top-p at an edge": ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], {"top_p": 0.5}),
    "top-p of a top-k": ([1.5, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, -1.0], {"top_k": 5, "top_p": 0.8}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("law", LAWS)
def test_frequencies_follow_the_weights(device, law, way):
    """Chi-square of draws over 8 ids; a wrong temperature or noise is far beyond the bound."""
    if device == "cpu" and (way == "wide" or law != "top-p of a top-k"):
        pytest.skip("slow under the interpreter: on a card")
    rows = 200_000 if device == "cuda" else 48
    values, options = LAWS[law]
    logits = np.array([values], np.float32)
    top_k, top_p, min_p = options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0)
    inputs = sampling(
        rows,
        temperature=np.full(rows, 0.8, np.float32),
        seeds=np.full(rows, 3, np.uint64),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
    )
    inputs.positions[:] = np.arange(rows)
    tokens = draw(device, logits, inputs, way=way, repeat=rows).token_ids
    assert draw.num_wide == (0 if way == "few" and options else rows)
    ids, weights = kept(logits[0], 0.8, top_k, top_p, min_p)
    expected = np.zeros(8)
    expected[ids] = weights * rows
    counts = np.bincount(tokens, minlength=8)
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[ids] ** 2 / expected[ids]).sum()
    assert statistic < 29.9  # at most 7 degrees of freedom, one in ten thousand
