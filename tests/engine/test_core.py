"""The engine against the naive loop: batching, chunking, prefix cache and preemption never change a token."""

import json
import random

import pytest

from octavo.config import EngineConfig
from octavo.engine.calibrate import prepare
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.messages import AbortRequests, AddRequest, FinishRequest
from octavo.models.spec import ModelFiles
from octavo.runtime.reference import ReferenceRuntime
from octavo.sampling_params import SamplingParams
from octavo.scheduler.cost import CostModel, StepWork
from tests.engine.naive import NaiveLoop
from tests.tiny_llama import TINY, VOCAB


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return ModelFiles("tiny", "hf", folder)


SMALL = {"runtime": "reference", "num_gpu_blocks_override": 64, "admission_headroom": 0.0}  # so that pools run out


def make_core(files, **settings):
    config = EngineConfig(model="tiny", load_format="dummy", **{**SMALL, **settings})
    executor = LocalExecutor(config, files)
    return EngineCore(config, executor, executor.start())


def prompts_with_shared_prefixes(seed=0):
    rng = random.Random(seed)
    shared = [rng.randrange(3, VOCAB) for _ in range(40)]
    own = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(6)]
    return [shared + own[0], shared + own[1], own[2], shared[:33] + own[3], own[4], own[5]]


def run(core, prompts, *, max_tokens=20, cache_salt=None, **params):
    """All at once; returns the tokens of each."""
    options = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **params})
    for i, prompt in enumerate(prompts):
        core.handle(AddRequest(str(i), prompt, options, max_tokens, seed=i, cache_salt=cache_salt))
    tokens = {str(i): [] for i in range(len(prompts))}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None
            tokens[delta.request_id] += delta.token_ids
    return list(tokens.values())


@pytest.fixture(scope="module")
def naive(files):
    loop = NaiveLoop(ReferenceRuntime(), files, load_format="dummy")
    cache = {}

    def generate(prompt, num_tokens, **options):
        key = (tuple(prompt), num_tokens, tuple(options.items()))
        if key not in cache:
            cache[key] = loop.generate(prompt, num_tokens, **options)
        return cache[key]

    return generate


