"""What a prompt's own positions tell, held against transformers in float32, whatever else the engine does meanwhile."""

import random

import numpy as np
import pytest
import torch

import octavo.worker.worker as worker_module
from octavo.config import PROMPT_ROWS, EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.llm import LLM
from octavo.executor.local import LocalExecutor
from octavo.messages import AddRequest
from octavo.sampling_params import PoolingParams, SamplingParams
from tests.engine.test_depth import LateRuntime
from tests.model.tiny import load_oracle, make_tiny, oracle_logits

SETTINGS = {
    "reference": {"runtime": "reference"},
    "native": {"runtime": "native", "num_threads": 1},
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "small pool": {
        "num_gpu_blocks_override": 12,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": False,
    },
    "steps in flight": {"late": True},
}
EVENTS = {
    "reference": ["prefix_hits", "num_chunked"],  # chunked because a step tells of PROMPT_ROWS positions at most
    "native": ["prefix_hits", "num_chunked"],
    "chunks of 7": ["num_chunked"],
    "small pool": ["num_preempted", "num_recomputed_tokens"],
    "steps in flight": ["num_chunked"],
}
TOLD = 3  # alternatives


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def oracle(files):
    return load_oracle(files)


@pytest.fixture
def make_core(files, monkeypatch):
    def make(*, late=False, **settings):
        if late:
            monkeypatch.setattr(worker_module, "create", lambda *_, **__: LateRuntime(2))
        base = {"runtime": "reference", "num_gpu_blocks_override": 64, "admission_headroom": 0.0}
        base |= {"max_num_seqs": 16, "max_num_batched_tokens": 256}
        config = EngineConfig(model=files.name, **{**base, **settings})
        executor = LocalExecutor(config, files)
        return EngineCore(config, executor, executor.start())

    return make


def prompts(count=6, seed=3):
    """Some begin alike, one is a single token."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 101) for _ in range(34)]
    own = [[rng.randrange(3, 101) for _ in range(rng.randrange(20, 60))] for _ in range(count)]
    return [shared + own[0], shared + own[1], own[2], shared + own[3], own[4], [7], *own[5:]]


def answer(core, requests):
    """All at once; the deltas of each."""
    for request in requests:
        core.handle(request)
    deltas = {request.request_id: [] for request in requests}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            deltas[delta.request_id].append(delta)
    return deltas


def asking(number, prompt, *, tells=True, max_tokens=12, **more):
    params = SamplingParams(temperature=0.0, ignore_eos=True, prompt_logprobs=TOLD if tells else None, logprobs=0)
    return AddRequest(str(number), prompt, params, max_tokens, seed=0, **more)


def check(told, prompt, oracle):
    """The log probabilities that were told of a prompt are transformers'."""
    logprobs = torch.log_softmax(torch.tensor(oracle_logits(oracle, prompt)), -1).numpy()
    assert len(told) == len(prompt) - 1
    for row, token, entry in zip(logprobs, prompt[1:], told, strict=False):
        assert entry.token_logprob == pytest.approx(row[token], abs=2e-4)
        assert entry.rank == 1 + int((row > row[token]).sum())
        best = np.argsort(-row, kind="stable")[:TOLD]
        assert entry.top_ids == best.tolist()
        np.testing.assert_allclose(entry.top_logprobs, row[best], atol=2e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_prompt_logprobs_are_those_of_transformers(make_core, oracle, name):
    core, texts = make_core(**SETTINGS[name]), prompts()
    quiet = answer(core, [asking(f"quiet{i}", text, tells=False) for i, text in enumerate(texts)])
    interrupted = []
    schedule = core.scheduler.schedule
    core.scheduler.policy.peers = id  # the newest yields, whatever it costs: it is the one that reads its prompt

    def watched():
        output = schedule()
        interrupted.extend(who for who, _ in core.scheduler.preempted if who.reads_prompt)
        return output

    core.scheduler.schedule = watched
    before = {event: core.log.total(event) for event in EVENTS[name]}
    counts = []
    execute = core._executor.worker.runtime.execute
    core._executor.worker.runtime.execute = lambda inputs: (counts.append(inputs.logits_indices), execute(inputs))[1]
    growing = [asking(f"short{n}", [7] * n, tells=False, max_tokens=60) for n in (1, 4, 7, 10, 13)]
    deltas = answer(
        core,
        growing  # and taking blocks from who is in the middle of its prompt
        + [asking(i, text) for i, text in enumerate(texts)]  # every prefix is cached by now, and hit by the last two
        + [asking("forked", texts[0], tells=False, fork_of="0"), asking("beside", texts[1], tells=False)],
    )
    for number, text in enumerate(texts):
        first, *others = deltas[str(number)]
        check(first.prompt_logprobs, text, oracle)
        assert first.num_cached_tokens == 0
        assert all(other.prompt_logprobs is None for other in others)
    for number in range(len(texts)):  # and nothing else changes
        tokens = [t for delta in deltas[str(number)] for t in delta.token_ids]
        assert tokens == [t for delta in quiet[f"quiet{number}"] for t in delta.token_ids]
        assert len(tokens) == 12
    assert [t for d in deltas["forked"] for t in d.token_ids] == [t for d in deltas["0"] for t in d.token_ids]
    assert deltas["forked"][0].prompt_logprobs is None
    for event in EVENTS[name]:
        assert core.log.total(event) > before[event], f"{event} never happened"
    assert bool(interrupted) == (name == "small pool")
    most = core.config.max_num_seqs + PROMPT_ROWS
    assert max(map(len, counts)) <= most


def oracle_states(oracle, prompt):
    with torch.no_grad():
        return oracle.model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0].double().numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_vectors_are_the_last_states_of_transformers(make_core, oracle, name):
    core, texts = make_core(**SETTINGS[name]), prompts()
    steps = []
    execute = core._executor.worker.runtime.execute
    core._executor.worker.runtime.execute = lambda inputs: (steps.append(inputs), execute(inputs))[1]
    embedding = [
        AddRequest(f"{kind}{i}", text, PoolingParams(pooling=kind).as_sampling(), 1, 0, pooling=kind)
        for i, text in enumerate(texts)
        for kind in ("mean", "last")
    ]
    growing = [asking(f"short{n}", [7] * n, tells=n == 4, max_tokens=60) for n in (1, 4, 7, 10, 13)]
    deltas = answer(core, growing + embedding)
    for number, text in enumerate(texts):
        states = oracle_states(oracle, text)
        for kind, expected in (("mean", states.mean(0)), ("last", states[-1])):
            [delta] = deltas[f"{kind}{number}"]
            np.testing.assert_allclose(np.frombuffer(delta.vector, "<f4"), expected, atol=2e-4)
            assert delta.token_ids == []
    assert core.log.total(EVENTS[name][0]) > 0
    hits = [delta.num_cached_tokens for number in range(2) for delta in deltas[f"last{number}"]]
    assert any(hits) == core.config.enable_prefix_caching  # what the last state needs may be cached
    assert max(len(step.logits_indices) for step in steps) <= core.config.max_num_seqs + PROMPT_ROWS
    assert max(step.num_states for step in steps) > 0


