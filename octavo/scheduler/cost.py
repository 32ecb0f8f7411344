"""What a step costs: a linear model of what it computes, fitted to steps that were timed.

    seconds = fixed + per_token * tokens + per_row * sampled rows + per_position * KV positions read
              + per_pair * query-key pairs of prefills + per_copy * blocks copied to or from host memory

No coefficient is negative (more work is never faster), and the fit minimises relative errors, so that a decode step
of 3 ms counts as much as a prefill of 300. Used by the policy `slo` to size prefill chunks, and by the simulator as its
clock. Plain Python: six coefficients need no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from octavo.messages import StepRecord

SWEEPS = 1000  # of coordinate descent; six coefficients settle long before
PASSES = 3  # each with the errors relative to what the one before it says
OUTLIER = 4.0  # times the median error


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computes."""

    num_tokens: int
    num_sampled: int  # rows whose next token is sampled
    num_kv_read: int  # positions, over all rows
    num_pairs: int  # query-key pairs of rows with more than one token
    num_copied: int = 0  # blocks, to host memory or from there

    @classmethod
    def of(cls, record: StepRecord) -> StepWork:
        """The work of a recorded step."""
        copied = record.num_saved_blocks + record.num_loaded_blocks
        return cls(record.num_tokens, record.num_sampled, record.num_kv_read, record.num_prefill_pairs, copied)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds per unit of work; none is negative."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_row: float = 0.0
    per_position: float = 0.0
    per_pair: float = 0.0
    per_copy: float = 0.0

    def seconds(self, work: StepWork) -> float:
        """What a step of this work takes."""
        return (
            self.fixed
            + self.per_token * work.num_tokens
            + self.per_row * work.num_sampled
            + self.per_position * work.num_kv_read
            + self.per_pair * work.num_pairs
            + self.per_copy * work.num_copied
        )

    def prefill_seconds(self, num_tokens: int) -> float:
        """What a prompt of so many tokens adds to a step."""
        return self.seconds(StepWork(num_tokens, 0, num_tokens, num_tokens * (num_tokens + 1) // 2)) - self.fixed

    def prefill_tokens(self, seconds: float, work: StepWork, context: int) -> int:
        """How many prompt tokens, each attending to `context` positions, fit into a step of this length beside
        `work`; may be negative. A model that finds tokens free answers with a very large number."""
        each = self.per_token + self.per_pair * context
        return int((seconds - self.seconds(work)) / each + 1e-6) if each > 0 else 1 << 30


def typical(samples: Sequence[tuple[StepWork, float]]) -> list[tuple[StepWork, float]]:
    """Leaves out the steps that something else held up: those whose error against a first fit is far from the usual."""
    first = fit(samples)
    errors = [abs(seconds / max(first.seconds(work), 1e-9) - 1.0) for work, seconds in samples]
    limit = OUTLIER * sorted(errors)[len(errors) // 2] if errors else 0.0
    return [sample for sample, error in zip(samples, errors, strict=True) if error <= limit]


def fit(samples: Sequence[tuple[StepWork, float]]) -> CostModel:
    """The model with the least squared error relative to what it says itself: so it is right on average, where errors
    relative to what was measured would make it say too little (they forgive a step that took twice as long, and not one
    that took half). Non-negative least squares by coordinate descent, which converges because the problem is convex;
    the first of PASSES is relative to what was measured. Samples of zero seconds say nothing and are left out."""
    works = [(1, *astuple(work)) for work, seconds in samples if seconds > 0]
    taken = [seconds for _, seconds in samples if seconds > 0]
    size = len(fields(CostModel))
    scales, x = taken, [0.0] * size
    for _ in range(PASSES):
        rows = [[value / scale for value in work] for work, scale in zip(works, scales, strict=True)]
        ratios = [seconds / scale for seconds, scale in zip(taken, scales, strict=True)]
        gram = [[sum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
        target = [sum(row[i] * ratio for row, ratio in zip(rows, ratios, strict=True)) for i in range(size)]
        for _ in range(SWEEPS):
            for i in range(size):
                if gram[i][i] > 0:
                    rest = target[i] - sum(gram[i][j] * x[j] for j in range(size) if j != i)
                    x[i] = max(0.0, rest / gram[i][i])
        scales = [max(sum(a * b for a, b in zip(x, work, strict=True)), 1e-9) for work in works]
    return CostModel(*x)
