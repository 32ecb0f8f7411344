"""Holds a simulation against the real engine, on the same trace."""

import math
import statistics
from dataclasses import dataclass

from octavo.simulate.outcome import Outcome

TOLERANCE = 0.15  # relative
COMPARED = ("output tokens/s", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms")


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
    ours, *runs = (outcome.figures(ttft=math.inf, itl=math.inf) for outcome in (simulated, *measured))
    return [Comparison(name, ours[name], tuple(run[name] for run in runs)) for name in COMPARED]
