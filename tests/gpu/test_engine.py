"""The engine on the cuda runtime: its greedy tokens are the naive loop's on the reference, however they are batched."""

import json
import random
import re

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

pytest.importorskip("triton")

import octavo.runtime.choose as choose_module
import octavo.worker.worker as worker_module
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.grammar import to_grammar
from octavo.executor.local import LocalExecutor
from octavo.messages import AddRequest
from octavo.models.spec import ModelFiles
from octavo.runtime.cuda.runtime import CudaRuntime
from octavo.runtime.reference import ReferenceRuntime
from octavo.sampling_params import PoolingParams, SamplingParams
from tests.engine.naive import NaiveLoop
from tests.tiny_llama import TINY, VOCAB

SETTINGS = {
    "plain": {"enable_prefix_caching": False},
    "eager": {"enforce_eager": True},
    "one step at a time": {"async_scheduling": False},
    "eager, one step at a time": {"enforce_eager": True, "async_scheduling": False},
    "prefix cache": {},
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "one at a time": {"max_num_seqs": 1},
    "small pool": {"num_gpu_blocks_override": 12, "max_model_len": 192, "enable_prefix_caching": False},
    "nothing fused": {"fuse_ops": False},
    **{  # two at a time: some are for products of one and two rows
        f"without {name}": {"disable_fusions": name, "max_num_seqs": 2}
        for name in ("norm", "residual", "activation", "rope", "pdl")
    },
}
EVENTS = {"prefix cache": "prefix_hits", "chunks of 7": "num_chunked", "small pool": "num_preempted"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return ModelFiles("tiny", "hf", folder)


@pytest.fixture(scope="module")
def naive(files):
    loop = NaiveLoop(ReferenceRuntime(), files, load_format="dummy")
    cache = {}

    def generate(prompt, num_tokens):
        key = (tuple(prompt), num_tokens)
        if key not in cache:
            cache[key] = loop.generate(prompt, num_tokens)
        return cache[key]

    return generate


def make_core(files, tokenizer=lambda: None, **settings):
    limits = {"num_gpu_blocks_override": 64, "max_num_seqs": 64, "max_num_batched_tokens": 512}
    settings = {**limits, "dtype": "float32", **settings}
    settings = {"runtime": "cuda", "admission_headroom": 0.0, **settings}
    config = EngineConfig(model="tiny", load_format="dummy", **settings)
    executor = LocalExecutor(config, files)
    return EngineCore(config, executor, executor.start(), tokenizer=tokenizer)


def run(core, prompts, max_tokens, **params):
    options = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **params})
    for i, prompt in enumerate(prompts):
        core.handle(AddRequest(str(i), prompt, options, max_tokens, seed=i))
    tokens = {str(i): [] for i in range(len(prompts))}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None
            tokens[delta.request_id] += delta.token_ids
    return list(tokens.values())


def prompts_with_shared_prefixes():
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB) for _ in range(40)]
    own = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(6)]
    return [shared + own[0], shared + own[1], own[2], shared[:33] + own[3], own[4], own[5]]


class Watched(CudaRuntime):
    """Counts the tokens that a step took from the row of a step before it."""

    num_run_ahead = 0

    def execute(self, inputs):
        self.num_run_ahead += int((inputs.token_ids < 0).sum())
        super().execute(inputs)


def runtime_of(core):
    return core._executor.worker.runtime


def test_a_small_engine_under_the_interpreter_too(device, files, naive, monkeypatch):
    monkeypatch.setattr(choose_module, "missing", lambda **_: "")
    monkeypatch.setattr(worker_module, "create", lambda *_, **__: Watched("float32", device=device))
    core = make_core(files, max_num_batched_tokens=16, max_num_seqs=4)
    prompts = [[5, 9, 33] * 7, [7] * 3]
    assert run(core, prompts, 4) == [naive(p, 4) for p in prompts]
    assert core.log.total("num_chunked") > 0
    assert runtime_of(core).num_run_ahead >= 4
    core.close()


