"""Steps in flight, timed: is step N + 1 launched before step N's tokens are copied? The stage `trace` of gpu_check.

The host's times are its own clock's, the card's are those of events; an event on an idle card, which the host sees
pass, joins the two. Without any clock the host also asks, right after launch N + 1, whether copy N has ended.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

Report = Callable[..., None]
NUM_TOKENS, FIRST, COUNT = 64, 16, 32  # of a request; the steps that are traced: those before are not steady yet
SHOWN = 8
LEAST = 0.95  # of the steps
TIMES = ("launch", "launched", "reached", "copied", "taken")
WORKS = ((1, 2), (64, 2), (1, 1))  # requests, steps in flight; with one, no step is launched that early


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class Step:
    """Host times in seconds; `reached` and `copied` are when the card came to the step, and had copied its tokens."""

    launch: float
    launched: float = 0.0
    taken: float = 0.0  # by the host
    reached: torch.cuda.Event = field(default_factory=_event)
    copied: torch.cuda.Event = field(default_factory=_event)
    ran_on: bool = False  # when the next one had been launched


class Tracer:
    """Stands around a runtime's sample_later(), which launches a step, its choice of tokens, and their copy."""

    def __init__(self, runtime: Any) -> None:
        self.steps: list[Step] = []
        self._runtime, self._launch = runtime, runtime.sample_later
        self._origin, self._origin_at, self.uncertain = _joined_clocks()
        runtime.sample_later = self._sample_later

    def _sample_later(self, sampling: Any) -> Callable[[], Any]:
        step = Step(time.perf_counter())
        step.reached.record()
        wait = self._launch(sampling)
        step.copied.record()
        step.launched = time.perf_counter()
        if self.steps:
            self.steps[-1].ran_on = not self.steps[-1].copied.query()
        self.steps.append(step)

        def waited() -> Any:
            output = wait()
            step.taken = time.perf_counter()
            return output

        return waited

    def close(self) -> list[dict[str, Any]]:
        """Lets the runtime be; the steps, in milliseconds since the first was launched."""
        del self._runtime.sample_later  # of the instance; the class's is there again
        torch.cuda.synchronize()
        steps = self.steps[FIRST : FIRST + COUNT]

        def of_card(event: torch.cuda.Event) -> float:
            seconds: float = self._origin_at + self._origin.elapsed_time(event) / 1e3
            return seconds

        rows = [(step.launch, step.launched, of_card(step.reached), of_card(step.copied), step.taken) for step in steps]
        first = rows[0][0]
        return [
            {name: round((at - first) * 1e3, 3) for name, at in zip(TIMES, row, strict=True)} | {"ran_on": step.ran_on}
            for row, step in zip(rows, steps, strict=True)
        ]


def _joined_clocks() -> tuple[torch.cuda.Event, float, float]:
    """An event, the host's time when it passed, and how wrong that may be, in seconds: the best of some."""
    found = []
    for _ in range(50):
        torch.cuda.synchronize()
        event, before = _event(), time.perf_counter()
        event.record()
        event.synchronize()
        after = time.perf_counter()
        found.append((after - before, after, event))
    uncertain, at, event = min(found, key=lambda one: one[0])
    return event, at - uncertain / 2, uncertain / 2


def trace_overlap(llm: Any, shape: str, num_requests: int, depth: int, report: Report) -> dict[str, Any]:
    """Decodes requests with so many steps in flight; returns what a file keeps.

    Raises:
        AssertionError: steps were not launched as deep as that says.
    """
    from octavo import SamplingParams
    from octavo.messages import AddRequest

    core, runtime = llm.core, llm.core._executor.worker.runtime
    tracer, replays = Tracer(runtime), runtime.num_replays
    before = core._depth, core.scheduler._budget.max_run_ahead
    core._depth, core.scheduler._budget.max_run_ahead = depth, depth - 1
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS)
    for i in range(num_requests):
        prompt = [5 + (i * 31 + n * 7) % 1000 for n in range(100)]
        core.handle(AddRequest(str(i), prompt, params, NUM_TOKENS, seed=i))
    while core.has_work:
        core.step()
    replays = runtime.num_replays - replays
    steps = tracer.close()
    core._depth, core.scheduler._budget.max_run_ahead = before
    pairs = list(pairwise(steps))
    ahead = [one["copied"] - after["launched"] for one, after in pairs]
    asked = sum(one["ran_on"] for one, _ in pairs) / len(pairs)
    timed = sum(gap > 0 for gap in ahead) / len(pairs)
    idle = statistics.median(after["reached"] - one["copied"] for one, after in pairs)
    step_ms = (steps[-1]["copied"] - steps[0]["copied"]) / len(pairs)
    name = f"{shape}, {num_requests} requests, {depth} in flight"
    report(
        f"trace {name}", pairs=len(pairs), replays=replays, launched_before_copy=timed, asked=asked,
        ahead_ms=statistics.median(ahead), step_ms=step_ms, idle_ms=idle, clocks_us=tracer.uncertain * 1e6,
    )  # fmt: skip
    print(table(steps), flush=True)
    assert len(pairs) == COUNT - 1
    assert replays >= COUNT
    is_deep = min(asked, timed) >= LEAST if depth > 1 else max(asked, timed) == 0
    assert is_deep, f"{name}: {timed:.0%} of the steps launched before the copy of the one before had ended"
    rows = [[step[name] for name in TIMES] for step in steps]
    return {"shape": shape, "requests": num_requests, "in_flight": depth, "step, ms": TIMES, "steps": rows}


def trace_shapes(shapes: Sequence[str], engine: dict[str, Any], report: Report, guarded: Any, out: Path) -> None:
    """Models of random weights, one after the other; the times go to a file in `out`."""
    from octavo import LLM

    traces: list[str] = []
    folder = Path(__file__).resolve().parents[1] / "lab" / "shapes"
    for shape in shapes:
        llm = LLM(str(folder / shape), **{**engine, "num_gpu_blocks_override": 1024})
        for requests, depth in WORKS:

            def trace(llm: Any = llm, shape: str = shape, requests: int = requests, depth: int = depth) -> None:
                traces.append(json.dumps(trace_overlap(llm, shape, requests, depth, report)))

            guarded(f"trace {shape}", trace)
        llm.close()
    head = {
        "what": "steps of decoding requests, milliseconds: when the host began to launch one and had launched it, when "
        "the card reached it and had copied its tokens, when the host took them",
        "command": "python tools/gpu_check.py trace", "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name(),
    }  # fmt: skip
    lines = ",\n".join(traces)
    (out / "gpu-overlap-trace.json").write_text(f'{json.dumps(head)[:-1]}, "traces": [\n{lines}\n]}}\n')


def table(steps: list[dict[str, Any]]) -> str:
    """The first of the steps, milliseconds."""
    lines = [
        f"{'step':>4} {'launch':>9} {'launched':>9} {'copied':>9} {'taken':>9} {'next launched before the copy by':>33}"
    ]
    for number, (one, after) in enumerate(pairwise(steps[: SHOWN + 1])):
        times = " ".join(f"{one[name]:9.3f}" for name in ("launch", "launched", "copied", "taken"))
        lines.append(f"{number:4} {times} {one['copied'] - after['launched']:33.3f}")
    return "\n".join(lines)
