"""Requests whose token is still in flight: who runs ahead, who waits, and what is dropped."""

from __future__ import annotations

import pytest
from fake import make_request, naive
from test_scheduler import Engine, prompt

from octavo.step import SchedulerOutput


def shares(output: SchedulerOutput) -> dict[str, int]:
    return {item.request_id: item.num_tokens for item in output.scheduled}


def test_a_pending_token_is_run_ahead_as_far_as_allowed() -> None:
    engine = Engine(max_run_ahead=2)
    engine.add(make_request("a", prompt(3)))
    launched = [engine.launch() for _ in range(4)]
    assert [shares(o) for o in launched] == [{"a": 3}, {"a": 1}, {"a": 1}, {}]
    assert [o.scheduled[0].start for o in launched[:3]] == [0, 3, 4]
    engine.land()
    assert shares(engine.launch()) == {"a": 1}
    while engine.executor.results:
        engine.land()
    engine.drain()
    assert engine.tokens["a"] == naive(prompt(3), 8)[0]


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(3, 128), (8, 6)])
def test_nothing_is_computed_behind_the_last_token(max_tokens: int, max_model_len: int) -> None:
    engine = Engine(max_run_ahead=3, max_model_len=max_model_len)
    engine.add(make_request("a", prompt(3), max_tokens))
    assert [shares(engine.launch()) for _ in range(4)] == [{"a": 3}, {"a": 1}, {"a": 1}, {}]
    for _ in range(3):
        engine.land()
    assert engine.tokens["a"] == naive(prompt(3), max_tokens, max_model_len)[0]
    assert engine.ends["a"].finish_reason == "length"


def test_one_that_may_stop_runs_a_single_token_ahead_and_what_is_behind_the_stop_is_dropped() -> None:
    expected, _ = naive(prompt(3), 8)
    engine = Engine(max_run_ahead=3)
    engine.add(make_request("a", prompt(3), stop_ids=frozenset({expected[0]})))
    assert [shares(engine.launch()) for _ in range(3)] == [{"a": 3}, {"a": 1}, {}]
    assert engine.land()[0].finish_reason == "stop"
    assert engine.land() == []
    assert engine.tokens["a"] == expected[:1]
    assert engine.kv.pool.num_used == 0


def test_one_that_needs_its_token_on_the_host_waits_while_others_run_ahead() -> None:
    engine = Engine(max_run_ahead=1)
    engine.add(make_request("a", prompt(3), needs_host_token=True), make_request("b", prompt(2, 50)))
    assert [shares(engine.launch()) for _ in range(2)] == [{"a": 3, "b": 2}, {"b": 1}]
    engine.land()
    assert shares(engine.launch()) == {"a": 1, "b": 1}


def test_a_token_that_runs_ahead_preempts_nobody() -> None:
    engine = Engine(num_blocks=2, max_run_ahead=1, enable_prefix_caching=False)
    engine.add(make_request("a", prompt(4), 4), make_request("b", prompt(3, 50), 4))
    assert shares(engine.launch()) == {"a": 4, "b": 3}
    assert shares(engine.launch()) == {"b": 1}  # `a` needs a block, and waits for its token first
    assert engine.total("num_preempted") == 0
    engine.land()
    assert shares(engine.launch()) == {"a": 1}  # now it is known, and `b` gives way
    assert engine.total("num_preempted") == 1
    while engine.executor.results:
        engine.land()
    engine.drain()
    assert engine.tokens == {"a": naive(prompt(4), 4)[0], "b": naive(prompt(3, 50), 4)[0]}


def test_a_failed_step_takes_what_ran_ahead_of_it() -> None:
    engine = Engine(max_run_ahead=2)
    engine.add(make_request("a", prompt(4)), make_request("b", prompt(3, 50)))
    engine.launch()
    engine.executor.fail_next = True
    engine.launch()
    engine.launch()
    while engine.executor.results:
        engine.land()
    assert {i.request_id for o in engine.outputs[-2:] for i in o.scheduled} == {"a", "b"}
    engine.drain()
    assert engine.tokens == {"a": naive(prompt(4), 8)[0], "b": naive(prompt(3, 50), 8)[0]}
    assert {d.finish_reason for d in engine.ends.values()} == {"length"}
