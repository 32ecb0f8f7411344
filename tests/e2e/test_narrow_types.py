"""What narrow weights, and a narrow KV cache, do to the default model's logits, against float32 throughout."""

from __future__ import annotations

import numpy as np
import pytest

from lab.teacher import one_request
from octavo.models.decoder import record
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.runtime.base import Float32, SamplingInputs
from octavo.runtime.native import NativeRuntime
from octavo.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.model

TEXT = """Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my purse, and
nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the world.
It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about
the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before
coffin warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper
hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into the street, and
methodically knocking people's hats off - then, I account it high time to get to sea as soon as I can."""


CASES = {  # (weights, KV): KL divergence in nats, mean and worst; share of positions with the same likeliest token
    ("float32", "bfloat16"): (2e-4, 2e-3, 0.98),
    ("float32", "int8"): (2e-3, 2e-2, 0.95),
    ("bfloat16", "float32"): (4e-4, 4e-3, 0.97),
    ("quantized", "float32"): (4e-4, 4e-3, 0.97),
    ("int8", "float32"): (1e-2, 0.2, 0.92),  # the default of a GGUF file
}


@pytest.fixture(scope="module")
def logits() -> dict[tuple[str, str], Float32]:
    """Log probabilities of every position of TEXT, for each type of weights and KV."""
    files = resolve_model("smollm2")
    spec = read_spec(files, max_model_len=512)
    program, weights = record(spec), open_weights(files, spec)
    ids = load_tokenizer(files).encode(TEXT)
    found = {}
    for dtype in ("float32", "bfloat16", "quantized", "int8"):
        runtime = NativeRuntime(2)
        runtime.load(program, weights, dtype=dtype, max_num_tokens=512, max_num_logits=len(ids), max_num_requests=1)
        for kv in ("float32", "bfloat16", "int8") if dtype == "float32" else ("float32",):
            runtime.allocate_kv(32, 16, kv)
            runtime.execute(one_request(ids, first_logits=0))
            runtime.sample(SamplingInputs.greedy(len(ids)))
            raw = runtime.logits().astype(np.float64)
            raw -= raw.max(axis=1, keepdims=True)
            found[dtype, kv] = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
        runtime.close()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_types_stay_within_their_bounds(logits: dict[tuple[str, str], Float32], case: tuple[str, str]) -> None:
    mean, worst, agreement = CASES[case]
    exact, found = logits["float32", "float32"], logits[case]
    divergence = (np.exp(exact) * (exact - found)).sum(axis=1)  # [positions], nats
    assert 0 < divergence.mean() < mean
    assert divergence.max() < worst
    assert (exact.argmax(axis=1) == found.argmax(axis=1)).mean() >= agreement
