"""A fake of the computing half for scheduler tests: a pool of slots, rows, and a "model" that can only see its KV.

The KV of a position is a number made of all tokens up to it, so wrong sharing, a stale block or a lost write shows:
every step checks that each row sees exactly its own prefix through its block table. The next token is made of what
lies in the last slot, so it cannot be right by luck either.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.step import ModelRunnerOutput, NewRow, ScheduledRow, SchedulerOutput, TokenLogprobs

GARBAGE = -1
VOCAB = 13


def extend(kv: int, token: int) -> int:
    """The KV of the position that holds `token`, after a prefix whose last position has `kv` (0 for none)."""
    return hash((kv, token)) & 0xFFFFFFFFFFFF


def kv_of(token_ids: list[int]) -> list[int]:
    """The KV of every position."""
    values, kv = [], 0
    for token in token_ids:
        kv = extend(kv, token)
        values.append(kv)
    return values


def next_token(kv: int) -> int:
    """The "model"."""
    return (kv >> 7) % VOCAB


def likeliest(kv: int, count: int) -> list[tuple[int, float]]:
    """The "model's" most likely next tokens with their log probabilities, best first; no two are equal."""
    scores = sorted(((hash((kv, token, 7)) % 9973) / 1000 + token / 1e6, token) for token in range(VOCAB))
    return [(token, -score) for score, token in scores[:count]]


def naive(
    prompt: list[int],
    max_tokens: int,
    max_model_len: int = 1 << 30,
    stop_ids: frozenset[int] = frozenset(),
    min_tokens: int = 0,
) -> tuple[list[int], str]:
    """What a loop without scheduler, blocks or batch generates, and why it ends."""
    kv = kv_of(prompt)[-1]
    generated: list[int] = []
    while True:
        token = next_token(kv)
        kv = extend(kv, token)
        generated.append(token)
        if token in stop_ids and len(generated) > min_tokens:
            return generated, "stop"
        if len(generated) >= max_tokens or len(prompt) + len(generated) >= max_model_len:
            return generated, "length"


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    stop_ids: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    stop_token_ids: list[int] | None = None,
    cache_salt: str | None = None,
    needs_host_token: bool = False,
    fork_of: str | None = None,
    priority: int = 0,
    tenant: str = "",
    weight: float = 1.0,
    arrival: float = 0.0,
    timeout: float | None = None,
) -> Request:
    """A Request without a client."""
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            presence_penalty=0.5 if needs_host_token else 0.0,
        ),
        stop_ids=stop_ids | frozenset(stop_token_ids or ()),
        max_tokens=max_tokens,
        arrival_time=arrival,
        priority=priority,
        tenant=tenant,
        weight=weight,
        deadline=None if timeout is None else arrival + timeout,
        cache_salt=cache_salt,
        fork_of=fork_of,
    )


@dataclass
class _Row:
    request_id: str
    epoch: int
    token_ids: list[int]
    tables: list[list[int]]  # per KV group
    num_computed: int
    num_logprobs: int


def kv_in(group: int, value: int) -> int:
    """What a KV group keeps of a position: a mistake between groups shows."""
    return value ^ (group << 50)


class FakeExecutor:
    """Executes steps in the order they are published; results wait in a queue. A step with a `guilty` Request fails
    half-way, and so does every step behind it in the queue: what they copy and write is garbage. Each KV group attends
    to its window only (0: to all). Host blocks lie behind those of the pool."""

    def __init__(
        self, num_blocks: int, block_size: int, windows: tuple[int, ...] = (0,), num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.windows = windows
        self.slots = [GARBAGE] * ((num_blocks + num_host_blocks) * block_size)
        self.guilty: set[str] = set()
        self.fail_next = False
        self.results: deque[tuple[SchedulerOutput, ModelRunnerOutput | None]] = deque()
        self._rows: dict[int, _Row] = {}

    @property
    def failing(self) -> bool:
        """True while a failed step is in flight."""
        return any(result is None for _, result in self.results)

    def execute(self, output: SchedulerOutput) -> None:
        """Runs a step; its result, None for a failure, joins the queue."""
        assert output.num_tokens == sum(item.num_tokens for item in output.scheduled)
        assert len({item.row for item in output.scheduled}) == len(output.scheduled), "two Requests share a row"
        fails = self.fail_next or self.failing or any(item.request_id in self.guilty for item in output.scheduled)
        self.fail_next = False
        for source, target in output.copy_blocks:
            size = self.block_size
            read = [GARBAGE] * size if fails else self.slots[source * size : (source + 1) * size]
            self.slots[target * size : (target + 1) * size] = read
        for new in output.new_rows:
            self._admit(new)
        for item in output.scheduled:
            self._extend(item)
        self._write(output.scheduled, garbage=fails)
        self.results.append((output, self._lose(output.scheduled) if fails else self._read(output.scheduled)))

    def _admit(self, new: NewRow) -> None:
        held = min(map(len, new.block_ids)) * self.block_size
        assert held > new.num_computed_tokens - self.block_size, "only a borrowed block may be missing"
        self._rows[new.row] = _Row(
            new.request_id,
            new.epoch,
            list(new.token_ids),
            [list(ids) for ids in new.block_ids],
            new.num_computed_tokens,
            new.num_logprobs,
        )

    def _extend(self, item: ScheduledRow) -> None:
        row = self._rows[item.row]
        assert (row.request_id, row.epoch) == (item.request_id, item.epoch), "a row was given away under its Request"
        for table, ids in zip(row.tables, item.new_block_ids, strict=bool(any(item.new_block_ids))):
            table.extend(ids)
        assert item.start == row.num_computed, f"{item} does not begin where the row stands ({row.num_computed})"
        assert item.samples == (item.start + item.num_tokens == len(row.token_ids))
        row.num_computed += item.num_tokens

    def _slot(self, row: _Row, group: int, position: int) -> int:
        return row.tables[group][position // self.block_size] * self.block_size + position % self.block_size

    def _write(self, scheduled: list[ScheduledRow], *, garbage: bool) -> None:
        written: set[int] = set()
        for item in scheduled:
            row = self._rows[item.row]
            values = kv_of(row.token_ids)
            for position in range(item.start, item.start + item.num_tokens):
                for group in range(len(self.windows)):
                    slot = self._slot(row, group, position)
                    assert slot not in written, f"two Requests write slot {slot} in one step"
                    written.add(slot)
                    self.slots[slot] = GARBAGE if garbage else kv_in(group, values[position])

    def _lose(self, scheduled: list[ScheduledRow]) -> None:
        """A failed step leaves garbage where its tokens belong, and later steps in flight compute on from that."""
        for item in scheduled:
            if item.samples:
                self._rows[item.row].token_ids.append(GARBAGE)

    def _read(self, scheduled: list[ScheduledRow]) -> ModelRunnerOutput:
        result = ModelRunnerOutput(token_ids=[], logprobs=[])
        for item in scheduled:
            row = self._rows[item.row]
            end = item.start + item.num_tokens
            assert (item.fork_of >= 0) == (item.num_tokens == 0)
            read = row if item.fork_of < 0 else self._rows[item.fork_of]  # a fork samples from another row's logits
            values = kv_of(row.token_ids)[:end]
            for group, window in enumerate(self.windows):
                first = max(0, item.start + (item.num_tokens > 0) - window) if window else 0
                seen = [self.slots[self._slot(read, group, position)] for position in range(first, end)]
                own = [kv_in(group, value) for value in values[first:]]
                assert seen == own, f"{item.request_id} attends to KV that is not its own prefix"
            seen = values
            token = next_token(seen[-1])
            if item.samples:
                row.token_ids.append(token)
            result.token_ids.append([token] if item.samples else [])
            best = likeliest(seen[-1], row.num_logprobs) if row.num_logprobs > 0 else []
            ids, logprobs = [t for t, _ in best], [p for _, p in best]
            result.logprobs.append([TokenLogprobs(0.0, 1, ids, logprobs)] if best and item.samples else None)
        return result