def told(core, prompts):
    """What is told of each prompt, two of them drawn, while others are drawn or embedded in the same steps."""
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=float(i), max_tokens=3, ignore_eos=True)
        params.prompt_logprobs = 2 if i != 1 else None
        core.handle(AddRequest(str(i), prompt, params, 3, seed=i))
    for kind in ("last", "mean"):
        core.handle(AddRequest(kind, prompts[0], PoolingParams().as_sampling(), 1, seed=0, pooling=kind))
    deltas = []
    while core.has_work:
        deltas += core.step().deltas
    return {
        d.request_id: np.frombuffer(d.vector, "<f4") if d.vector else d.prompt_logprobs for d in deltas if told_of(d)
    }


def told_of(delta):
    return delta.prompt_logprobs or delta.vector


def test_what_prompts_tell_is_what_the_reference_tells(device, files, monkeypatch):
    prompts = [[5, 9, 33, 8] * 5, [7] * 3, [11, 12]]
    expected = told(make_core(files, runtime="reference"), prompts)
    monkeypatch.setattr(choose_module, "missing", lambda **_: "")
    monkeypatch.setattr(worker_module, "create", lambda *_, **__: Watched("float32", device=device))
    core = make_core(files, max_num_batched_tokens=16, max_num_seqs=4)
    found = told(core, prompts)
    for kind in ("last", "mean"):
        np.testing.assert_allclose(found.pop(kind), expected.pop(kind), atol=1e-4)
    for request_id, entries in found.items():
        assert len(entries) == len(expected[request_id]) == len(prompts[int(request_id)]) - 1
        for ours, theirs in zip(entries, expected[request_id], strict=True):
            assert (ours.rank, ours.top_ids) == (theirs.rank, theirs.top_ids)
            assert ours.token_logprob == pytest.approx(theirs.token_logprob, abs=1e-4)
    assert expected.keys() == {"0", "2"}
    core.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_the_naive_loop(files, naive, name):
    core = make_core(files, **SETTINGS[name])
    assert name.removeprefix("without ") not in runtime_of(core)._fusions
    prompts = prompts_with_shared_prefixes()
    assert run(core, prompts, 20) == [naive(p, 20) for p in prompts]
    if name in EVENTS:
        assert core.log.total(EVENTS[name]) > 0
    assert (runtime_of(core).num_replays == 0) == name.startswith("eager")
    core.close()


