"""A busy engine is never called stalled, a silent one is, whatever kind of silence it is."""

from __future__ import annotations

import pytest

from octavo.engine.watchdog import BACK_OFF, MAX_RESTARTS, RESTART_WINDOW, Restarts, Watchdog
from octavo.messages import StepRecord


class Engine:
    """A watchdog on a clock that we turn, over a process whose CPU time we give."""

    def __init__(self, num_threads: int = 2) -> None:
        self.now = self.cpu = 0.0
        self.watchdog = Watchdog(512, num_threads, clock=lambda: self.now)

    def step(self, seconds: float, num_tokens: int = 1) -> None:
        self.now += seconds
        self.cpu += seconds
        record = StepRecord(0, self.now, execute_seconds=seconds, num_tokens=num_tokens)
        self.watchdog.heard([record])

    def first_stall(self, cpu_per_second: float, until: float = 2000.0) -> float | None:
        """Seconds of silence after which it is called stalled, looked at twice a second."""
        began = self.now
        while self.now - began < until:
            self.now += 0.5
            self.cpu += 0.5 * cpu_per_second
            if self.watchdog.stalled(self.cpu):
                return self.now - began
        return None


def test_a_stopped_process_is_found_within_seconds() -> None:
    engine = Engine()
    for _ in range(100):
        engine.step(0.02)
    assert engine.first_stall(0.0) == pytest.approx(5, abs=0.6)


def test_an_endless_loop_is_found_a_little_later() -> None:
    engine = Engine()
    engine.step(0.02)
    assert 10 <= engine.first_stall(2.0) <= 25


def test_a_first_step_may_take_minutes() -> None:
    """A cold engine in its first long prompt computes on all threads; nobody knows yet what a step takes."""
    engine = Engine()
    assert engine.first_stall(2.0, until=590) is None
    assert 10 <= engine.first_stall(2.0) <= 20, "but not for ever"
    stopped = Engine()
    assert stopped.first_stall(0.0) == pytest.approx(5, abs=0.6), "and only while it computes"


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_starved_process_is_left_alone_for_minutes(share: float) -> None:
    """Others have the machine: it is silent, but what CPU time it gets it uses."""
    engine = Engine()
    engine.step(0.02)
    assert engine.first_stall(share, until=300) is None


def test_long_steps_are_expected_after_shorter_ones_of_the_same_kind() -> None:
    """16 tokens took 0.5 s, so 512 take 16 s: a silence of two minutes is no stall, even without CPU time."""
    engine = Engine()
    engine.step(0.5, num_tokens=16)
    assert engine.watchdog.expected_step == pytest.approx(16)
    engine.now += 120
    assert not engine.watchdog.stalled(engine.cpu)
    assert engine.first_stall(0.0) == pytest.approx(40, abs=1)


def test_where_the_system_tells_no_cpu_time_a_silent_engine_passes_for_one_that_computes() -> None:
    engine = Engine()
    engine.now += 590
    assert not engine.watchdog.stalled(None), "its first prompt may take minutes"
    engine.now += 11
    assert engine.watchdog.stalled(None)
    engine.step(0.02)
    engine.now += 19.9
    assert not engine.watchdog.stalled(None)
    engine.now += 0.2
    assert engine.watchdog.stalled(None)


def test_idle_time_is_no_silence() -> None:
    engine = Engine()
    engine.step(0.02)
    engine.now += 1000
    engine.watchdog.reset()
    assert not engine.watchdog.stalled(engine.cpu)
    assert engine.watchdog.silence == 0
    assert engine.watchdog.last_step_age == pytest.approx(1000)


def test_three_restarts_in_ten_minutes_and_no_more() -> None:
    now = 0.0
    restarts = Restarts(lambda: now)
    assert [restarts.next_delay() for _ in range(MAX_RESTARTS + 1)] == [*BACK_OFF, None]
    now = RESTART_WINDOW + 1
    assert restarts.next_delay() == BACK_OFF[0]
    assert restarts.count == MAX_RESTARTS + 1
