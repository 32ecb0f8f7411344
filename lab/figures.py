"""What is measured of an engine: each figure is a name, a unit, and the values of its repetitions."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lab.engines import Batch, Engine, HttpEngine, OctavoEngine
from lab.overheads import SHARES, run
from lab.workloads import W2_CONCURRENCY, Work, long_context, w1, w2, w3, w4
from octavo.cli.bench.arrivals import send_times
from octavo.simulate.outcome import percentile

SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 0}
LOAD = 0.7  # of what the engine was seen to do at most
NUM_ARRIVALS = 96
W2_NAME = "W2 output"

Value = tuple[str, str, float]  # figure, unit, value


@dataclass(slots=True)
class Figure:
    """Values of one figure over repetitions."""

    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        digits = 0 if self.median >= 100 else 2 if self.median < 10 else 1
        middle = f"{self.median:,.{digits}f}"
        return middle if len(self.values) == 1 else f"{middle} ({low:,.{digits}f}-{high:,.{digits}f})"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the bench: what it does with an engine in one repetition.

    `ours`: only engines of ours are asked. `warm_up`: a repetition before the first, not counted.
    """

    name: str
    title: str
    measure: Callable[[Engine, int, Sequence[int]], Iterator[Value]]
    repetitions: int
    ours: bool = False
    warm_up: bool = True