WINDOWED = {
    **{k: v for k, v in TINY.items() if k not in ("architectures", "model_type", "rope_theta")},
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "sliding_window": 18,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windowed")
    (folder / "config.json").write_text(json.dumps(WINDOWED))
    files = ModelFiles("windowed", "hf", folder)
    return files, NaiveLoop(ReferenceRuntime(), files, load_format="dummy")


def test_windows_give_blocks_back_under_the_interpreter_too(device, windowed, monkeypatch):
    files, naive = windowed
    monkeypatch.setattr(choose_module, "missing", lambda **_: "")
    monkeypatch.setattr(worker_module, "create", lambda *_, **__: Watched("float32", device=device))
    core = make_core(files, max_num_batched_tokens=32, max_num_seqs=2, block_size=8)
    assert core.info.kv_windows == (0, 18, 18)
    prompts = [[5, 9, 33] * 13]
    assert run(core, prompts, 2) == [naive.generate(p, 2) for p in prompts]
    core.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_windows_give_blocks_back_and_change_no_token(windowed, name):
    files, naive = windowed
    sizes = {"num_gpu_blocks_override": 48, "max_model_len": 120} if name == "small pool" else {}
    core = make_core(files, **{"num_gpu_blocks_override": 400, **SETTINGS[name], "block_size": 8, **sizes})
    prompts, count = prompts_with_shared_prefixes(), 20
    if name == "small pool":  # all are let in, and grow until they do not fit
        prompts, count = [prompt[-9:] for prompt in prompts], 60
    assert run(core, prompts, count) == [naive.generate(p, count) for p in prompts]
    if name in EVENTS:
        assert core.log.total(EVENTS[name]) > 0
    assert (runtime_of(core).num_replays == 0) == name.startswith("eager")
    core.close()


@pytest.mark.gpu
def test_sampled_tokens_do_not_depend_on_batch_mates(files):
    core = make_core(files, enable_prefix_caching=False)
    prompts = prompts_with_shared_prefixes()
    options = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
    together = run(core, prompts, 12, **options)
    options = SamplingParams(ignore_eos=True, max_tokens=12, **options)
    for i, prompt in enumerate(prompts):
        core.handle(AddRequest("alone", prompt, options, 12, seed=i))
        alone = []
        while core.has_work:
            alone += [t for d in core.step().deltas for t in d.token_ids]
        assert alone == together[i]
    core.close()


@pytest.mark.gpu
def test_dummy_weights_larger_than_the_host_draws(files, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_size": 256, "vocab_size": 5000}))
    core = make_core(ModelFiles("tiny", "hf", tmp_path), dtype="bfloat16")
    tokens = run(core, [[3, 4, 5], [9] * 60], 6)
    assert [len(t) for t in tokens] == [6, 6]
    assert all(0 <= t < 5000 for row in tokens for t in row)
    core.close()


SMOLLM2 = {
    **TINY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
WAYS = {
    "graphs and overlap": {},
    "no graphs": {"enforce_eager": True},
    "no overlap": {"async_scheduling": False},
    "one request at a time": {"max_num_seqs": 1},
    "preemption": {"num_gpu_blocks_override": 40, "max_model_len": 256, "enable_prefix_caching": False},
    "chunks": {"max_num_batched_tokens": 64, "max_num_seqs": 64},
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 50, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_a_model_of_real_size_gives_the_same_tokens_every_way(tmp_path, options):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    files = ModelFiles("smollm2", "hf", tmp_path)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 49152) for _ in range(rng.randrange(5, 90))] for _ in range(20)]
    found = {}
    for name, settings in WAYS.items():
        defaults = {"num_gpu_blocks_override": 640, "max_num_seqs": 64, "max_num_batched_tokens": 2048}
        core = make_core(files, **{**defaults, **settings})
        found[name] = run(core, prompts, 24, **options)
        assert (core.log.total("num_preempted") > 0) == (name == "preemption")
        assert (core.log.total("num_chunked") > 0) == (name == "chunks")
        assert (runtime_of(core).num_replays == 0) == (name == "no graphs")
        core.close()
    assert len({t for tokens in found["no graphs"] for t in tokens}) > 20, "the model repeats itself: shows nothing"
    for name, tokens in found.items():
        assert tokens == found["no graphs"], name


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_a_decode_step_never_waits_for_the_device(files, options):
    import torch

    core = make_core(files)
    params = SamplingParams(ignore_eos=True, max_tokens=30, **{"temperature": 0.0, **options})
    for i in range(5):
        core.handle(AddRequest(str(i), [3 + i, 4, 5], params, 30, seed=i))
    for _ in range(4):
        core.step()
    replays = runtime_of(core).num_replays
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            core.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runtime_of(core).num_replays == replays + 10
    while core.has_work:
        core.step()
    core.close()


class Ascii:
    """Token i is the character i + 29, from 3 (a blank) on."""

    vocab_size = VOCAB
    special_ids = frozenset((0, 1, 2))

    def token_bytes(self, token):
        return b"<%d>" % token if token in self.special_ids else bytes([token + 29])

    def encode(self, text, *, add_special_tokens=True):
        return [ord(c) - 29 for c in text]


def ruled(core):
    """Answers, greedy and drawn: two bound by a grammar, two by a list of tokens, two free, in the same steps."""
    tokens = {}
    for i, allowed in enumerate([None, None, [40, 41, 42], [40, 41, 42], None, None]):
        params = SamplingParams(temperature=float(i % 2), max_tokens=24, allowed_token_ids=allowed)
        message = AddRequest(str(i), [5 + i, 6, 7], params, 24, seed=i)
        message.grammar = to_grammar("regex", "(ab|cd){6}z") if i < 2 else None
        core.handle(message)
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None
            tokens.setdefault(int(delta.request_id), []).extend(delta.token_ids)
    return [tokens[i] for i in range(6)]


@pytest.mark.gpu
def test_grammars_and_lists_of_tokens_bound_what_captured_steps_choose(files):
    pytest.importorskip("llguidance", minversion="1.9")
    found, replays = {}, {}
    for name, settings in {"graphs": {}, "eager": {"enforce_eager": True}, "cpu": {"runtime": "reference"}}.items():
        core = make_core(files, tokenizer=Ascii, **settings)
        found[name] = ruled(core)
        replays[name] = getattr(runtime_of(core), "num_replays", 0)
        core.close()
    assert found["graphs"] == found["eager"]
    assert found["graphs"][::2] == found["cpu"][::2]  # draws differ between devices, likeliest answers do not
    assert replays["graphs"] >= 12
    assert replays["eager"] == 0
    for answer in found["graphs"][:2]:
        assert re.fullmatch("(ab|cd){6}z", "".join(chr(token + 29) for token in answer if token > 2))
    for answer in found["graphs"][2:4]:
        assert set(answer) <= {40, 41, 42}
    assert all(set(answer) - {40, 41, 42} for answer in found["graphs"][4:])


@pytest.mark.gpu
def test_the_next_step_is_launched_before_the_last_ones_tokens_are_here(files):
    core = make_core(files)
    params = SamplingParams(ignore_eos=True, max_tokens=30, temperature=0.0)
    core.handle(AddRequest("a", [3, 4, 5], params, 30, seed=0))
    core.step()
    for _ in range(8):
        assert len(core._in_flight) == 1
        core.step()  # launches one more, and only then asks for the oldest
    assert runtime_of(core).num_replays >= 8
    while core.has_work:
        core.step()
    core.close()


@pytest.mark.gpu
def test_a_step_in_which_nobody_samples_has_ended_when_its_result_is_there(files, monkeypatch):
    core = make_core(files, max_num_batched_tokens=64, async_scheduling=False)
    runtime, ended = runtime_of(core), []
    launch = runtime.sample_later

    def sample_later(sampling):
        wait = launch(sampling)

        def waited():
            output = wait()
            ended.append((len(output.token_ids), torch.cuda.current_stream().query()))
            return output

        return waited

    monkeypatch.setattr(runtime, "sample_later", sample_later)
    run(core, [[5] * 220], 2)
    assert [count for count, _ in ended] == [0, 0, 0, 1, 1]
    assert all(is_over for _, is_over in ended), "or its time would be booked to the next step"
    core.close()


@pytest.mark.gpu
def test_forked_answers_and_beams_equal_those_of_separate_requests_and_of_the_reference(files):
    prompt = prompts_with_shared_prefixes()[0]
    sampled = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=20)
    beams = SamplingParams(use_beam_search=True, n=4, ignore_eos=True, max_tokens=20)
    found = []
    for settings in ({}, {"enable_copy_on_write": False, "enable_prefix_caching": False}, {"runtime": "reference"}):
        core = make_core(files, **settings)
        for i in range(5):
            core.handle(AddRequest(str(i), prompt, sampled, 20, seed=i, fork_of="0" if i else None))
        tokens = {str(i): [] for i in range(5)}
        while core.has_work:
            for delta in core.step().deltas:
                tokens[delta.request_id] += delta.token_ids
        forked = core.log.total("num_forked")
        assert forked == (0 if "enable_copy_on_write" in settings else 4)
        core.handle(AddRequest("b", prompt, beams, 20, seed=0))
        answers = {}
        while core.has_work:
            answers |= {delta.request_id: delta.token_ids for delta in core.step().deltas}
        assert core.log.total("num_forked") > forked, "beams fork"
        found.append((tokens, answers))
        core.close()
    (forks, first), (separate, second), (_, reference) = found
    assert forks == separate  # draws differ between devices, likeliest answers do not
    assert first == second == reference


@pytest.mark.gpu
def test_preempted_requests_come_back_from_host_memory(files, naive):
    prompts = [random.Random(n).choices(range(3, VOCAB), k=n) for n in (30, 45, 60, 20, 50, 35)]
    core = make_core(files, num_gpu_blocks_override=12, max_model_len=192, swap_space=0.01)
    assert core.info.host_copy_seconds > 0
    assert run(core, prompts, 50) == [naive(p, 50) for p in prompts]
    for event in ("num_preempted", "num_saved_blocks", "num_loaded_blocks"):
        assert core.log.total(event) > 0, event
    assert runtime_of(core).num_replays > 0
    core.close()
