from __future__ import annotations

import math
import statistics

import pytest

from octavo.cli.bench.arrivals import ramp_rate, send_times


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


def test_infinite_rate_sends_all_at_once() -> None:
    assert send_times(5) == [0.0] * 5


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0])
def test_offered_load_is_exactly_what_was_asked(burstiness: float) -> None:
    times = send_times(400, request_rate=20, burstiness=burstiness, seed=1)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(400 / 20)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    """The squared coefficient of variation of a Gamma distribution is 1 / shape."""
    for shape in (0.5, 1.0, 4.0):
        seen = gaps(send_times(4000, request_rate=10, burstiness=shape, seed=2))
        squared = statistics.pvariance(seen) / statistics.mean(seen) ** 2
        assert squared == pytest.approx(1 / shape, rel=0.15)


def test_infinite_burstiness_is_a_fixed_gap() -> None:
    assert gaps(send_times(10, request_rate=4, burstiness=math.inf)) == pytest.approx([0.25] * 10)


def test_same_seed_same_times() -> None:
    assert send_times(10, request_rate=1, seed=3) == send_times(10, request_rate=1, seed=3)
    assert send_times(10, request_rate=1, seed=3) != send_times(10, request_rate=1, seed=4)


def test_ramps_run_from_start_to_end() -> None:
    assert [ramp_rate(("linear", 2, 10), p) for p in (0, 0.5, 1)] == [2, 6, 10]
    assert [ramp_rate(("exponential", 1, 100), p) for p in (0, 0.5, 1)] == pytest.approx([1, 10, 100])
    times = send_times(2000, ramp=("linear", 1, 50), seed=5)
    early, late = gaps(times)[:200], gaps(times)[-200:]
    assert statistics.mean(early) > 5 * statistics.mean(late)
