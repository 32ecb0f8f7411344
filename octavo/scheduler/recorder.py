"""The black box: everything that goes into a scheduler and everything it decides, in a bounded file of JSON lines.

What goes in: arrivals (lengths, and digests of the prompt's blocks under the engine's secret key: no text, no token
ids), aborts, results (how many tokens, who stopped), the clock. What comes out: rows, blocks, preemptions. That is
enough to run the real scheduler again without a model and get the same decisions, bit for bit (simulate/replay.py).

The file is a ring of two halves, FILE and FILE.1. Each begins with a state (snapshot.py), so the older can be dropped.
A row that goes on by one token in its old block is not written: most are like that. Lines, by their "e":

    state  the scheduler as it is, the rows of steps in flight, who is who ("numbers": request id -> number)
    add    a Request, its number "r", the next ones for its further beams; "refused": what was raised
    abort, finish, expire    of number "r"
    step   "t" the clock, "n" the step; "new" rows admitted: [row, number, computed, runs of blocks]; "rows" that do not
           just go on: [row, start, tokens, samples, row forked from, runs of added blocks]; "crc" of all rows in their
           order; "pre": [number, number of the one it made way for]; "copy": block copies;
           "saves" where that changed: whether what the pool gives up is copied to host memory
    done   "t", "n": update() took the step's result; "tokens": [place, how many] where that is not one per sampling
           row, "stop": [place, tokens kept]; "beams": of each round of a beam search that ended, [parent of each beam,
           by its place among the living before], none when the search is over, and the new number that the first beam
           which was forked gets: what it says has another past than what it said before. fail: fail() did

Any line may tell digests that became known: "h": [number, block, digest].
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from array import array
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError, RequestError
from octavo.messages import RequestDelta
from octavo.request import FinishReason, Request
from octavo.scheduler.forks import same_prefix
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.snapshot import LeftOut, facts, freeze
from octavo.step import NO_BLOCKS, ModelRunnerOutput, ScheduledRow, SchedulerOutput
from octavo.structs import asdict

log = logging.getLogger("octavo.scheduler")
FORMAT = "octavo-record-3"
_encode = json.JSONEncoder(separators=(",", ":")).encode
HALF_IN_STATES = 2  # a half of the ring is at least so many times its state: as much of it are steps
_USUAL = {f.name: f.default for f in fields(Request) if f.default is not MISSING} | {"params": False, "stop_ids": False}
_USUAL |= {"prompt_logprobs": [], "num_beams": 0}


class Ring(LeftOut):
    """A file that keeps its last lines, at most about `max_bytes` with its older half, PATH.1; more where its states
    are so large that a half would hold little else. Without `keep` both go when it is closed; who crashes does not
    close it.

    Raises ConfigError: it cannot be written.
    """

    def __init__(self, path: Path, max_bytes: int, *, keep: bool = True) -> None:
        self._keep = keep
        self.path = path
        self.older = path.with_name(path.name + ".1")
        self._half = max_bytes // 2
        self._size = self._limit = 0  # bytes of this half, and with how many it is full
        self.is_full = True  # a new half should begin, with a state
        self._lines: list[str] = []
        self._file = -1
        try:
            self.older.unlink(missing_ok=True)
            self._open()
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error.strerror}; take another --record, or off") from error

    def turn(self) -> None:
        """Begins a new half; the older one is dropped."""
        self.flush()
        if self._file < 0:
            return
        try:
            self._shut()
            self.path.replace(self.older)
            self._open()
        except OSError as error:
            self._give_up(error)

    def write(self, event: dict[str, Any]) -> None:
        """Adds an event; it is in the file after the next flush(). Most are of two kinds, written down without
        an encoder, which would be cold once a step."""
        kind, size = event["e"], len(event)
        if kind == "done" and size == 3:
            line = f'{{"e":"done","t":{event["t"]!r},"n":{event["n"]}}}\n'
        elif kind == "step" and size == 5 and not event["rows"]:
            line = f'{{"e":"step","t":{event["t"]!r},"n":{event["n"]},"rows":[],"crc":{event["crc"]}}}\n'
        else:
            line = _encode(event) + "\n"
        self._lines.append(line)

    def flush(self) -> None:
        """Hands the lines to the system: a crash of this process does not lose them. A full disk ends the recording,
        not the engine."""
        data = "".join(self._lines).encode()
        self._lines.clear()
        if self._file < 0:
            return
        self._size += len(data)
        self._limit = self._limit or max(self._half, HALF_IN_STATES * self._size)  # it begins with a state, by itself
        self.is_full = self._size >= self._limit
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """The engine ends well."""
        self.flush()
        self._shut()
        if not self._keep:
            self.path.unlink(missing_ok=True)
            self.older.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        log.error("recording to %s ends: %s", self.path, error)
        self.is_full = False
        with contextlib.suppress(OSError):  # the disk that failed a moment ago
            self._shut()

    def _shut(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._size = self._limit = 0


class Describer(LeftOut):
    """Turns decisions into what a line says about them; the recorder and the replay use the same."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # request id -> number, of live Requests
        self.flying: dict[int, list[ScheduledRow]] = {}  # rows of the steps in flight, by step
        self._ends: dict[int, int] = {}  # row -> where it stood after its last step
        self._order: list[int] = []  # of the last step's rows, and its checksum
        self._crc = 0

    def restart(self) -> None:
        """Forgets where rows stood: the next step tells all."""
        self._ends.clear()

    def step(self, output: SchedulerOutput, preempted: list[tuple[Request, Request]]) -> dict[str, Any]:
        """What one schedule() decided."""
        ends, rows, order = self._ends, [], []
        for item in output.scheduled:
            start, count = item.start, item.num_tokens
            order.append(item.row)
            if count != 1 or not item.samples or item.new_block_ids is not NO_BLOCKS or ends.get(item.row) != start:
                rows.append([item.row, start, count, item.samples, item.fork_of, *map(runs, item.new_block_ids)])
            ends[item.row] = start + count
        if order != self._order:
            self._order, self._crc = order, zlib.crc32(array("I", order).tobytes())
        event: dict[str, Any] = {"n": output.step, "rows": rows, "crc": self._crc}
        if output.new_rows:
            event["new"] = [
                [new.row, self.numbers[new.request_id], new.num_computed_tokens, *map(runs, new.block_ids)]
                for new in output.new_rows
            ]
        if preempted:
            event["pre"] = [[self.numbers[who.request_id], self.numbers[whom.request_id]] for who, whom in preempted]
        if output.copy_blocks:
            event["copy"] = output.copy_blocks
        return event