def test_offline(files, oracle):
    settings = {"runtime": "native", "num_threads": 1, "skip_tokenizer_init": True, "num_gpu_blocks_override": 64}
    texts = prompts()
    tokens = [{"prompt_token_ids": text} for text in texts]
    with LLM(files.name, **settings) as llm:
        answers = llm.generate(tokens, SamplingParams(max_tokens=2, n=2, prompt_logprobs=0), use_tqdm=False)
        embedded = llm.embed(tokens, PoolingParams(pooling="mean"), use_tqdm=False)
        scores = llm.score(tokens[0], tokens[:2], use_tqdm=False)
    for text, answer_, vector in zip(texts, answers, embedded, strict=True):
        assert answer_.prompt_logprobs[0] is None
        assert [list(entries) for entries in answer_.prompt_logprobs[1:]] == [[token] for token in text[1:]]
        expected = oracle_states(oracle, text).mean(0)
        np.testing.assert_allclose(vector.outputs.embedding, expected / np.linalg.norm(expected), atol=1e-4)
    last = [oracle_states(oracle, text)[-1] for text in texts[:2]]
    last = [state / np.linalg.norm(state) for state in last]
    assert [s.outputs.score for s in scores] == pytest.approx([1.0, last[0] @ last[1]], abs=1e-4)


def test_steps_that_embed_make_no_logits(make_core):
    core = make_core()
    requests = [
        AddRequest(str(i), text, PoolingParams().as_sampling(), 1, 0, pooling="last")
        for i, text in enumerate(prompts())
    ]
    answer(core, requests)
    assert core._executor.worker.runtime.logits().shape == (0, 101)


def test_what_nobody_asks_for_costs_no_row(make_core):
    core = make_core()
    counts = []
    execute = core._executor.worker.runtime.execute
    core._executor.worker.runtime.execute = lambda inputs: (counts.append(inputs), execute(inputs))[1]
    answer(core, [asking(i, text, tells=False) for i, text in enumerate(prompts())])
    assert max(len(inputs.logits_indices) for inputs in counts) <= 7
    assert all(len(inputs.logits_indices) <= len(inputs.seq_lens) for inputs in counts)


def test_after_an_engine_died_a_prompt_is_told_once_or_again(make_core, oracle):
    """A request that brought a token before has told its prompt; one that did not tells it now."""
    core, text = make_core(), prompts()[0]
    deltas = answer(core, [asking("new", text), asking("old", text, output_token_ids=[5, 6])])
    check(deltas["new"][0].prompt_logprobs, text, oracle)
    assert all(delta.prompt_logprobs is None for delta in deltas["old"])
