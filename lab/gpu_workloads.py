"""The GPU workloads G1 to G5 as token ids: every engine gets the same work from the same seed.

G1 throughput  256 requests at once, 100 to 1,024 in and out
G2 latency     one request, 128 in, 128 out
G3 decode      64 requests at once, 1,024 in, 128 out
G4 prefill     16 requests, 2,048 in, 1 out
G5 sampled     G1 with temperature 0.8, top-p 0.95, top-k 50

End-of-sequence is ignored. The order of the draws is part of the definition.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

LOW, HIGH = 10, 30000  # ids of every vocabulary measured


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests as (prompt ids, tokens to generate), all at once, and how they sample."""

    name: str
    requests: list[tuple[list[int], int]]
    sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 0.0})

    @property
    def num_in(self) -> int:
        """Prompt tokens."""
        return sum(len(prompt) for prompt, _ in self.requests)

    @property
    def num_out(self) -> int:
        """Generated tokens."""
        return sum(count for _, count in self.requests)


def gpu_workloads(seed: int = 0) -> dict[str, Workload]:
    """The workloads by their short names, and "warm", which touches every path first."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(LOW, HIGH) for _ in range(count)]

    throughput = [(ids(rng.randint(100, 1024)), rng.randint(100, 1024)) for _ in range(256)]
    sampled = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    return {
        "warm": Workload("warm", [(ids(64), 16) for _ in range(16)]),
        "G2": Workload("G2 latency", [(ids(128), 128)]),
        "G3": Workload("G3 decode", [(ids(1024), 128) for _ in range(64)]),
        "G4": Workload("G4 prefill", [(ids(2048), 1) for _ in range(16)]),
        "G1": Workload("G1 throughput", throughput),
        "G5": Workload("G5 sampled", throughput, sampled),
    }
