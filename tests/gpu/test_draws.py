"""Draws as they are served: by replays of the steps captured at start, each launched while the one before it runs."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.messages import AddRequest
from octavo.models.spec import ModelFiles
from octavo.runtime.cuda.graphs import DRAWS, Shape
from octavo.sampling_params import SamplingParams
from tests.gpu.test_sampler import kept
from tests.tiny_llama import TINY, VOCAB

NUM_DRAWS = 200_000  # of each law
ROWS = 512  # requests, all of them in every step
LAWS = {
    "temperature": {},
    "top-k in the middle of equals": {"top_k": 7},
    "top-p in the middle of equals": {"top_p": 0.49},
    "top-p at an edge": {"top_k": 4, "top_p": 0.5},
    "min-p between two groups": {"min_p": 0.2},
    "all of them": {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
}
LOGITS = np.array([3.0] * 4 + [2.0] * 5 + list(np.linspace(1.5, -1.0, VOCAB - 9)), np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that always has the same logits: every token is the same vector, to which no layer adds anything."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder = tmp_path_factory.mktemp("law")
    (folder / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": 4096}))
    width, inner, kv_width = TINY["hidden_size"], TINY["intermediate_size"], TINY["hidden_size"] // 2
    random = np.random.default_rng(0)
    logits = LOGITS[random.permutation(VOCAB)]
    tensors = {
        "model.embed_tokens.weight": np.ones((VOCAB, width)),
        "model.norm.weight": np.ones(width),
        "lm_head.weight": np.repeat(logits[:, None] / width, width, axis=1),
    }
    shapes = {"q": (width, width), "k": (kv_width, width), "v": (kv_width, width)}
    for n in range(TINY["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        tensors |= {f"{layer}self_attn.{part}_proj.weight": random.normal(size=shapes[part]) for part in shapes}
        tensors |= {f"{layer}mlp.{part}_proj.weight": random.normal(size=(inner, width)) for part in ("gate", "up")}
        tensors[f"{layer}self_attn.o_proj.weight"] = np.zeros((width, width))
        tensors[f"{layer}mlp.down_proj.weight"] = np.zeros((width, inner))
        tensors |= {f"{layer}{name}_layernorm.weight": np.ones(width) for name in ("input", "post_attention")}
    save_file({name: values.astype(np.float32) for name, values in tensors.items()}, folder / "model.safetensors")
    return ModelFiles("law", "hf", folder)


def draws_of(core, laws, num_tokens):
    """The tokens of each law but for the first of each request, whose step had prompts in it."""
    names = [list(laws)[i % len(laws)] for i in range(ROWS)]
    for i, name in enumerate(names):
        params = SamplingParams(temperature=0.8, ignore_eos=True, max_tokens=num_tokens, **laws[name])
        core.handle(AddRequest(str(i), [5, 6], params, num_tokens, seed=i))
    tokens = {str(i): [] for i in range(ROWS)}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None
            tokens[delta.request_id] += delta.token_ids
    drawn = {name: [] for name in laws}
    for i, name in enumerate(names):
        assert len(tokens[str(i)]) == num_tokens
        drawn[name] += tokens[str(i)][1:]
    return drawn


def far(degrees):
    """What chi-square exceeds once in ten thousand times (Wilson and Hilferty 1931)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + 3.719 * part**0.5) ** 3


def check_law(tokens, logits, top_k=0, top_p=1.0, min_p=0.0):
    """Nothing but what the law keeps is drawn, and that as often as it says."""
    ids, weights = kept(logits, 0.8, top_k, top_p, min_p)
    counts = np.bincount(tokens, minlength=VOCAB)
    expected = np.zeros(VOCAB)
    expected[ids] = weights * len(tokens)
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[ids] ** 2 / expected[ids]).sum()
    assert statistic < far(len(ids) - 1)
    return len(ids)


@pytest.mark.gpu
def test_replayed_steps_draw_by_every_law(files, monkeypatch):
    num_tokens = 1 + -(-NUM_DRAWS // (ROWS // len(LAWS)))
    config = EngineConfig(
        model="law", runtime="cuda", dtype="float32", max_num_seqs=ROWS, max_num_batched_tokens=2 * ROWS,
        num_gpu_blocks_override=ROWS * -(-(num_tokens + 2) // 16), enable_prefix_caching=False,
    )  # fmt: skip
    executor = LocalExecutor(config, files)
    core = EngineCore(config, executor, executor.start(), tokenizer=lambda: None)
    runtime, replayed = executor.worker.runtime, []
    replay = runtime._graphs.replay
    monkeypatch.setattr(runtime._graphs, "replay", lambda key: (replayed.append(key), replay(key)))
    before = core.log.num_steps, runtime.num_replays
    drawn = draws_of(core, LAWS, num_tokens)
    assert core.log.num_steps - before[0] == num_tokens, "one step with prompts, then one a token"
    assert runtime.num_replays - before[1] == len(replayed) == num_tokens - 1
    assert set(replayed) == {(Shape(ROWS, ROWS, is_decode=True), DRAWS)}
    logits = runtime.logits()
    assert logits.shape == (ROWS, VOCAB)
    assert (logits == logits[0]).all(), "every row is the same law"
    np.testing.assert_allclose(np.sort(logits[0])[::-1], LOGITS, atol=1e-4)
    sizes = {}
    for name, law in LAWS.items():
        assert len(drawn[name]) >= NUM_DRAWS
        sizes[name] = check_law(drawn[name], logits[0], **law)
    assert list(sizes.values()) == [VOCAB, 7, 7, 2, 9, 21]
    core.close()
