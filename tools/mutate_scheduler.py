"""Plants bugs in a copy of scheduler and KV cache, one at a time, and sees whether the random walks notice.

    python tools/mutate_scheduler.py

A bug that survives is a rule that nobody checks: the exit status is 1.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.machine import describe_machine  # noqa: E402

STEPS = 20_000  # of random walks, at most, per bug
OUTPUT = ROOT / "lab" / "results" / "mutations-scheduler.json"
SCHEDULER, ROWS, BUDGET, DOOR, DELTAS = (
    f"octavo/scheduler/{name}.py" for name in ("scheduler", "rows", "budget", "door", "deltas")
)
POOL, MANAGER, HOST, LRU = (f"octavo/kvcache/{name}.py" for name in ("block_pool", "manager", "host", "eviction"))


@dataclass(frozen=True, slots=True)
class Bug:
    """`old`, which must occur in `file`, becomes `new` at its first place behind `after`."""

    name: str
    file: str
    old: str
    new: str
    after: str = ""


BUGS = (
    Bug(
        "a decode goes on past its last block",
        SCHEDULER,
        "if start < request.num_slots",
        "if start <= request.num_slots",
    ),
    Bug("a result of an old epoch is taken", SCHEDULER, "if request.epoch != item.epoch:", "if False:", "def update"),
    Bug("preemption and abort do not raise the epoch", ROWS, "request.epoch += 1", "pass", "def release"),
    Bug(
        "preemption keeps the computed count",
        ROWS,
        "request.num_computed_tokens = request",
        "request.row = request",
        "def release",
    ),
    Bug("a preempted request is forgotten", SCHEDULER, "self.policy.put_back(request)", "pass", "def _preempt"),
    Bug("a row is not given back", ROWS, "heapq.heappush(self._free, request.row)", "pass"),
    Bug("a failed step leaves its blocks findable", SCHEDULER, "self.kv.unhash(step.hashed)", "pass", "def fail"),
    Bug(
        "a stop token counts one token early",
        DELTAS,
        "len(token_ids) - num_prompt > request.params.min_tokens",
        "True",
    ),
    Bug("run-ahead passes max_tokens", SCHEDULER, "start + 1 >= request.max_length", "start >= request.max_length"),
    Bug("who needs its token runs ahead", BUDGET, "return 0", "return self.max_run_ahead", "def max_pending"),
    Bug("who fails alone is tried for ever", SCHEDULER, "if request.retry_alone:", "if False:", "def fail"),
    Bug("an abort frees what others share", POOL, "refs[block] = count = refs[block] - 1", "refs[block] = count = 0"),
    Bug("a hit stays evictable", POOL, "del self._cached[block]", "pass", "def touch"),
    Bug("a block is handed out twice", POOL, "blocks.append(free.pop())", "blocks.append(free[-1])"),
    Bug("an evicted prefix is still found", POOL, "del holders[digest]", "pass", "def _evict"),
    Bug("a hit is still the next to go", LRU, "self._behind[before], self._before[behind]", "_, self._before[behind]"),
    Bug(
        "a block is found before its last token is computed",
        ROWS,
        "hash_full(request, request.num_tokens - 1)",
        "hash_full(request, request.num_tokens)",
    ),
    Bug("a hit covers the last token", MANAGER, "(request.num_tokens - 1) //", "request.num_tokens //"),
    Bug("a fork writes into its parent's block", MANAGER, "self.host.copies.append((borrowed, blocks[0]))", "pass"),
    Bug("a window gives back a block too early", MANAGER, "position - window + 1)", "position - window + 2)"),
    Bug(
        "a window hit lacks its first block",
        MANAGER,
        "< num_blocks - self._first_seen(num_blocks * self.block_size, window)",
        "< num_blocks - self._first_seen(num_blocks * self.block_size, window) - 1",
    ),
    Bug(
        "a block is saved over one that is being read",
        HOST,
        "self._blocks.pop(key) for key",
        "self._blocks[key] for key",
    ),
    Bug("a failed step's copies are still found", MANAGER, "self.host.drop(key)", "pass", "def unhash"),
    Bug("what comes back from the host is not copied", HOST, "self.copies.append((source, target))", "pass"),
    Bug("the oldest may be preempted", SCHEDULER, " + (request is order[0])", ""),
    Bug("the queue holds one too many", DOOR, "num_waiting >= self._max_num_reqs", "num_waiting > self._max_num_reqs"),
    Bug("a deadline passes unseen", DOOR, "self._deadlines[0][0] <= now", "self._deadlines[0][0] <= now - 5"),
)


def plant(bug: Bug, folder: Path) -> None:
    """Copies what the walks need into `folder`, with the bug. Raises SystemExit where its place is gone."""
    for name in ("octavo", "tests/unit", "lab", "tools"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "results", "shapes")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    path = folder / bug.file
    before, mark, rest = path.read_text().partition(bug.after) if bug.after else ("", "", path.read_text())
    if bug.old not in rest:
        raise SystemExit(f"{bug.name}: {bug.old!r} is not in {bug.file} any more: plant it elsewhere")
    path.write_text(before + mark + rest.replace(bug.old, bug.new, 1))


def hunt(bug: Bug) -> dict[str, object]:
    """Walks over the planted bug until it shows."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(bug, folder)
        walk = subprocess.run(
            [sys.executable, "tools/soak_scheduler.py", "--steps", str(STEPS), "--output", "out.json"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": name},
            capture_output=True,
            text=True,
        )
    last = walk.stderr.strip().splitlines()[-1] if walk.returncode else ""
    seconds = round(time.monotonic() - began, 1)
    return {"bug": bug.name, "file": bug.file, "caught": "breaks: " in last, "seconds": seconds, "by": last[:200]}


def main() -> int:
    """Hunts every bug, prints a table and writes it down."""
    found = [hunt(bug) for bug in tqdm(BUGS, unit=" bugs")]
    width = max(len(bug.name) for bug in BUGS)
    for row in found:
        print(f"{row['bug']:{width}}  {'caught' if row['caught'] else 'SURVIVES':8}  {row['seconds']:>5} s")
    survivors = sum(not row["caught"] for row in found)
    print(f"{len(found) - survivors} of {len(found)} bugs caught within {STEPS:,} steps of random walks each")
    result = {
        "what": "planted bugs that the random walks notice",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python tools/mutate_scheduler.py",
        "rows": found,
    }
    OUTPUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
