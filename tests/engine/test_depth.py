"""Steps in flight never change a token: the engine on a runtime whose results come late, against the naive loop."""

import dataclasses
from collections import deque

import numpy as np
import pytest

import octavo.worker.worker as worker_module
from octavo.engine.core import EngineCore
from octavo.messages import AbortRequests, AddRequest, FinishRequest
from octavo.runtime.reference import ReferenceRuntime
from octavo.sampling_params import SamplingParams
from tests.engine.test_core import EVENTS, SETTINGS, files, make_core, naive, prompts_with_shared_prefixes, run

__all__ = ["files", "naive"]  # fixtures


class LateRuntime(ReferenceRuntime):
    """The reference, told to behave like a device: it keeps each row's last token, and results are fetched late."""

    def __init__(self, depth):
        super().__init__()
        self.max_depth = depth
        self.row_tokens = np.zeros(65, np.int32)  # the last one is nowhere
        self.num_run_ahead = self.most_in_flight = self.num_steps = 0
        self.failing_step = None
        self.in_flight = deque()

    def execute(self, inputs):
        self.num_steps += 1
        if self.num_steps == self.failing_step:
            raise RuntimeError("boom")
        ids = inputs.token_ids
        self.num_run_ahead += int((ids < 0).sum())
        known = np.where(ids < 0, self.row_tokens[np.maximum(-1 - ids, 0)], ids)
        super().execute(dataclasses.replace(inputs, token_ids=known))

    def sample_later(self, sampling):
        output = self.sample(sampling)
        self.row_tokens[sampling.rows] = output.token_ids
        self.in_flight.append(output)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))

        def wait():
            assert self.in_flight.popleft() is output, "results are asked for in the order of the steps"
            return output

        return wait


@pytest.fixture
def late_core(files, monkeypatch):
    def make(depth, **settings):
        monkeypatch.setattr(worker_module, "create", lambda *_, **__: LateRuntime(depth))
        return make_core(files, **settings)

    return make


def runtime_of(core):
    return core._executor.worker.runtime


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_the_naive_loop(late_core, naive, name, depth):
    core = late_core(depth, **SETTINGS[name])
    prompts = prompts_with_shared_prefixes()
    assert run(core, prompts) == [naive(p, 20) for p in prompts]
    runtime = runtime_of(core)
    assert (runtime.num_run_ahead > 0, runtime.most_in_flight) == (depth > 1, depth)
    for event in EVENTS.get(name, []):
        assert core.log.total(event) > 0


def test_no_async_scheduling_is_depth_1(late_core, naive):
    core = late_core(4, async_scheduling=False)
    prompts = prompts_with_shared_prefixes()
    assert run(core, prompts) == [naive(p, 20) for p in prompts]
    assert (runtime_of(core).num_run_ahead, runtime_of(core).most_in_flight) == (0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "top_k": 30},
        {"presence_penalty": 0.8, "repetition_penalty": 1.2},
        {"min_tokens": 9, "ignore_eos": False, "stop_token_ids": [5, 17, 40, 60]},
        {"logit_bias": {3: 40.0}, "logprobs": 2},
    ],
)
def test_every_depth_samples_the_same(late_core, options):
    prompts = prompts_with_shared_prefixes(2)
    tokens = {}
    for depth in (1, 2, 4):
        core = late_core(depth, max_num_batched_tokens=64)
        tokens[depth] = run(core, prompts, **options)
        waits = "presence_penalty" in options
        assert (runtime_of(core).num_run_ahead > 0) == (depth > 1 and not waits)
    assert tokens[1] == tokens[2] == tokens[4]
    assert all(tokens[1])


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"kind": "regex", "spec": "[a-f]{3}[0-9]{9,20}x"}, True),
        ({"kind": "json", "spec": {"type": "array", "items": {"type": "integer"}, "minItems": 2}}, True),
        ({"bad": ["a", "e", "t"], "bad_words": ["a", "e", "t"]}, True),
        ({"allowed_token_ids": [40, 41, 42, 60]}, False),
        ({"kind": "regex", "spec": "[a-z]{9,30}", "allowed_token_ids": [2, *range(68, 80)]}, True),
    ],
)
def test_every_depth_keeps_the_same_rules(files, monkeypatch, options, waits):
    from tests.engine.test_rules import ask, finish, ruled

    answers = {}
    for depth in (1, 2, 4):
        monkeypatch.setattr(worker_module, "create", lambda *_, depth=depth, **__: LateRuntime(depth))
        core = ruled(files)
        for number in range(3):
            ask(core, number, temperature=1.2, max_tokens=30, **options)
        answers[depth] = finish(core)
        assert (runtime_of(core).num_run_ahead > 0) == (depth > 1 and not waits)
    assert answers[1] == answers[2] == answers[4]
    assert set(answers[1][2].values()) == {None}, "no answer may end with an error"


def test_a_token_in_flight_is_not_given_to_the_next_request_of_its_row(late_core, naive):
    core = late_core(2, max_num_seqs=1)
    options = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=30)
    first, second = [7, 8, 9], [50, 51, 52, 53]
    core.handle(AddRequest("first", first, options, 30, seed=0))
    core.step()
    core.step()
    core.handle(AbortRequests(["first"]))
    core.handle(AddRequest("second", second, options, 30, seed=0))
    tokens = {"first": [], "second": []}
    while core.has_work:
        for delta in core.step().deltas:
            tokens[delta.request_id] += delta.token_ids
    assert tokens["second"] == naive(second, 30)
    assert tokens["first"] == naive(first, 30)[: len(tokens["first"])]


def test_the_front_may_finish_a_request_that_runs_ahead(late_core, naive):
    core = late_core(4)
    options = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=30)
    core.handle(AddRequest("a", [7, 8, 9], options, 30, seed=0))
    for _ in range(6):
        core.step()
    core.handle(FinishRequest("a", 2))
    core.handle(AddRequest("b", [7, 8, 9], options, 30, seed=0))
    tokens = []
    while core.has_work:
        tokens += [t for d in core.step().deltas if d.request_id == "b" for t in d.token_ids]
    assert tokens == naive([7, 8, 9], 30)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_failed_step_and_its_successors_start_over(late_core, naive, depth):
    core = late_core(depth)
    runtime_of(core).failing_step = runtime_of(core).num_steps + 4
    prompts = prompts_with_shared_prefixes()
    assert run(core, prompts) == [naive(p, 20) for p in prompts]
    failed = [r for r in core.log if r.num_failed]
    assert len(failed) == depth  # the step itself, and those launched before that was known
    assert runtime_of(core).most_in_flight == depth


def test_depth_is_the_cores_to_choose(files, late_core):
    core = late_core(4)
    shallow = EngineCore(core.config, core._executor, core.info, depth=2)
    assert len(run(shallow, [[3, 4, 5]])[0]) == 20
    assert runtime_of(core).most_in_flight == 2
