"""Traces: when requests arrive, how long they are, what they share. Generated, or read from the Mooncake and BurstGPT
formats. Prompts are segments of content ids: two prompts share a prefix exactly as far as their segments agree.
"""

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from octavo.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens that one of its hash ids stands for
MAX_REQUESTS = 1_000_000

Segment = tuple[int, int]  # content id, tokens


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    time: float  # seconds from the start of the trace
    prompt: tuple[Segment, ...]
    num_output: int
    tenant: str = ""
    priority: int = 0
    answer: int = 0  # content id of what the model will say, so that a later turn can hit it

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return sum(length for _, length in self.prompt)

    def token_ids(self, vocab_size: int | None = None) -> list[int]:
        """The prompt as token ids: random words of a vocabulary, or without one, the content ids themselves."""
        ids: list[int] = []
        for content, length in self.prompt:
            if vocab_size is None:
                ids += [content] * length
            else:
                draw = random.Random(content)
                ids += [draw.randrange(vocab_size) for _ in range(length)]
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a generated trace looks like. Lengths are log-normal; everything follows from the seed.

    Raises:
        ConfigError: a value out of its bounds.
    """

    num_requests: int = 200
    rate: float = 1.0  # requests a second
    burstiness: float = 1.0  # shape of the Gamma gaps between arrivals: 1 is Poisson, below 1 comes in clumps
    burst_size: int = 1  # requests that arrive together
    prompt_median: int = 128
    output_median: int = 64
    sigma: float = 0.8  # of the logarithm of lengths; 0: all equal
    max_prompt: int = 4096
    max_output: int = 1024
    num_tenants: int = 1
    tenant_skew: float = 0.0  # tenant k sends in proportion to (k + 1) ** -skew
    num_priorities: int = 1
    shared_prefix: int = 0  # tokens of a system prompt that all requests of a tenant begin with
    turns: int = 1  # of a conversation: each continues the one before it
    think_time: float = 5.0  # mean seconds between a conversation's turns
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_requests", 1, MAX_REQUESTS),
            ("rate", 1e-6, 1e9),
            ("burstiness", 1e-3, 1e6),
            ("burst_size", 1, 10_000),
            ("prompt_median", 1, 1 << 20),
            ("output_median", 1, 1 << 20),
            ("sigma", 0.0, 5.0),
            ("max_prompt", 1, 1 << 20),
            ("max_output", 1, 1 << 20),
            ("num_tenants", 1, 10_000),
            ("tenant_skew", 0.0, 10.0),
            ("num_priorities", 1, 100),
            ("shared_prefix", 0, 1 << 20),
            ("turns", 1, 1000),
            ("think_time", 0.0, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, not {value:g}")

    def generate(self) -> list[Arrival]:
        """The trace, in the order of arrival. Another rate with the same seed gives the same requests."""
        lengths, gaps = random.Random(self.seed), random.Random(self.seed + 1)
        weights = [(k + 1) ** -self.tenant_skew for k in range(self.num_tenants)]
        arrivals: list[Arrival] = []
        contents, now = iter(range(1, 1 << 31)), 0.0
        while len(arrivals) < self.num_requests:
            now += self.burst_size * gaps.gammavariate(self.burstiness, 1.0 / (self.burstiness * self.rate))
            for _ in range(self.burst_size):
                tenant = lengths.choices(range(self.num_tenants), weights)[0]
                arrivals += self._conversation(now, tenant, lengths, gaps, contents)
        return sorted(arrivals[: self.num_requests], key=lambda arrival: arrival.time)

    def _conversation(
        self, now: float, tenant: int, lengths: random.Random, gaps: random.Random, contents: Iterator[int]
    ) -> Iterator[Arrival]:
        prompt: tuple[Segment, ...] = ()
        if self.shared_prefix:
            prompt = (((1 << 31) + tenant, self.shared_prefix),)
        priority = lengths.randrange(self.num_priorities)
        for turn in range(self.turns):
            prompt = (*prompt, (next(contents), self._length(lengths, self.prompt_median, self.max_prompt)))
            num_output = self._length(lengths, self.output_median, self.max_output)
            answer = next(contents)
            if turn and sum(length for _, length in prompt) > self.max_prompt:
                return
            yield Arrival(now, prompt, num_output, f"t{tenant}", priority, answer)
            prompt = (*prompt, (answer, num_output))
            now += gaps.expovariate(1.0 / self.think_time) if self.think_time else 0.0

    def _length(self, draw: random.Random, median: int, most: int) -> int:
        return max(1, min(most, round(median * draw.lognormvariate(0.0, self.sigma))))


def read_trace(path: Path, *, limit: int = MAX_REQUESTS) -> list[Arrival]:
    """The first `limit` requests of a trace file, by its name: .jsonl is Mooncake's format (timestamp in milliseconds,
    input_length, output_length, hash_ids of 512 tokens), .csv is BurstGPT's (Timestamp in seconds, Request tokens,
    Response tokens).

    Raises:
        ConfigError: no such file, another format, a line that is none of it.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                arrivals = [_mooncake(line, number) for number, line in enumerate(islice(file, limit))]
            elif path.suffix == ".csv":
                arrivals = [_burstgpt(row, n) for n, row in enumerate(islice(csv.DictReader(file), limit))]
            else:
                raise ConfigError(f"{path}: a trace is .jsonl (Mooncake) or .csv (BurstGPT)")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not arrivals:
        raise ConfigError(f"{path}: no requests in it")
    if not all(math.isfinite(arrival.time) for arrival in arrivals):
        raise ConfigError(f"{path}: a time of arrival is no number")
    start = min(arrival.time for arrival in arrivals)
    return sorted((replace(a, time=a.time - start) for a in arrivals), key=lambda arrival: arrival.time)


def _mooncake(line: str, number: int) -> Arrival:
    entry = json.loads(line)
    length, hashes = max(1, int(entry["input_length"])), entry.get("hash_ids") or []
    prompt: list[Segment] = []
    for block in hashes:
        if length > 0:
            prompt.append((int(block) % (1 << 31) + 1, min(MOONCAKE_BLOCK, length)))
            length -= MOONCAKE_BLOCK
    if length > 0:  # beyond its hashes: nobody shares it
        prompt.append(((1 << 31) + number, length))
    return Arrival(entry["timestamp"] / 1000, tuple(prompt), max(1, int(entry["output_length"])))


def _burstgpt(row: dict[str, str], number: int) -> Arrival:
    prompt = ((number + 1, max(1, int(row["Request tokens"]))),)
    return Arrival(float(row["Timestamp"]), prompt, max(1, int(row["Response tokens"])))


def clipped(trace: Sequence[Arrival], max_model_len: int) -> tuple[list[Arrival], int]:
    """The requests that fit the context, and how many do not."""
    fitting = [arrival for arrival in trace if arrival.num_prompt + arrival.num_output <= max_model_len]
    return fitting, len(trace) - len(fitting)
