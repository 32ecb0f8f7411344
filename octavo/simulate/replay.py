"""Runs a recording again: the real scheduler, no model, the same decisions bit for bit, or the first that differs.

Token ids are not in a recording, and not needed: every full block gets ids of its own by its digest, so what was equal
is equal, and the hasher answers with the recorded digests. Log probabilities are not needed either: beams go on as the
recording says.
"""

import json
import sys
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError, RequestError
from octavo.kvcache.block_hash import BlockHasher
from octavo.messages import RequestDelta, StepRecord
from octavo.request import FinishReason, Request, RequestStatus
from octavo.sampling_params import SamplingParams
from octavo.scheduler.beams import Beam, Choice, Judge, beam_id
from octavo.scheduler.cost import CostModel, StepWork, fit
from octavo.scheduler.recorder import FORMAT, Describer
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.snapshot import ROOMS, Thaw
from octavo.simulate.simulator import Machine
from octavo.simulate.trace import Arrival, Segment
from octavo.step import ModelRunnerOutput, ScheduledRow, SchedulerOutput, TokenLogprobs

STOP = 0  # the token of a Request that stops
TOLD = TokenLogprobs(0.0, 1, [], [])
UNKNOWN = 1 << 31  # plus a Request's number: the token of positions whose block nobody hashed


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first decision that came out differently."""

    step: int
    line: int
    what: str
    recorded: Any
    replayed: Any


class KnownHasher(BlockHasher):
    """Answers with the digests of a recording; `digests` is by the token id that stands for a block. It is looked up by
    the block's last one: beams that part in the middle of a block begin it alike."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size, b"")
        self.digests: dict[int, bytes] = {}

    def chain(self, parent: bytes, token_ids: Sequence[int]) -> list[bytes]:
        size, digests = self.block_size, []
        for end in range(size, len(token_ids) + 1, size):
            parent = self.digests.get(token_ids[end - 1]) or super().chain(parent, token_ids[end - size : end])[0]
            digests.append(parent)
        return digests


class KnownJudge(Judge):
    """Lets the beams of all searches go on as they did.

    Attributes:
        rounds: those that end in the step whose result is taken next, as the recording tells them.
    """

    def __init__(self, token: Callable[[int, int], int], numbers: dict[str, int]) -> None:
        self.rounds: deque[list[Any]] = deque()
        self.num_unknown = 0  # rounds that the recording does not have
        self.next_number = 0  # of the first beam that is forked
        self._token, self._numbers = token, numbers

    def choose(self, living: list[Beam]) -> list[Choice] | None:
        parents, self.next_number = self.rounds.popleft() if self.rounds else ([-1], 0)
        if parents is None:
            return None
        if not all(0 <= parent < len(living) for parent in parents):
            self.num_unknown += 1
            return None
        choices, number = [], self.next_number
        for place, parent in enumerate(parents):
            request = living[parent].request
            own = self._numbers[request.request_id]
            if parent in parents[:place]:  # it goes on in its own place already: this one is forked
                own, number = number, number + 1
            choices.append(Choice(parent, self._token(own, request.num_tokens)))
        return choices

    def answers(self, first: Request) -> list[RequestDelta]:
        return []


