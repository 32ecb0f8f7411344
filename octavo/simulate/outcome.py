"""What a run brought, simulated or real, in the field's figures: one definition for both, so that they compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from octavo.messages import RequestDelta, StepRecord
from octavo.scheduler.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from octavo.simulate.trace import Arrival


@dataclass(slots=True)
class Seen:
    """What one request saw; seconds from the start of the trace."""

    arrival: Arrival
    times: list[float] = field(default_factory=list)  # of each token
    finished: bool = False
    refused: bool = False

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.times[0] - self.arrival.time

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(slots=True)
class Outcome:
    """All requests of a run, and its steps."""

    seen: list[Seen]
    records: list[StepRecord]

    def take(self, deltas: Iterable[RequestDelta], now: float) -> None:
        """Books what one step brought at `now`; request ids are places in the trace."""
        for delta in deltas:
            seen = self.seen[int(delta.request_id)]
            seen.times += [now] * len(delta.token_ids)
            if delta.finish_reason is not None:
                seen.finished = delta.error is None
                seen.refused = delta.error is not None

    @property
    def seconds(self) -> float:
        """From the start of the trace to the last token."""
        return max((seen.times[-1] for seen in self.seen if seen.times), default=0.0)

    def total(self, name: str) -> int:
        """The sum of one count over the steps."""
        return sum(getattr(record, name) for record in self.records)

    def figures(self, *, ttft: float, itl: float) -> dict[str, float]:
        """Throughput, goodput against targets in seconds (a first token within `ttft`, then on average one every
        `itl`), percentiles in milliseconds, fairness, and the shares of computed tokens that were waste or saved."""
        done = [seen for seen in self.seen if seen.finished]
        first = [seen.ttft for seen in done]
        gaps = [gap for seen in done for gap in seen.gaps]
        good = [s for s in done if s.ttft <= ttft and sum(s.gaps) <= itl * max(len(s.times) - 1, 0)]
        seconds = self.seconds or 1.0
        return {
            "requests/s": len(done) / seconds,
            "output tokens/s": sum(len(seen.times) for seen in done) / seconds,
            "goodput requests/s": len(good) / seconds,
            "within both targets %": 100 * len(good) / max(len(self.seen), 1),
            "TTFT p50 ms": 1000 * percentile(first, 50),
            "TTFT p99 ms": 1000 * percentile(first, 99),
            "ITL p50 ms": 1000 * percentile(gaps, 50),
            "ITL p99 ms": 1000 * percentile(gaps, 99),
            "Jain fairness": self.fairness(),
            "preemptions": float(self.total("num_preempted")),
            "recomputed %": 100 * self.total("num_recomputed_tokens") / max(self.total("num_tokens"), 1),
            "cache hits %": 100 * self.total("prefix_hits") / max(self.total("prefix_queries"), 1),
            "refused": float(sum(seen.refused for seen in self.seen)),
        }

    def fairness(self) -> float:
        """Jain's index of what tenants got while requests still arrived, each against its max-min fair share of all
        that was served then. 1: everybody got its share; 1/n: one of n got everything."""
        end = max(seen.arrival.time for seen in self.seen)
        got: dict[str, float] = {}
        wanted: dict[str, float] = {}
        for seen in self.seen:
            arrival = seen.arrival
            tokens = sum(time <= end for time in seen.times)
            service = PROMPT_WEIGHT * arrival.num_prompt + OUTPUT_WEIGHT * tokens if tokens else 0.0
            demand = PROMPT_WEIGHT * arrival.num_prompt + OUTPUT_WEIGHT * arrival.num_output
            got[arrival.tenant] = got.get(arrival.tenant, 0.0) + service
            wanted[arrival.tenant] = wanted.get(arrival.tenant, 0.0) + demand
        shares = max_min_shares(wanted, sum(got.values()))
        ratios = [got[tenant] / share for tenant, share in shares.items() if share > 0]
        square_sum = sum(ratio * ratio for ratio in ratios)
        return sum(ratios) ** 2 / (len(ratios) * square_sum) if square_sum else 1.0


def max_min_shares(wanted: dict[str, float], total: float) -> dict[str, float]:
    """Splits `total` so that nobody gets more than wanted, and the smallest shares are as large as can be."""
    shares: dict[str, float] = {}
    for place, tenant in enumerate(sorted(wanted, key=wanted.__getitem__)):
        shares[tenant] = min(wanted[tenant], total / (len(wanted) - place))
        total -= shares[tenant]
    return shares


def percentile(values: Sequence[float], p: float) -> float:
    """The value below which `p` percent lie, between neighbours by a straight line (numpy's default); 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * p / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
