"""`make soak-scheduler`: random walks over scheduler and KV cache, a million steps, every invariant after each.

The walks are those of tests/unit/test_scheduler_machine.py, without hypothesis in between: it chooses well but slowly.
Every engine is new (sizes, policy, depth, caching, recording), is walked for a while, must come to an end, and is
replayed where it was recorded. What happened is counted and written down; a failure names the seed that shows it again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from test_scheduler_machine import POLICIES, WINDOWS, SchedulerMachine  # noqa: E402

from lab.machine import describe_machine  # noqa: E402
from octavo.kvcache.eviction import EVICTIONS  # noqa: E402
from octavo.messages import StepRecord  # noqa: E402

OPERATIONS = 60  # of one walk
EVENTS = (
    "num_tokens",
    "num_chunked",
    "num_preempted",
    "num_recomputed_tokens",
    "prefix_hits",
    "num_forked",
    "num_copied_blocks",
    "num_evicted_blocks",
    "num_saved_blocks",
    "num_loaded_blocks",
    "host_hits",
)


class Walk(SchedulerMachine):
    """A machine that draws its own operations, and counts."""

    def __init__(self, seed: int, counts: Counter[str]) -> None:
        self.draw = random.Random(seed)
        self.counts = counts
        self.names: list[str] = []

    def begin(self) -> None:
        draw = self.draw
        num_blocks, policy, depth = draw.randint(1, 12), draw.choice(list(POLICIES)), draw.randint(1, 4)
        self.start(
            num_blocks=num_blocks,
            block_size=draw.randint(1, 4),
            max_num_seqs=draw.randint(1, 4),
            extra_budget=draw.randint(0, 20),
            spare_len=draw.randint(-3, 5),
            threshold=draw.choice([0, 0, 0, 1, 3, 5]),
            caching=draw.random() < 0.75,
            depth=depth,
            runs_ahead=draw.random() < 0.5,
            policy=policy,
            headroom=draw.choice([0.0, 0.0, 0.5, 2.0]),
            eviction=draw.choice(list(EVICTIONS)),
            max_queued=draw.choice([0, 0, 0, 1, 5]),
            record_bytes=draw.choice([0, 0, 4_000, 1 << 20]),
            windows=draw.choice(WINDOWS),
            num_host_blocks=draw.choice([0, 0, 1, 4, 30]),
        )
        self.counts["engines"] += 1
        self.counts[f"engines: {policy}"] += 1
        self.counts[f"engines: depth {depth}"] += 1

    def operate(self) -> None:
        """One operation, and the invariants."""
        draw = self.draw
        kind = draw.choices(("add", "run", "abort", "finish", "go_wrong", "take", "choose"), (30, 50, 6, 4, 3, 7, 4))[0]
        if kind == "add":
            self.add_some()
        elif kind == "run":
            self.run(steps=draw.randint(1, 8))
        elif kind == "take":
            if self.executor.results:
                self.take_one_result()
        elif kind == "choose":
            self.choose_copies(saves=draw.random() < 0.7)
        elif self.names:
            name = draw.choice(self.names)
            arguments: dict[str, Any] = {
                "abort": {},
                "finish": {"kept": draw.randint(0, 16)},
                "go_wrong": {"always": draw.random() < 0.5},
            }[kind]
            getattr(self, kind)(name=name, **arguments)
        self.counts[f"operations: {kind}"] += 1
        self.rows_are_unique()
        self.hashed_blocks_hold_what_their_hash_says()

    def add_some(self) -> None:
        draw = self.draw
        names = draw.sample("abcdefgh", draw.randint(1, 4))
        self.add(
            names=names,
            family=draw.choice([0, 0, 1]),
            shared=draw.randint(0, 14),
            tail=[draw.randint(0, 2) for _ in range(draw.randint(0, 3))],
            max_tokens=draw.randint(1, 16),
            min_tokens=draw.randint(0, 4),
            stops=draw.random() < 0.5,
            waits=draw.random() < 0.5,
            salt=draw.choice([None, None, "tenant"]),
            forks=draw.random() < 0.5,
            priority=draw.randint(-2, 2),
            tenant=draw.choice("abc"),
            timeout=draw.choice([None, None, None, 3.0, 30.0]),
        )
        self.names = sorted({*self.names, *names})

    def filled(self, record: StepRecord) -> None:
        """Called with every step's record."""
        self.counts["steps"] += 1
        for name in EVENTS:
            self.counts[name] += getattr(record, name)

    def replayed(self, num_steps: int) -> None:
        """Called with the steps of every recording that was run again."""
        self.counts["recordings replayed"] += 1
        self.counts["steps replayed"] += num_steps


def soak(num_steps: int, seed: int, counts: Counter[str]) -> int:
    """Walks until so many steps were scheduled; returns the next seed.

    Raises AssertionError, with the walk's seed, when a rule is broken.
    """
    with tqdm(total=num_steps, unit=" steps", mininterval=1.0, initial=counts["steps"]) as bar:
        while counts["steps"] < num_steps:
            walk = Walk(seed, counts)
            try:
                walk.begin()
                for _ in range(OPERATIONS):
                    walk.operate()
                walk.teardown()
            except Exception as error:
                raise AssertionError(f"the walk with --seed {seed} breaks: {type(error).__name__}: {error}") from error
            seed += 1
            bar.update(counts["steps"] - bar.n)
    return seed


def main() -> int:
    """Prints what happened, and writes it to lab/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first walk; the next one has the next")
    parser.add_argument("--resume", action="store_true", help="go on where the output file stands")
    parser.add_argument("--output", type=Path, default=ROOT / "lab" / "results" / "soak-scheduler.json")
    args = parser.parse_args()
    began = time.monotonic()
    before = json.loads(args.output.read_text()) if args.resume else {"counts": {}, "seconds": 0.0}
    counts = Counter(before["counts"])
    next_seed = soak(args.steps, before.get("next_seed", args.seed), counts)
    result = {
        "what": "random walks over scheduler and KV cache; every invariant after every step",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(before["seconds"] + time.monotonic() - began, 1),
        "next_seed": next_seed,
        "counts": dict(sorted(counts.items())),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    width = max(map(len, counts))
    for name, count in sorted(counts.items()):
        print(f"{name:{width}}  {count:>12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