class RecordingScheduler(Scheduler):
    """The scheduler, and from record() on a recording of it. Its clock stands still within a call, as it will in a
    replay."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._real_clock, self._clock = self._clock, self._held
        self._time = 0.0
        self._ring: Ring | None = None
        self._settings: dict[str, Any] = {}
        self._saves = True
        self._describer = Describer()
        self._count = 0
        self._hashed: list[list[Any]] = []
        self._rounds: list[list[Any]] = []

    def record(self, ring: Ring, settings: dict[str, Any]) -> None:
        """Begins the recording; `settings` are written down for a replay under other ones."""
        self._ring, self._settings, self._saves = ring, settings, self.kv.host.saves
        self.kv.on_digest, self._beams.on_round = self._learn, self._learn_round
        self._write_state(ring)

    def add(self, request: Request) -> None:
        self._time = self._real_clock()
        if self._ring is None:
            return super().add(request)
        numbers = self._describer.numbers
        event = {"e": "add", "t": self._time, "r": self._count, "request": _unusual(facts(request))}
        parent = self._requests.get(request.fork_of or "")
        if parent is not None and same_prefix(parent, request):
            event["like"] = numbers[parent.request_id]
        try:
            super().add(request)
        except RequestError as error:
            event["refused"] = type(error).__name__
            raise
        else:
            for number, member in enumerate(self._beams.members(request), self._count):
                numbers[member.request_id] = number
        finally:
            self._count += request.params.beam_width
            self._write(event)

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = self.kv.on_digest = self._beams.on_round = None

    def abort(self, request_id: str) -> list[RequestDelta]:
        self._write({"e": "abort", "r": self._describer.numbers.get(request_id, -1)})
        return super().abort(request_id)

    def finish(self, request_id: str, num_kept: int) -> None:
        self._write({"e": "finish", "r": self._describer.numbers.get(request_id, -1), "kept": num_kept})
        super().finish(request_id, num_kept)

    def expire(self) -> list[RequestDelta]:
        self._time = self._real_clock()
        deltas = super().expire()
        if deltas:
            self._write({"e": "expire", "t": self._time})
        return deltas

    def schedule(self) -> SchedulerOutput:
        ring = self._ring
        if ring is not None and ring.is_full:
            ring.turn()
            self._write_state(ring)
        self._time = self._real_clock()
        output = super().schedule()
        if ring is not None:
            event = {"e": "step", "t": self._time, **self._describer.step(output, self.preempted)}
            if self._saves != (saves := self.kv.host.saves):
                event["saves"] = self._saves = saves
            self._write(event)
            ring.flush()  # before anything is executed that might crash
            if output.scheduled:
                self._describer.flying[output.step] = output.scheduled
        return output

    def update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> list[RequestDelta]:
        self._time = self._real_clock()
        deltas = super().update(output, result)
        if self._ring is not None:
            event = {"e": "done", "t": self._time, **_result(output, result, deltas)}
            if self._rounds:
                event["beams"], self._rounds = self._rounds, []
            self._write(event)
            self._describer.flying.pop(output.step, None)
        return deltas

    def fail(self, output: SchedulerOutput, error: str) -> list[RequestDelta]:
        self._write({"e": "fail", "n": output.step})
        self._describer.flying.pop(output.step, None)
        return super().fail(output, error)

    def _end(self, request: Request) -> None:
        members = self._beams.members(request)
        super()._end(request)
        for member in members:
            self._describer.numbers.pop(member.request_id, None)

    def _held(self) -> float:
        return self._time

    def _learn(self, request: Request, index: int, digest: bytes) -> None:
        number = self._describer.numbers.get(request.request_id, self._count)  # the next one's, while it is added
        self._hashed.append([number, index, digest.hex()])

    def _learn_round(self, first: Request, parents: list[int] | None, forked: list[Request]) -> None:
        self._rounds.append([parents, self._count])
        for member in forked:
            self._describer.numbers[member.request_id] = self._count
            self._count += 1

    def _write(self, event: dict[str, Any]) -> None:
        if self._ring is not None:
            if self._hashed:
                event["h"], self._hashed = self._hashed, []
            self._ring.write(event)

    def _write_state(self, ring: Ring) -> None:
        self._describer.restart()
        for request in self._requests.values():  # a later Request may be said to be like one that waits for its fork
            self.kv.digest_all(request)
        known = {"format": FORMAT, "settings": self._settings, "numbers": self._describer.numbers, "count": self._count}
        flying = {step: [asdict(row) for row in rows] for step, rows in self._describer.flying.items()}
        ring.write({"e": "state", **known, "flying": flying, "scheduler": freeze(self)})
        ring.flush()


def _result(output: SchedulerOutput, result: ModelRunnerOutput, deltas: list[RequestDelta]) -> dict[str, Any]:
    """What update() was given, as far as it is not the usual."""
    event: dict[str, Any] = {"n": output.step}
    pairs = zip(output.scheduled, result.token_ids, strict=True)
    if unusual := [[at, len(tokens)] for at, (item, tokens) in enumerate(pairs) if len(tokens) != item.samples]:
        event["tokens"] = unusual
    stopped = {}
    for delta in deltas:
        if delta.finish_reason is None:  # most: a cheaper question than the next
            continue
        if delta.finish_reason == FinishReason.STOP and delta.cumulative_logprob is None:
            stopped[delta.request_id] = len(delta.token_ids)
    if stopped:
        places = enumerate(output.scheduled)
        event["stop"] = [[p, stopped[item.request_id]] for p, item in places if item.request_id in stopped]
    return event


def runs(blocks: list[int]) -> list[int]:
    """Block ids as first, length, first, length, ..."""
    found: list[int] = []
    start = end = blocks[0] if blocks else 0
    for block in blocks:
        if block != end:
            found += (start, end - start)
            start = block
        end = block + 1
    return [*found, start, end - start] if blocks else found


def _unusual(given: dict[str, Any]) -> dict[str, Any]:
    """Only what differs from a new Request's usual values."""
    return {name: value for name, value in given.items() if name not in _USUAL or value != _USUAL[name]}