class Replay:
    """A recording, read and ready to run().

    Attributes:
        scheduler: as it is at the point that was reached.
        steps: (work, seconds) of every step that was run again; where several were in flight, the seconds are those
            since the one before it was done.

    Raises:
        ConfigError: no such file, or no recording.
    """

    def __init__(self, path: Path) -> None:
        self._lines = _read(path)
        first = self._lines[0][1]
        self.settings: dict[str, Any] = first["settings"]
        self.steps: list[tuple[StepWork, float]] = []
        self.requests: dict[int, Request] = {}  # by number
        self.arrivals: dict[int, float] = {}  # number -> clock
        self._time = self._done = 0.0  # the clock, and when the last result was taken
        self._block_size = int(self.settings["block_size"])
        self._hasher = KnownHasher(self._block_size)
        self._words: dict[str, int] = {}  # digest -> the token id that stands for it
        self._blocks: dict[tuple[int, int], int] = {}  # (number, block index) -> that token id
        for _, event in self._lines:
            for number, index, digest in event.get("h", ()):
                self._learn(number, index, digest)
        self._likes: dict[int, int] = {}  # number -> whose blocks its prompt's are
        self._describer = Describer()
        self._judge = KnownJudge(self._token, self._describer.numbers)
        self._outputs: dict[int, tuple[SchedulerOutput, StepRecord | None, float]] = {}
        self.scheduler = self._thaw(first)
        for step, rows in first["flying"].items():
            output = SchedulerOutput(int(step), scheduled=[ScheduledRow(**row) for row in rows])
            self._outputs[output.step] = output, None, 0.0

    def run(self, *, until: int | None = None, tell: Callable[[float], None] = lambda share: None) -> Divergence | None:
        """Goes on to the end, or until step `until` has been decided; the first divergence ends it.

        Raises ConfigError: the recording does not hold that step.
        """
        first = self.scheduler.next_step
        for place, (line, event) in enumerate(self._lines[1:], 1):
            tell(place / len(self._lines))
            self._time = event.get("t", self._time)
            if event["e"] == "state":
                self._describer.restart()
            elif event["e"] == "step":
                if (divergence := self._step(line, event)) is not None:
                    return divergence
                if until is not None and self.scheduler.next_step > until >= first:
                    return None
            elif (divergence := self._feed(line, event)) is not None:
                return divergence
        if until is not None:
            last = self.scheduler.next_step - 1
            raise ConfigError(f"--until {until}: the recording holds the steps from {first} to {last}")
        return None

    def cost(self) -> CostModel:
        """What steps cost, fitted to those that were run again."""
        return fit(self.steps)

    def setting(self, changes: dict[str, Any]) -> tuple[Machine, EngineConfig]:
        """What the recording ran on, under changed settings. A copied block costs what it cost there."""
        known, settings, cost = self.settings, self.settings | changes, self.cost()
        larger = settings["block_size"] / known["block_size"]
        per_copy = changes.get("host_copy_seconds", larger * (cost.per_copy or known["host_copy_seconds"]))
        of_machine = {name: settings[name] for name in ("num_blocks", "max_model_len", "num_host_blocks")}
        machine = Machine(replace(cost, per_copy=per_copy), kv_windows=tuple(settings["kv_windows"]), **of_machine)
        of_config = {f.name for f in fields(EngineConfig)}
        return machine, EngineConfig(**{name: value for name, value in settings.items() if name in of_config})

    def trace(self) -> list[Arrival]:
        """The requests of the recording, without beam searches, with as many tokens as each had got by the point that
        was reached."""
        start = min(self.arrivals.values(), default=0.0)
        arrivals = []
        for number, request in self.requests.items():
            if request.params.use_beam_search:
                continue
            output = max(1, request.num_output_tokens)
            prompt = tuple(self._segments(number, request.num_prompt_tokens))
            time = self.arrivals[number] - start
            tenant, priority = request.tenant, request.priority
            arrivals.append(Arrival(time, prompt, output, tenant, priority, UNKNOWN + number))
        return sorted(arrivals, key=lambda arrival: arrival.time)

    # ------------------------------------------------------------------------------------------------------- events

    def _step(self, line: int, event: dict[str, Any]) -> Divergence | None:
        self.scheduler.kv.host.saves = event.get("saves", self.scheduler.kv.host.saves)
        output = self.scheduler.schedule()
        decided = json.loads(json.dumps(self._describer.step(output, self.scheduler.preempted)))
        for what in sorted({*decided, *event} - {"e", "t", "h", "saves"}):
            if decided.get(what) != event.get(what):
                return Divergence(event["n"], line, what, event.get(what), decided.get(what))
        record = StepRecord(output.step, self._time)
        self.scheduler.fill(record, output)
        if output.scheduled:
            self._outputs[output.step] = output, record, self._time
        return None

    def _feed(self, line: int, event: dict[str, Any]) -> Divergence | None:
        """Everything that is no decision; a refusal is one."""
        kind, scheduler = event["e"], self.scheduler
        if kind == "add":
            return self._add(line, event)
        if kind in ("abort", "finish"):
            request = self.requests.get(event["r"])
            if request is not None and kind == "abort":
                scheduler.abort(request.request_id)
            elif request is not None:
                scheduler.finish(request.request_id, event["kept"])
        elif kind == "expire":
            scheduler.expire()
        elif kind in ("done", "fail"):
            output, record, began = self._outputs.pop(event["n"])
            if kind == "fail":
                scheduler.fail(output, "failed in the recording")
            else:
                result = self._result(output, event)
                self._judge.rounds.extend(event.get("beams", ()))
                scheduler.update(output, result)
                if self._judge.rounds or self._judge.num_unknown:
                    return Divergence(event["n"], line, "beams", event.get("beams"), "other rounds of beams ended")
                if record is not None:
                    record.num_sampled = sum(map(len, result.token_ids))
                    self.steps.append((StepWork.of(record), self._time - max(began, self._done)))
                self._done = self._time
        return None

    def _add(self, line: int, event: dict[str, Any]) -> Divergence | None:
        number = event["r"]
        request = self._request(event["request"])
        counts = event["request"]
        like = event.get("like", number)
        like = self._likes[number] = self._likes.get(like, like)  # what was a fork itself was told no digests
        self._fill(request, like, counts["prompt_token_ids"], counts["token_ids"])
        refused = None
        try:
            self.scheduler.add(request)
        except RequestError as error:
            refused = type(error).__name__
        else:
            for place in range(max(1, counts.get("num_beams", 0))):
                self._describer.numbers[beam_id(request.request_id, place)] = number + place
            self.requests[number] = request
            self.arrivals[number] = self._time
        if refused != event.get("refused"):
            return Divergence(self.scheduler.next_step, line, "refused", event.get("refused"), refused)
        return None

    def _result(self, output: SchedulerOutput, event: dict[str, Any]) -> ModelRunnerOutput:
        counts, stops = dict(event.get("tokens", ())), dict(event.get("stop", ()))
        token_ids = []
        for place, item in enumerate(output.scheduled):
            number, request = self._describer.numbers.get(item.request_id, 0), self.scheduler.find(item.request_id)
            start = request.num_tokens if request is not None else 0
            count = counts.get(place, int(item.samples))
            tokens = [self._token(number, position) for position in range(start, start + count)]
            if place in stops:
                tokens[stops[place] - 1] = STOP
            token_ids.append(tokens)
        return ModelRunnerOutput(token_ids, [[TOLD] * len(tokens) for tokens in token_ids])

    def _renumber(self, first: Request, parents: list[int] | None, forked: list[Request]) -> None:
        """A round of beams has ended: those that were forked say something else from here on."""
        for number, member in enumerate(forked, self._judge.next_number):
            if member is first:
                self.requests[number] = self.requests.pop(self._describer.numbers[member.request_id])
            self._describer.numbers[member.request_id] = number

    # ------------------------------------------------------------------------------------------------------- tokens

    def _learn(self, number: int, index: int, digest: str) -> None:
        word = self._words.setdefault(digest, len(self._words) + 1)
        self._blocks[number, index] = word
        self._hasher.digests[word] = bytes.fromhex(digest)

    def _token(self, number: int, position: int) -> int:
        return self._blocks.get((number, position // self._block_size), UNKNOWN + number)

    def _fill(self, request: Request, number: int, num_prompt: int, num_tokens: int) -> None:
        """Gives a Request token ids; `number` is whose blocks they are."""
        tokens = [self._token(number, position) for position in range(max(num_prompt, num_tokens))]
        request.prompt_token_ids, request.token_ids = tokens[:num_prompt], tokens[:num_tokens]

    def _segments(self, number: int, length: int) -> list[Segment]:
        step = self._block_size
        return [(self._token(number, start), min(step, length - start)) for start in range(0, length, step)]

    # -------------------------------------------------------------------------------------------------------- state

    def _thaw(self, event: dict[str, Any]) -> Scheduler:
        counted: list[tuple[Request, int, int]] = []

        def request(fields: dict[str, Any]) -> Request:
            made = self._request(fields)
            counted.append((made, fields["prompt_token_ids"], fields["token_ids"]))
            return made

        replacements = {"_clock": lambda: self._time, "_hasher": self._hasher, "told": TOLD, "judge": self._judge}
        replacements |= {"make_judge": lambda *_: self._judge, "on_round": self._renumber}
        scheduler: Scheduler = Thaw(_classes(), replacements.get, request)(event["scheduler"])
        scheduler.kv.pool.touched = array("q", bytes(8 * scheduler.kv.pool.num_blocks))  # not recorded
        self._describer.numbers |= event["numbers"]
        for request_id, number in event["numbers"].items():
            for index, digest in enumerate(scheduler.kv.known_digests(request_id)):
                self._learn(number, index, digest.hex())
        for made, num_prompt, num_tokens in counted:
            number = self._describer.numbers.get(made.request_id, 0)
            self._fill(made, number, num_prompt, num_tokens)
            if scheduler.find(made.request_id) is made:
                self.requests[number] = made
                self.arrivals[number] = made.arrival_time
        return scheduler

    def _request(self, given: dict[str, Any]) -> Request:
        fields = {name: value for name, value in given.items() if name not in ("prompt_token_ids", "token_ids")}
        waits, stops = bool(fields.pop("params", False)), bool(fields.pop("stop_ids", False))
        if width := fields.pop("num_beams", 0):
            params = SamplingParams(max_tokens=None, use_beam_search=True, n=width)
        else:
            params = SamplingParams(max_tokens=None, presence_penalty=0.5 if waits else 0.0)
        request = Request(
            prompt_token_ids=[], params=params, stop_ids=frozenset({STOP}) if stops else frozenset(), **fields
        )
        request.status = RequestStatus(request.status)
        return request


def _classes() -> dict[str, Any]:
    """By name, every class of the counting half; a recording scheduler is made as a plain one."""
    modules = [module for name, module in sys.modules.items() if name.startswith(ROOMS)]
    found = {
        kind.__name__: kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__
    }
    return found | {"RecordingScheduler": Scheduler, "FinishReason": FinishReason}


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, event) of a recording, its older half first; a last line that was cut off is left out."""
    lines: list[tuple[int, dict[str, Any]]] = []
    older = path.with_name(path.name + ".1")
    for file in (older, path) if older.exists() else (path,):
        try:
            texts = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the recording {file}: {error}") from error
        for number, text in enumerate(texts, 1):
            try:
                event = json.loads(text)
                lines.append((number, event)) if isinstance(event["e"], str) else None
            except (ValueError, KeyError, TypeError) as error:
                if number < len(texts):
                    raise ConfigError(f"{file}, line {number}, is no line of a recording: {error}") from error
    if not lines or lines[0][1].get("format") != FORMAT:
        raise ConfigError(f"{path} is no recording ({FORMAT}): octavo serve --record FOLDER makes one")
    return lines