SETTINGS = {
    "plain": {"enable_prefix_caching": False, "max_num_batched_tokens": 512},
    "prefix cache": {"max_num_batched_tokens": 512},
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "one at a time": {"max_num_seqs": 1},
    "small pool": {"num_gpu_blocks_override": 12, "max_model_len": 192, "enable_prefix_caching": False},
    "small pool, chunks, prefix cache": {
        "num_gpu_blocks_override": 12,
        "max_model_len": 192,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 16,
    },
}
EVENTS = {  # what each setting must have made happen
    "prefix cache": ["prefix_hits"],
    "chunks of 7": ["num_chunked", "prefix_hits"],
    "small pool": ["num_preempted", "num_recomputed_tokens"],
    "small pool, chunks, prefix cache": ["num_chunked", "num_preempted"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_the_naive_loop(files, naive, name):
    core = make_core(files, **SETTINGS[name])
    prompts = prompts_with_shared_prefixes()
    assert run(core, prompts) == [naive(p, 20) for p in prompts]
    for event in EVENTS.get(name, []):
        assert core.log.total(event) > 0, f"{name}: {event} never happened"
    if name == "plain":
        assert core.log.total("prefix_hits") == core.log.total("num_preempted") == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_tokens_depend_on_seed_and_position_only(files, naive, name):
    core = make_core(files, **SETTINGS[name])
    prompts = prompts_with_shared_prefixes(1)
    expected = [naive(p, 12, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    assert run(core, prompts, max_tokens=12, temperature=1.0) == expected


def test_requests_of_one_step_share_the_blocks_it_computes(files):
    core = make_core(files)
    prompt = prompts_with_shared_prefixes()[0][:40]
    run(core, [prompt, prompt], max_tokens=1)
    first = next(iter(core.log))
    assert first.num_running == 2
    assert first.prefix_hits == 32  # two full blocks, filled by the first request in this very step


def test_abort_and_finish_free_everything(files):
    core = make_core(files)
    prompts = prompts_with_shared_prefixes()
    options = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=100)
    for i, prompt in enumerate(prompts):
        core.handle(AddRequest(str(i), prompt, options, 100, seed=i))
    for _ in range(5):
        core.step()
    core.handle(FinishRequest("1", num_kept=2))
    core.handle(AbortRequests([str(i) for i in range(len(prompts))]))
    reasons = {d.request_id: d.finish_reason for d in core.step().deltas}
    assert reasons == {str(i): "abort" for i in (0, 2, 3, 4, 5)}  # the front knows of 1 already
    assert not core.has_work
    pool = core.scheduler.kv.pool
    assert pool.num_used == 0
    assert pool.num_free + pool.num_cached == pool.num_blocks


def test_a_failing_request_ends_alone(files, naive, monkeypatch):
    core = make_core(files, max_num_batched_tokens=64)
    prompts = prompts_with_shared_prefixes()
    poison = prompts[2]
    runner = core._executor.worker.runner
    execute = runner.execute

    def fail_on_poison(output):
        execute(output)
        if any(runner._rows.token_ids[s.row, : len(poison)].tolist() == poison for s in output.scheduled):
            raise ZeroDivisionError("planted")

    monkeypatch.setattr(runner, "execute", fail_on_poison)
    options = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20)
    for i, prompt in enumerate(prompts):
        core.handle(AddRequest(str(i), prompt, options, 20, seed=i))
    tokens = {str(i): [] for i in range(len(prompts))}
    errors = {}
    while core.has_work:
        for delta in core.step().deltas:
            tokens[delta.request_id] += delta.token_ids
            if delta.error:
                errors[delta.request_id] = delta.error
    assert errors == {"2": "ZeroDivisionError: planted"}
    assert core.log.total("num_failed") >= 2
    assert [tokens[str(i)] for i in (0, 1, 3, 4, 5)] == [naive(prompts[i], 20) for i in (0, 1, 3, 4, 5)]


def test_stop_ids_min_tokens_and_logprobs(files, naive):
    core = make_core(files)
    prompt = prompts_with_shared_prefixes()[4]
    greedy = naive(prompt, 20)
    stop = greedy[3]
    first = greedy.index(stop)
    core.handle(AddRequest("s", prompt, SamplingParams(temperature=0.0, stop_token_ids=[stop], logprobs=3), 20, seed=0))
    deltas = []
    while core.has_work:
        deltas += core.step().deltas
    assert [t for d in deltas for t in d.token_ids] == greedy[: first + 1]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    for delta in deltas:
        entry = delta.logprobs[0]
        assert entry.rank == 1
        assert entry.top_ids[0] == delta.token_ids[0]
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
        assert entry.token_logprob == entry.top_logprobs[0]

    held = run(core, [prompt], stop_token_ids=[stop], min_tokens=first + 3)[0]
    assert stop not in held[: first + 3], "a stop id is banned until min_tokens were generated"
    assert held[:first] == greedy[:first]


def test_the_oracle_is_not_degenerate(naive):
    prompts = prompts_with_shared_prefixes()
    answers = [naive(p, 20) for p in prompts]
    assert len({tuple(a) for a in answers}) == len(prompts)
    sampled = [naive(p, 12, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    assert all(len(set(s)) > 6 for s in sampled)


@pytest.mark.parametrize("policy", ["priority", "fair", "slo"])
def test_no_policy_changes_a_token(files, naive, policy):
    core = make_core(
        files, num_gpu_blocks_override=12, max_model_len=192, enable_prefix_caching=False, scheduling_policy=policy
    )
    if policy == "slo":  # what steps cost decides who runs: the same on every machine
        core.scheduler.policy.cost = CostModel(fixed=0.004, per_token=1e-4)
    prompts = prompts_with_shared_prefixes()
    assert run(core, prompts) == [naive(p, 20) for p in prompts]
    assert core.log.total("num_preempted") > 0


def test_slo_is_calibrated_and_calibration_leaves_nothing_behind(files):
    core = make_core(files, scheduling_policy="slo")
    prepare(core)
    assert core.scheduler.policy.cost.seconds(StepWork(100, 1, 100, 5000)) > 0
    assert "calibrate" in core.ready().timings
    assert len(core.log) == core.scheduler.kv.pool.num_used == core.scheduler.kv.pool.num_cached == 0
    assert core.scheduler.kv.enable_prefix_caching
    assert not core.has_work


def test_a_full_queue_and_a_passed_deadline_are_told_apart(files):
    core = make_core(files, max_num_queued_reqs=2, max_num_seqs=1)
    options = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=50)
    for i in range(3):
        core.handle(AddRequest(str(i), [5 + i, 6, 7], options, 50, seed=0, timeout=1e-9 if i == 1 else None))
    deltas = {d.request_id: d for d in core.step().deltas if d.error}
    assert {(d.request_id, d.error_kind) for d in deltas.values()} == {("1", "TimeLimitError"), ("2", "QueueFullError")}
    assert deltas["2"].retry_after >= 1.0
    while core.has_work:
        core.step()


def test_a_beam_search_told_again_has_the_engine_for_itself_until_it_ends(files):
    """It is announced once a step, nobody else computes meanwhile, and what was held then goes on as it should."""
    core = make_core(files)
    told = []
    core.announce = lambda outputs: told.extend(outputs.deltas)
    beams = SamplingParams(n=2, use_beam_search=True, temperature=0.0, max_tokens=5, ignore_eos=True)
    plain = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    core.handle(AddRequest("beams", [5, 6, 7], beams, 5, seed=0, runs_alone=True))
    for name in ("kept", "left", "late"):
        core.handle(AddRequest(name, [8, 9], plain, 5, seed=0, timeout=1e-9 if name == "late" else None))
    core.handle(AddRequest("gone", [8, 9], beams, 5, seed=0))
    core.handle(AbortRequests(["left", "gone"]))
    ended, widths = {}, []
    while core.has_work:
        outputs = core.step()
        widths += [record.num_running for record in outputs.records if "beams#0" not in ended]
        ended |= {delta.request_id: delta for delta in outputs.deltas if delta.finish_reason}
    assert widths[0] == 1
    assert set(widths[1:]) == {2}
    assert [(delta.request_id, delta.alone) for delta in told] == [("beams", True)] * len(widths)
    reasons = {name: str(delta.finish_reason) for name, delta in ended.items()}
    beam_reasons = {"beams#0": "length", "beams#1": "length", "gone#0": "abort", "gone#1": "abort"}
    assert reasons == {**beam_reasons, "kept": "length", "left": "abort", "late": "error"}
    assert ended["late"].error_kind == "TimeLimitError"


def test_what_a_lonely_beam_search_holds_is_bounded_as_the_queue_is(files):
    core = make_core(files, max_num_queued_reqs=2)
    beams = SamplingParams(n=2, use_beam_search=True, temperature=0.0, max_tokens=5, ignore_eos=True)
    plain = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    core.handle(AddRequest("beams", [5, 6, 7], beams, 5, seed=0, runs_alone=True))
    core.handle(AddRequest("told again", [8, 9], plain, 2, seed=0, runs_alone=True))
    for name, params in (("second", plain), ("third", plain), ("fourth", beams)):
        core.handle(AddRequest(name, [8, 9], params, 2, seed=0))
    deltas = core.step().deltas
    refused = [(d.request_id, d.error_kind, d.retry_after >= 1.0) for d in deltas if d.error]
    assert refused == [(name, "QueueFullError", True) for name in ("third", "fourth#0", "fourth#1")]
    ended = {}
    while core.has_work:
        ended |= {d.request_id: d.finish_reason for d in core.step().deltas if d.finish_reason}
    assert ended == dict.fromkeys(("beams#0", "beams#1", "told again", "second"), "length")
