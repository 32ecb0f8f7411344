"""Holds a simulation against the real engine, on the same trace."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from octavo.simulate.outcome import Outcome, percentile

TOLERANCE = 0.15  # relative


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, both ways; what was measured is told for each run."""

    name: str
    simulated: float
    runs: tuple[float, ...]

    @property
    def measured(self) -> float:
        """The mean over the runs."""
        return statistics.mean(self.runs)

    @property
    def error(self) -> float:
        """Relative, with its sign."""
        return self.simulated / self.measured - 1.0 if self.measured else 0.0

    @property
    def spread(self) -> float:
        """How far the runs of one trace are from their mean, at most: what no simulation can foresee."""
        return max(abs(run / self.measured - 1.0) for run in self.runs) if self.measured else 0.0

    @property
    def within(self) -> bool:
        """True when the simulation is close enough to be believed."""
        return abs(self.error) <= TOLERANCE


def compare(simulated: Outcome, *measured: Outcome) -> list[Comparison]:
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

    runs = [figures(outcome) for outcome in measured]
    return [Comparison(name, value, tuple(run[name] for run in runs)) for name, value in figures(simulated).items()]
