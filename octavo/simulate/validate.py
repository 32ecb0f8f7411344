"""Holds a simulation against the real engine, on the same trace."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.simulate.outcome import Outcome, percentile

TOLERANCE = 0.15  # relative


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, both ways."""

    name: str
    simulated: float
    measured: float

    @property
    def error(self) -> float:
        """Relative, with its sign."""
        return self.simulated / self.measured - 1.0 if self.measured else 0.0

    @property
    def within(self) -> bool:
        """True when the simulation is close enough to be believed."""
        return abs(self.error) <= TOLERANCE


def compare(simulated: Outcome, measured: Outcome) -> list[Comparison]:
    """Throughput, and the first tokens' and the gaps' percentiles in milliseconds."""

    def figures(outcome: Outcome) -> dict[str, float]:
        first = [seen.ttft for seen in outcome.seen if seen.times]
        gaps = [gap for seen in outcome.seen for gap in seen.gaps]
        return {
            "output tokens/s": sum(len(seen.times) for seen in outcome.seen) / outcome.seconds,
            "TTFT p50 ms": 1000 * percentile(first, 50),
            "TTFT p99 ms": 1000 * percentile(first, 99),
            "ITL p50 ms": 1000 * percentile(gaps, 50),
            "ITL p99 ms": 1000 * percentile(gaps, 99),
        }

    theirs = figures(measured)
    return [Comparison(name, value, theirs[name]) for name, value in figures(simulated).items()]