def one_stream(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """W1."""
    seen = engine.run(w1(repetition), 1).timed[0]
    yield "W1 decode", "tok/s", (seen.num_tokens - 1) / (seen.end - seen.first)
    yield "W1 time to first token", "ms", (seen.first - seen.start) * 1e3


def one_stream_text(engine: Engine, repetition: int, text: Sequence[int]) -> Iterator[Value]:
    """W1 on windows of a real text."""
    seen = engine.run(w1(repetition, text), 1).timed[0]
    yield "W1 decode, real text", "tok/s", (seen.num_tokens - 1) / (seen.end - seen.first)
    yield "W1 time to first token, real text", "ms", (seen.first - seen.start) * 1e3


def batch(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """W2, not streamed."""
    yield from _rate(W2_NAME, engine, _w2(repetition), stream=False)


def batch_ways(engine: Engine, repetition: int, text: Sequence[int]) -> Iterator[Value]:
    """W2 streamed, on real text, and sampled beside greedy of the same repetition."""
    works = [_w2(repetition + 100 * way) for way in range(1, 4)]
    yield from _rate(f"{W2_NAME}, streamed", engine, works[0], stream=True)
    yield from _rate(f"{W2_NAME}, real text", engine, _w2(repetition, text), stream=False)
    greedy = engine.run(works[1], W2_CONCURRENCY, stream=False)
    sampled = engine.run(works[2], W2_CONCURRENCY, stream=False, sampling=SAMPLED)
    yield f"{W2_NAME}, sampled", "tok/s", sampled.num_tokens / sampled.seconds
    yield "W2 sampled / greedy beside it", "", greedy.seconds / sampled.seconds


def prompt(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """W3."""
    work = w3(repetition)
    yield "W3 prompt", "tok/s", len(work[0].prompt) / engine.run(work, 1, stream=False).seconds


def shared_prefix(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """W4."""
    works = w4(repetition) if repetition >= 0 else w4(repetition)[:4]
    yield "W4 wall", "s", engine.run(works, 32, stream=False).seconds


def long_decode(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """The last tokens of a context of 8,192."""
    seen = engine.run(long_context(repetition), 1).timed[0]
    yield "decode at 8k context", "tok/s", (seen.num_tokens - 1) / (seen.end - seen.first)
    yield "prompt of 7,936", "tok/s", len(long_context()[0].prompt) / (seen.first - seen.start)


def arrivals(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """Poisson arrivals at a share of the rate that W2 streamed runs at; lengths as in W2."""
    assert isinstance(engine, HttpEngine)
    full = engine.run(_w2(600), W2_CONCURRENCY)
    rate = LOAD * len(full.timed) / full.seconds
    works = (w2(601 + repetition) + w2(602 + repetition))[:NUM_ARRIVALS]
    times = send_times(len(works), request_rate=rate, seed=repetition)
    seen = engine.run(works, len(works), send_at=times)
    firsts = [(t.first - t.start) * 1e3 for t in seen.timed]
    gaps = [gap * 1e3 for t in seen.timed for gap in t.gaps]
    yield "arrivals: rate", "req/s", rate
    for rank in (50, 90, 99):
        yield f"arrivals: time to first token, p{rank}", "ms", percentile(firsts, rank)
    for rank in (50, 90, 99):
        yield f"arrivals: between tokens, p{rank}", "ms", percentile(gaps, rank)


def front(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """Processor time of the first process (HTTP and text) for each token of W2 streamed."""
    before = _busy_seconds(engine)
    seen = engine.run(_w2(repetition + 400), W2_CONCURRENCY)
    whole, kernel = (
        (now - then) / seen.num_tokens * 1e6 for then, now in zip(before, _busy_seconds(engine), strict=True)
    )
    yield "front, a streamed token", "us", whole
    yield "front, of it inside the kernel (TCP)", "us", kernel


def overheads(engine: Engine, repetition: int, _: Sequence[int]) -> Iterator[Value]:
    """The engine's own share of a step, in a process beside the server."""
    assert isinstance(engine, OctavoEngine)
    for streams in (32, 1):
        shares = asyncio.run(run(engine.options, streams))
        label = f"engine a step, {streams} stream{'s' * (streams > 1)}"
        for share in SHARES:
            yield f"{label}: {share}", "ms", shares[share] * 1e3
        yield label, "ms", sum(shares[share] for share in SHARES) * 1e3
        yield f"native a step, {streams} stream{'s' * (streams > 1)}", "ms", shares["native"] * 1e3


def _w2(repetition: int, text: Sequence[int] | None = None) -> list[Work]:
    """W2; the warm-up is an eighth of it, for a whole one takes some engines a minute."""
    works = w2(repetition, text)
    return works if repetition >= 0 else works[:8]


def _rate(name: str, engine: Engine, works: list[Work], *, stream: bool) -> Iterator[Value]:
    seen: Batch = engine.run(works, W2_CONCURRENCY, stream=stream)
    yield name, "tok/s", seen.num_tokens / seen.seconds


def _busy_seconds(engine: Engine) -> tuple[float, float]:
    """Processor time of the process that was started, all threads: in all, and of that in the kernel. Seconds."""
    process = engine.processes()[0]
    whole = sum(int(task.read_text().split()[0]) for task in process.glob("task/*/schedstat")) / 1e9
    kernel = int((process / "stat").read_text().rpartition(")")[2].split()[12]) / os.sysconf("SC_CLK_TCK")
    return whole, kernel


# Those that peers take part in come first: nobody is kept stopped for long and then asked again.
PARTS = {
    part.name: part
    for part in (
        Part("W1", "one stream, 128 in, 128 out", one_stream, 5),
        Part("W2", "64 requests, 32 at once", batch, 3),
        Part("W3", "a prompt of 1,024", prompt, 5),
        Part("W4", "32 requests that share 512 tokens", shared_prefix, 3),
        Part("W1text", "one stream on real text", one_stream_text, 5, ours=True),
        Part("W2ways", "W2 streamed, real text, sampled", batch_ways, 3, ours=True, warm_up=False),
        Part("long", "decode at 8k context", long_decode, 3, ours=True, warm_up=False),
        Part("arrivals", "Poisson arrivals at 70 % load", arrivals, 1, ours=True, warm_up=False),
        Part("front", "processor time of the front", front, 2, ours=True, warm_up=False),
        Part("overheads", "what a step costs beside the model", overheads, 2, ours=True, warm_up=False),
    )
}
