"""What the scheduler does when a step fails: whose fault it was, who goes on, what is left of the blocks."""

from __future__ import annotations

from fake import make_request, naive
from test_scheduler import Engine, prompt


def test_after_a_failed_step_everyone_runs_once_alone_and_nobody_notices() -> None:
    engine = Engine()
    engine.add(*(make_request(name, prompt(10), 4) for name in "abc"))
    engine.executor.fail_next = True
    assert engine.step() == {"a": 10, "b": 2, "c": 2}
    assert engine.kv.pool.num_cached == 0  # what the step should have filled is not to be found
    assert [engine.step() for _ in range(3)] == [{"a": 10}, {"b": 2}, {"c": 2}]
    assert engine.step() == {"a": 1, "b": 1, "c": 1}
    engine.drain()
    assert engine.tokens == dict.fromkeys("abc", naive(prompt(10), 4)[0])
    assert {end.finish_reason for end in engine.ends.values()} == {"length"}


def test_the_guilty_one_gets_the_error() -> None:
    engine = Engine(max_num_batched_tokens=8)  # its retry takes two steps, alone in both
    engine.add(make_request("a", prompt(6), 4), make_request("b", prompt(6), 4), make_request("c", prompt(9, 100), 4))
    engine.step()
    engine.executor.guilty = {"b"}
    engine.drain()
    assert (engine.ends["b"].finish_reason, engine.ends["b"].error) == ("error", "boom")
    assert engine.tokens["a"] == naive(prompt(6), 4)[0]
    assert engine.tokens["c"] == naive(prompt(9, 100), 4)[0]
    assert engine.kv.pool.num_used == 0


def test_a_failure_takes_sharers_in_flight_with_it() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(9), 3))
    engine.executor.fail_next = True
    engine.launch()
    engine.add(make_request("b", prompt(9), 3))
    assert [item.num_tokens for item in engine.launch().scheduled] == [1]  # hits what never gets written
    engine.land()
    engine.land()
    engine.drain()
    assert engine.tokens == dict.fromkeys("ab", naive(prompt(9), 3)[0])


def test_an_aborted_owner_of_a_failed_step_leaves_no_hashed_block() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(9)))
    engine.executor.fail_next = True
    engine.launch()
    engine.scheduler.abort("a")
    assert engine.kv.pool.num_cached == 2
    assert engine.land() == []
    assert engine.kv.pool.num_cached == 0


def test_a_suspect_can_be_aborted_and_others_go_on() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(5), 3), make_request("b", prompt(5, 100), 3))
    engine.executor.fail_next = True
    engine.step()
    engine.scheduler.abort("a")
    engine.drain()
    assert engine.tokens == {"b": naive(prompt(5, 100), 3)[0]}
