"""`python -m lab.cpu`: the CPU workloads over HTTP against `octavo serve`, as a table and as JSON.

Server and client share the machine, as they would for a user without a GPU. Nothing else should be running. Each
configuration gets a fresh server; figures are medians with their range.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab.machine import describe_machine
from lab.workloads import W2_CONCURRENCY, Work, w1, w2, w3, w4
from octavo.cli.client import Server, fetch_json, raise_for_status, request

RESULTS = Path(__file__).parent / "results"
SERVE = ["--max-model-len", "2048", "--max-num-seqs", "32", "--kv-cache-memory-bytes", "400MiB", "--port", "0"]
CONFIGURATIONS = {
    "gguf": [],
    "bf16": ["--dtype", "bfloat16"],
    "float32": ["--dtype", "float32"],
}


@dataclass(slots=True)
class Figures:
    """Values of one figure over repetitions."""

    unit: str
    values: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        digits = 0 if self.unit == "tok/s" and min(self.values) >= 100 else 2 if self.unit == "s" else 1
        low, high = min(self.values), max(self.values)
        return f"{statistics.median(self.values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


@dataclass(slots=True)
class Timed:
    """What one request saw; seconds on this process's clock."""

    start: float
    first: float
    end: float
    num_tokens: int


class Run:
    """One configuration: its server, and the figures measured on it."""

    def __init__(self, model: str, name: str, repetitions: int) -> None:
        self.model = model
        self.name = name
        self.repetitions = repetitions
        self.figures: dict[str, Figures] = {}
        self.wrong_lengths = 0
        self.server: Server
        self.process: subprocess.Popen[str]

    def add(self, name: str, unit: str, value: float) -> None:
        """One more value of a figure."""
        self.figures.setdefault(name, Figures(unit)).values.append(value)

    async def measure(self, only: str, say: Callable[[str], None]) -> None:
        """Starts the server, runs the workloads, stops it."""
        await self._start_up(say)
        try:
            steps: dict[str, Callable[[], Awaitable[None]]] = {
                "1": self._w1,
                "2": self._w2,
                "3": self._w3,
                "4": self._w4,
            }
            for number, step in steps.items():
                if number in only:
                    say(f"{self.name}: W{number}")
                    await step()
            self.add("peak memory of all processes", "MiB", peak_memory(self.process.pid))
        finally:
            self.process.terminate()
            self.process.communicate(timeout=30)

    async def _start_up(self, say: Callable[[str], None]) -> None:
        """A few starts to the first token; the last server stays."""
        for attempt in range(self.repetitions + 1):
            say(f"{self.name}: start {attempt}")
            began = time.perf_counter()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "octavo", "serve", self.model, *SERVE, *CONFIGURATIONS[self.name]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.server = Server.parse(await asyncio.to_thread(self._url))
            await self._call(Work([1000, 2000, 3000], 1), stream=True)
            if attempt:  # the first one warms the page cache
                self.add("new process to first token", "s", time.perf_counter() - began)
            if attempt < self.repetitions:
                self.process.terminate()
                self.process.communicate(timeout=30)
        listed = await fetch_json(self.server, "GET", "/v1/models")
        assert listed["data"][0]["id"] == self.model

    def _url(self) -> str:
        lines = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.append(line)
            if match := re.search(r"Ready in .*(http://\S+)/v1", line):
                return match[1]
        raise SystemExit("the server ended:\n" + "".join(lines[-20:]))

    async def _w1(self) -> None:
        for repetition in range(-1, self.repetitions + 2):
            timed = await self._call(w1(repetition)[0], stream=True)
            if repetition >= 0:
                self.add("W1 decode", "tok/s", (timed.num_tokens - 1) / (timed.end - timed.first))
                self.add("W1 time to first token", "ms", (timed.first - timed.start) * 1e3)

    async def _w2(self) -> None:
        await self._batch(w2(-1)[:32], W2_CONCURRENCY, stream=False)
        for stream in (False, True):
            name = "W2 output, streamed" if stream else "W2 output"
            for repetition in range(self.repetitions):
                seconds, timed = await self._batch(w2(repetition + 100 * stream), W2_CONCURRENCY, stream=stream)
                self.add(name, "tok/s", sum(t.num_tokens for t in timed) / seconds)
        sampled = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 0}
        for repetition in range(self.repetitions):
            seconds, timed = await self._batch(w2(repetition + 200), W2_CONCURRENCY, stream=False, **sampled)
            self.add("W2 output, sampled", "tok/s", sum(t.num_tokens for t in timed) / seconds)

    async def _w3(self) -> None:
        for repetition in range(-1, self.repetitions + 2):
            work = w3(repetition)[0]
            timed = await self._call(work, stream=False)
            if repetition >= 0:
                self.add("W3 prompt", "tok/s", len(work.prompt) / (timed.end - timed.start))

    async def _w4(self) -> None:
        for repetition in range(-1, self.repetitions):
            seconds, _ = await self._batch(w4(repetition), 32, stream=False)
            if repetition >= 0:
                self.add("W4 wall", "s", seconds)

    async def _batch(
        self, works: list[Work], at_once: int, *, stream: bool, **sampling: float
    ) -> tuple[float, list[Timed]]:
        gate = asyncio.Semaphore(at_once)

        async def one(work: Work) -> Timed:
            async with gate:
                return await self._call(work, stream=stream, **sampling)

        began = time.perf_counter()
        timed = await asyncio.gather(*(one(work) for work in works))
        return time.perf_counter() - began, list(timed)

    async def _call(self, work: Work, *, stream: bool, **sampling: float) -> Timed:
        body = {
            "prompt": work.prompt,
            "max_tokens": work.num_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **sampling,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        start = time.perf_counter()
        first = end = None
        num_tokens = 0
        async with request(self.server, "POST", "/v1/completions", body) as response:
            await raise_for_status(response, self.server.url)
            if not stream:
                answer = json.loads(await response.body())
                first = end = time.perf_counter()
                num_tokens = answer["usage"]["completion_tokens"]
            else:
                async with aclosing(response.events()) as events:  # type: ignore[type-var]
                    async for event in events:
                        if event == b"[DONE]":
                            break
                        chunk = json.loads(event)
                        if chunk["choices"] and chunk["choices"][0]["text"]:
                            end = time.perf_counter()
                            first = first or end
                        if chunk.get("usage"):
                            num_tokens = chunk["usage"]["completion_tokens"]
        self.wrong_lengths += num_tokens != work.num_out
        end = end or time.perf_counter()
        return Timed(start, first or end, end, num_tokens)


def peak_memory(pid: int) -> float:
    """The sum of peak resident memory over a process and its descendants, in MiB."""
    total, todo = 0, [pid]
    while todo:
        process = Path(f"/proc/{todo.pop()}")
        total += int(re.search(r"VmHWM:\s*(\d+)", (process / "status").read_text())[1])  # type: ignore[index]
        todo += [int(child) for t in process.glob("task/*/children") for child in t.read_text().split()]
    return total / 1024


def show(model: str, runs: list[Run]) -> None:
    """The table: a row a figure, a column a configuration."""
    table = Table(title=f"{model}, over HTTP: median (range)", title_justify="left")
    table.add_column("")
    table.add_column("unit")
    for run in runs:
        table.add_column(run.name, justify="right")
    for name, figures in runs[0].figures.items():
        table.add_row(name, figures.unit, *(str(run.figures[name]) for run in runs))
    Console(width=120).print(table)


def main() -> int:
    """Measures, prints, and writes lab/results/cpu-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=["gguf", "bf16"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default="1234", help="which workloads, say 13")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    runs = [Run(options.model, name, options.repetitions) for name in options.configurations]
    status = Console(stderr=True)
    for run in runs:
        asyncio.run(run.measure(options.only, lambda text: status.print(text, style="dim")))
    show(options.model, runs)
    if wrong := sum(run.wrong_lengths for run in runs):
        status.print(f"{wrong} answers had another length than asked for: these figures do not count", style="red")
        return 1
    if not options.no_save:
        save(options.model, runs)
    return 0


def save(model: str, runs: list[Run]) -> None:
    """All values, with the command, the machine and the date."""
    result = {
        "what": f"CPU workloads, {model}",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python -m lab.cpu " + " ".join(sys.argv[1:]),
        "server": ["octavo", "serve", model, *SERVE],
        "runs": {run.name: {n: {"unit": f.unit, "values": f.values} for n, f in run.figures.items()} for run in runs},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cpu-{model}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
