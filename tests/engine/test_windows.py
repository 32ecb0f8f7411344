"""KV groups: sliding windows give blocks back, and neither that nor anything else changes a token. The oracle is
transformers, in float32 and without a cache."""

import random

import pytest

import octavo.worker.worker as worker_module
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.runtime.reference import ReferenceRuntime
from tests.engine.naive import NaiveLoop
from tests.engine.test_core import run
from tests.engine.test_depth import LateRuntime
from tests.model.tiny import load_oracle, make_tiny, oracle_logits

NUM_TOKENS = 12
BASE = {"block_size": 4, "dtype": "float32", "max_model_len": 120, "admission_headroom": 0.0, "max_num_seqs": 4}
SETTINGS = {
    "plain": {"num_gpu_blocks_override": 400, "enable_prefix_caching": False},
    "prefix cache": {"num_gpu_blocks_override": 400, "max_num_batched_tokens": 24},
    "chunks of 7": {"num_gpu_blocks_override": 400, "max_num_batched_tokens": 7},
    "small pool": {"max_model_len": 88, "max_num_batched_tokens": 16},
}
SMALL_POOL = {"gemma": 30, "mistral": 9}  # blocks: what one request needs, and two
EVENTS = {
    "prefix cache": ["prefix_hits"],
    "chunks of 7": ["num_chunked", "prefix_hits"],
    "small pool": ["num_chunked", "num_preempted", "num_recomputed_tokens"],
}


def make_prompts():
    draw = random.Random(1)
    shared = [draw.randrange(3, 101) for _ in range(40)]
    own = [[draw.randrange(3, 101) for _ in range(draw.randrange(1, 36))] for _ in range(6)]
    return [shared + own[0], own[1], shared + own[2], shared[:21] + own[3], own[4], shared + own[5]]


PROMPTS = make_prompts()


@pytest.fixture(scope="module", params=["gemma3", "mistral"])
def model(request, tmp_path_factory):
    files = make_tiny(request.param, tmp_path_factory.mktemp(request.param))
    oracle = load_oracle(files)
    texts = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NUM_TOKENS):
            text.append(int(oracle_logits(oracle, text)[-1].argmax()))
        texts.append(text[len(prompt) :])
    return files, texts


def make_core(files, **settings):
    settings.setdefault("num_gpu_blocks_override", SMALL_POOL[files.path.name.rstrip("0123456789")])
    config = EngineConfig(model=str(files.path), **{"runtime": "reference", **BASE, **settings})
    executor = LocalExecutor(config, files)
    return EngineCore(config, executor, executor.start())


def total(core, name):
    return sum(getattr(record, name) for record in core.log)


@pytest.mark.parametrize("runtime", ["reference", "native"])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_transformers(model, name, runtime):
    files, texts = model
    core = make_core(files, runtime=runtime, num_threads=1, **SETTINGS[name])
    assert any(core.info.kv_windows)
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == texts
    for event in EVENTS.get(name, []):
        assert total(core, event), event
    core.close()


@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_tokens_equal_the_naive_loop(model, name):
    files, _ = model
    loop = NaiveLoop(ReferenceRuntime(), files, max_len=SETTINGS[name].get("max_model_len", 120))
    core = make_core(files, **SETTINGS[name])
    expected = [loop.generate(p, NUM_TOKENS, temperature=1.0, seed=i) for i, p in enumerate(PROMPTS)]
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS, temperature=1.0) == expected


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_transformers_with_steps_in_flight(model, name, depth, monkeypatch):
    files, texts = model
    monkeypatch.setattr(worker_module, "create", lambda *_, **__: LateRuntime(depth))
    core = make_core(files, **SETTINGS[name])
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == texts


def test_one_table_for_all_layers_gives_the_same_tokens(model):
    files, texts = model
    core = make_core(files, disable_hybrid_kv_cache_manager=True, num_gpu_blocks_override=400)
    assert core.info.kv_windows == (0,)
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == texts


def test_windows_hold_what_they_see_and_no_more(model):
    """One long request: what it takes at most, in bytes, with windows that forget and without."""
    files, _ = model
    taken = {}
    for disabled in (False, True):
        core = make_core(
            files,
            num_gpu_blocks_override=400,
            max_num_batched_tokens=8,
            enable_prefix_caching=False,
            disable_hybrid_kv_cache_manager=disabled,
        )
        run(core, [PROMPTS[0] + PROMPTS[2][:30]], max_tokens=NUM_TOKENS)
        held = max(record.num_used_blocks for record in core.log)
        taken[disabled] = held * core.info.plan.block_bytes
        windows, num_tokens = core.info.kv_windows, len(PROMPTS[0]) + 30 + NUM_TOKENS - 1
        whole, seen = -(-num_tokens // 4), -(-(max(windows) - 1 + 8) // 4) + 1
        most = sum(seen if window else whole for window in windows)
        assert held == whole if disabled else whole * windows.count(0) < held <= most
    layers = 4 if 0 in windows else 3
    assert taken[False] < taken[True] * (0.75 if layers == 4 else 0.5)
