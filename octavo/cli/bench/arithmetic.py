"""The arithmetic of `bench serve`, and nothing else: from what each request saw to the numbers that are printed.

Definitions are vLLM's. Of one request: TTFT, from send to first token; E2EL, from send to last token;
TPOT = (E2EL - TTFT) / (output tokens - 1); ITL, the gaps between successive chunks. ITLs of all requests are pooled,
the others have one value a request. Goodput counts requests that meet every stated objective, per second.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

METRICS = ("ttft", "tpot", "itl", "e2el")
_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True)
class Outcome:
    """What one request saw. Seconds."""

    prompt_tokens: int
    success: bool = False
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    e2el: float = 0.0
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is but one."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Summary:
    """The spread of one metric, in the unit of its values."""

    mean: float
    median: float
    std: float
    percentiles: tuple[tuple[float, float], ...]  # (percentile, value)


@dataclass(frozen=True, slots=True)
class Report:
    """One run in numbers. `summaries` are milliseconds, by metric."""

    duration: float
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float  # a second, as all of these
    request_goodput: float | None  # requests that met every objective; None without objectives
    output_throughput: float  # generated tokens
    total_token_throughput: float  # prompt and generated tokens
    summaries: dict[str, Summary]


def summarize(values: Sequence[float], percentiles: Sequence[float]) -> Summary:
    """Mean, median, population standard deviation and percentiles; zeros of nothing."""
    from octavo.simulate.outcome import percentile  # not for --help: it brings msgspec

    if not values:
        return Summary(0.0, 0.0, 0.0, tuple((p, 0.0) for p in percentiles))
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    return Summary(mean, percentile(values, 50), std, tuple((p, percentile(values, p)) for p in percentiles))


def report(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> Report:
    """Boils a run down. `goodput`: milliseconds by metric (ttft, tpot, e2el)."""
    done = [o for o in outcomes if o.success]
    values: dict[str, list[float]] = {
        "ttft": [o.ttft for o in done],
        "tpot": [tpot for o in done if (tpot := o.tpot) is not None],
        "itl": [itl for o in done for itl in o.itls],
        "e2el": [o.e2el for o in done],
    }
    num_input, num_output = sum(o.prompt_tokens for o in done), sum(o.output_tokens for o in done)
    return Report(
        duration=duration,
        completed=len(done),
        failed=len(outcomes) - len(done),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        request_throughput=len(done) / duration,
        request_goodput=sum(is_good(o, goodput) for o in done) / duration if goodput else None,
        output_throughput=num_output / duration,
        total_token_throughput=(num_input + num_output) / duration,
        summaries={name: summarize([v * 1000 for v in values[name]], percentiles) for name in METRICS},
    )


def is_good(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    """True when a request met every objective (milliseconds). One token has no TPOT, so it counts as 0, as in vLLM."""
    seen = {"ttft": outcome.ttft, "tpot": outcome.tpot or 0.0, "e2el": outcome.e2el}
    return all(seen[name] * 1000 <= limit for name, limit in goodput.items())


def printed_block(run: Report, shown: Sequence[str], *, max_concurrency: int | None, request_rate: float) -> str:
    """The block that vLLM's `bench serve` prints, line for line."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [_line("Successful requests:", run.completed), _line("Failed requests:", run.failed)]
    if max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", max_concurrency))
    if request_rate != math.inf:
        lines.append(_line("Request rate configured (RPS):", request_rate))
    lines.append(_line("Benchmark duration (s):", run.duration))
    lines.append(_line("Total input tokens:", run.total_input_tokens))
    lines.append(_line("Total generated tokens:", run.total_output_tokens))
    lines.append(_line("Request throughput (req/s):", run.request_throughput))
    if run.request_goodput is not None:
        lines.append(_line("Request goodput (req/s):", run.request_goodput))
    lines.append(_line("Output token throughput (tok/s):", run.output_throughput))
    lines.append(_line("Total token throughput (tok/s):", run.total_token_throughput))
    for name in (name for name in METRICS if name in shown):
        summary = run.summaries[name]
        lines.append(f"{_TITLES[name]:-^50}")
        lines.append(_line(f"Mean {name.upper()} (ms):", summary.mean))
        lines.append(_line(f"Median {name.upper()} (ms):", summary.median))
        lines += [_line(f"P{p:g} {name.upper()} (ms):", value) for p, value in summary.percentiles]
    return "\n".join([*lines, "=" * 50])


def result_keys(run: Report) -> dict[str, Any]:
    """The numbers of a run under the keys that vLLM saves them under."""
    totals = ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput")
    rates = ("request_goodput", "output_throughput", "total_token_throughput")
    result: dict[str, Any] = {name: getattr(run, name) for name in (*totals, *rates)}
    for name in METRICS:
        summary = run.summaries[name]
        result |= {f"mean_{name}_ms": summary.mean, f"median_{name}_ms": summary.median, f"std_{name}_ms": summary.std}
        result |= {f"p{p:g}_{name}_ms": value for p, value in summary.percentiles}
    return result


def _line(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
