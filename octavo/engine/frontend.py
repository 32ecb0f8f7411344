"""The front half without a transport: prompts become engine requests, deltas become RequestOutputs.

Owns text (tokenise, detokenise, stop strings) and groups (`n > 1` is n engine requests that share their prompt's
blocks). Used by the offline LLM and by AsyncEngine alike.
"""

import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

from octavo.config import EngineConfig
from octavo.engine.groups import Arrivals, Child, Group, Update
from octavo.errors import ContextLengthError, InvalidValueError, QueueFullError, RequestError, StepError, TimeLimitError
from octavo.messages import AddRequest, Admission, FinishRequest, RequestDelta
from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.request import FinishReason, answer_id
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.step import TokenLogprobs
from octavo.text.stream import TextStream
from octavo.text.tokenizer import Tokenizer, refuse_hopeless

MAX_PROMPT_LOGPROBS = 1 << 20  # of one request; they are told in one message
_OWN_ERRORS: dict[type[RequestError], str] = {  # that the engine found, and the parameter to blame
    TimeLimitError: "timeout",
    InvalidValueError: "structured_outputs",
    ContextLengthError: "max_tokens",
}
log = logging.getLogger("octavo.engine")
Prompt = str | Sequence[int] | Mapping[str, object]


class Frontend:
    """Turns prompts into AddRequests and RequestDeltas into RequestOutputs. Not thread-safe: one caller at a time."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig, *, max_model_len: int
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._max_logprobs = config.max_logprobs
        self._max_num_seqs = config.max_num_seqs
        self._shares_prompts = config.enable_copy_on_write
        self._children: dict[str, Child] = {}
        self._seeds = random.Random(config.seed)

    @property
    def children(self) -> Iterable[Child]:
        """The answers that still run, oldest first."""
        return self._children.values()

    @property
    def num_unfinished(self) -> int:
        """Engine requests that still run."""
        return len(self._children)

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The prompt's text (None when it came as ids) and its checked token ids.

        Raises InvalidValueError for a wrong type, an empty prompt, an id outside the vocabulary.
        """
        text, ids = self._encode(prompt)
        if not ids:
            raise InvalidValueError("the prompt is empty: give at least one token", param="prompt")
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self.vocab_size:
            return text, ids
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise InvalidValueError(
                    f"prompt token ids must be integers from 0 to {self.vocab_size - 1}, not {token!r:.40}",
                    param="prompt",
                )
        return text, ids

    def add(
        self,
        request_id: str,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        *,
        grammar: str | None = None,
        **how: Unpack[Admission],
    ) -> tuple[Group, list[AddRequest]]:
        """Registers a group and makes its engine requests. `grammar` is what was built from
        `params.structured_outputs`.

        Raises:
            ContextLengthError: the prompt leaves no room for a token.
            InvalidValueError: this id is already running, stop strings, bad words or a grammar without a tokenizer, a
                token id outside the vocabulary, more logprobs than the engine gives.
        """
        params.check_vocabulary(self.vocab_size)
        room = self.max_model_len - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens; the context is {self.max_model_len} and at least one is for the "
                "answer: shorten the prompt",
                param="prompt",
            )
        if params.stops and self.tokenizer is None:
            raise InvalidValueError("stop strings need a tokenizer; use stop_token_ids", param="stop")
        if (params.bad_words or grammar) and self.tokenizer is None:
            name = "bad_words" if params.bad_words else "structured_outputs"
            raise InvalidValueError(f"{name} needs a tokenizer", param=name)
        bad_ids = self._bad_ids(params.bad_words or ())
        think_ids = None if params.max_thinking_tokens is None else self._think_ids(params.thinking_marks)
        told = replace(params, structured_outputs=None) if grammar else params
        self._check_logprobs(params, len(ids))
        if params.min_tokens > room:
            raise InvalidValueError(f"min_tokens is {params.min_tokens}, but only {room} fit", param="min_tokens")
        if params.beam_width > self._max_num_seqs:
            raise InvalidValueError(
                f"{params.beam_width} beams were asked for; this engine runs {self._max_num_seqs} requests at once "
                "(max_num_seqs)",
                param="n",
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        base_seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        is_picked = params.num_candidates > params.n and not params.use_beam_search
        if is_picked or params.use_beam_search:  # which answers are the best is known at the end
            params = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        group = Group(request_id, text, ids, params, RequestMetrics(arrival_time=time.monotonic()))
        count = params.num_candidates if is_picked else params.n
        told = replace(told, logprobs=params.logprobs or 0) if is_picked else told
        requests: list[AddRequest] = []
        for index in range(count):
            child_id = answer_id(request_id, index, count)
            if child_id in self._children:
                raise InvalidValueError(f"request_id {request_id!r} is already running", param="request_id")
            stream = TextStream(self.tokenizer, params) if self.tokenizer and params.detokenize else None
            output = CompletionOutput(index, "", [])
            if params.logprobs is not None or is_picked:
                output.logprobs, output.cumulative_logprob = [], 0.0
            if not requests or not params.use_beam_search:  # a beam search is one request with n answers
                engine_id = request_id if params.use_beam_search else child_id
                fork_of = requests[0].request_id if requests else None
                seed = base_seed + index
                if requests and self._shares_prompts:  # the first one tells of it
                    told = replace(told, prompt_logprobs=None)
                add = AddRequest(engine_id, ids, told, max_tokens, seed, fork_of=fork_of, **how)
                add.grammar, add.bad_ids, add.think_ids = grammar, bad_ids, think_ids
                requests.append(add)
            group.children.append(Child(group, child_id, output, stream, requests[-1]))
        self._children.update((child.request_id, child) for child in group.children)
        return group, requests

    def running(self, request_id: str) -> list[str]:
        """Ids of the engine requests of a group that still run."""
        return _engine_ids(c for c in self._children.values() if c.parent.request_id == request_id)

    def abort(self, group: Group) -> list[str]:
        """Forgets a group; returns the ids of its engine requests that still run."""
        return _engine_ids([c for c in group.children if self._children.pop(c.request_id, None)])

    def fail_all(self) -> list[Group]:
        """Forgets everything that runs (the engine is gone); returns the groups."""
        groups = {id(child.parent): child.parent for child in self._children.values()}
        self._children.clear()
        return list(groups.values())

    def resubmissions(self) -> tuple[list[AddRequest], Update | None]:
        """What a new engine must be told after the old one died: everything that runs, with the tokens it has.

        Each runs alone until it brings a token (a beam search: until it ends, and these come first), and the engine
        says which does. Should it die then, that request has killed it: it ends with an error (the Update), and only
        the others are told again.
        """
        update = None
        for guilty in [child for child in self._children.values() if child.alone]:  # all answers of one request
            num_before = len(guilty.output.token_ids)
            del self._children[guilty.request_id]
            self._fail(guilty, "the engine process died when it ran this request alone")
            update = update or Update(guilty.parent, None)
            self._collect({id(guilty.parent): update}, guilty, num_before)
        if update is not None:
            self._close(update, time.monotonic())
        requests: dict[str, AddRequest] = {}
        for child in self._children.values():
            asked, age = child.request, time.monotonic() - child.parent.metrics.arrival_time
            timeout = None if asked.timeout is None else max(asked.timeout - age, 0.001)
            generated = list(child.output.token_ids)
            again = replace(asked, output_token_ids=generated, runs_alone=True, fork_of=None, timeout=timeout)
            requests[again.request_id] = again
        return sorted(requests.values(), key=lambda request: not request.params.use_beam_search), update

    def oldest_waiting(self) -> float | None:
        """When the oldest request that has no token yet arrived; front's monotonic clock."""
        waiting = (c.parent.metrics.arrival_time for c in self._children.values() if c.first_token_time is None)
        return min(waiting, default=None)

    def process(self, deltas: list[RequestDelta]) -> tuple[list[Update], list[FinishRequest], Arrivals]:
        """Applies what a step brought. Returns outputs per group, finishes for the engine (stop strings found), and
        when tokens arrived, for the metrics."""
        touched: dict[int, Update] = {}
        finishes: list[FinishRequest] = []
        arrivals: Arrivals = {}
        now = time.monotonic()
        for delta in deltas:
            if delta.alone:  # told for later, under the engine's id
                for one in self._children.values():
                    one.alone = one.request.request_id == delta.request_id
                if not delta.token_ids:
                    continue
            child = self._children.get(delta.request_id)
            if child is None:
                continue  # aborted, or ended by a stop string: what the engine had in flight is dropped
            child.alone = delta.alone
            num_before = len(child.output.token_ids)
            try:
                finish = self._apply(child, delta)
            except Exception as error:  # of this request, and of no other
                log.exception("request %s: its output could not be read", child.request_id)
                self._fail(child, f"its output could not be read: {error}")
                finish = FinishRequest(child.request_id, len(child.output.token_ids))
            if finish is not None:
                finishes.append(finish)
            new = len(child.output.token_ids) - num_before
            if new > 0:
                metrics = child.parent.metrics
                if child.parent.on_tokens:
                    child.parent.on_tokens(new)
                arrival = (child.last_token_time, metrics.arrival_time if child.last_token_time is None else 0.0, new)
                arrivals[arrival] = arrivals.get(arrival, 0) + 1
                child.first_token_time = child.first_token_time or now
                child.last_token_time = now
                metrics.first_token_time = metrics.first_token_time or now
                metrics.last_token_time = now
            if child.output.finish_reason is not None:
                del self._children[child.request_id]
            self._collect(touched, child, num_before)
        for update in touched.values():
            self._close(update, now)
        return list(touched.values()), finishes, arrivals

    def _check_logprobs(self, params: SamplingParams, num_prompt: int) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self._max_logprobs:
                raise InvalidValueError(
                    f"{asked} {name} were asked for; this engine gives at most {self._max_logprobs} (max_logprobs)",
                    param=name,
                )
        asked = params.prompt_logprobs
        if asked is not None and num_prompt * (asked + 1) > MAX_PROMPT_LOGPROBS:
            raise InvalidValueError(
                f"{asked} prompt_logprobs of {num_prompt} tokens are more than {MAX_PROMPT_LOGPROBS} "
                "numbers: ask for fewer of each, or shorten the prompt",
                param="prompt_logprobs",
            )

    def _think_ids(self, marks: tuple[str, str]) -> tuple[list[int], list[int]]:
        if self.tokenizer is None or not marks[1]:
            raise InvalidValueError(
                "max_thinking_tokens needs a tokenizer and an end mark", param="max_thinking_tokens"
            )
        begin, end = (self.tokenizer.encode(mark, add_special_tokens=False) for mark in marks)
        return begin, end

    def _bad_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The token sequences that spell a word, at the start of a text and behind a space."""
        found: list[list[int]] = []
        for word in words:
            for text in (word, " " + word.lstrip()):
                assert self.tokenizer is not None
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise InvalidValueError(
                    'a prompt mapping has the key "prompt" or "prompt_token_ids"'
                    + (f", not {sorted(unknown)[0]!r}" if unknown else ""),
                    param="prompt",
                )
            inner = prompt.get("prompt_token_ids")
            prompt = inner if inner is not None else prompt.get("prompt")  # type: ignore[assignment]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidValueError("this engine runs without a tokenizer: give prompt_token_ids", param="prompt")
            refuse_hopeless(self.tokenizer, prompt, self.max_model_len, param="prompt")
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidValueError(f"a prompt is a string or token ids, not {type(prompt).__name__}", param="prompt")
        return None, [*prompt]

    def _apply(self, child: Child, delta: RequestDelta) -> FinishRequest | None:
        group, output = child.parent, child.output
        group.num_cached_tokens = delta.num_cached_tokens or group.num_cached_tokens
        group.metrics.queue_seconds = delta.queue_time or group.metrics.queue_seconds
        output.token_ids.extend(delta.token_ids)
        group.vector = delta.vector
        if delta.prompt_logprobs is not None:
            told = zip(group.prompt_token_ids[1:], delta.prompt_logprobs, strict=True)
            group.prompt_logprobs = [None, *(self._entries(token, entry) for token, entry in told)]
        if output.logprobs is not None:
            self._add_logprobs(output, delta.token_ids, delta.logprobs or [])
        if delta.cumulative_logprob is not None:
            output.cumulative_logprob = delta.cumulative_logprob
        stream = child.stream
        if stream is not None and stream.is_plain and delta.finish_reason is None:
            output.text += stream.decode(delta.token_ids)
        elif stream is not None and (stopped := self._add_text(child, stream, delta)) is not None:
            return stopped
        if delta.finish_reason is not None:
            output.finish_reason, output.stop_reason = str(delta.finish_reason), delta.stop_reason
            child.error = _error(delta)
        return None

    def _fail(self, child: Child, error: str) -> None:
        child.output.finish_reason, child.error = FinishReason.ERROR.value, StepError(error)

    def _add_text(self, child: Child, stream: TextStream, delta: RequestDelta) -> FinishRequest | None:
        output = child.output
        text = stream.add(delta.token_ids, ends_with_stop_token=delta.finish_reason == FinishReason.STOP)
        output.text += text.text
        if text.stop is not None and text.num_kept is not None:
            self._cut(output, text.num_kept)
            output.finish_reason, output.stop_reason = FinishReason.STOP.value, text.stop
            return FinishRequest(child.request_id, text.num_kept)
        if delta.finish_reason is not None:
            output.text += stream.finish()
        return None

    def _cut(self, output: CompletionOutput, num_kept: int) -> None:
        """Drops the tokens behind a stop string."""
        dropped = output.token_ids[num_kept:]
        if dropped and output.logprobs is not None and output.cumulative_logprob is not None:
            entries = output.logprobs[-len(dropped) :]  # a stream has handed out those before
            output.cumulative_logprob -= sum(e[token].logprob for token, e in zip(dropped, entries, strict=True))
            del output.logprobs[-len(dropped) :]
        del output.token_ids[num_kept:]

    def _add_logprobs(self, output: CompletionOutput, ids: list[int], logprobs: list[TokenLogprobs]) -> None:
        assert output.logprobs is not None
        for token, entry in zip(ids, logprobs, strict=True):
            output.logprobs.append(self._entries(token, entry))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + entry.token_logprob

    def _entries(self, token: int, told: TokenLogprobs) -> dict[int, Logprob]:
        """The token that is there first, then the likeliest ones."""
        entries = {token: self._logprob(token, told.token_logprob, told.rank)}
        for rank, (other, logprob) in enumerate(zip(told.top_ids, told.top_logprobs, strict=True), start=1):
            entries.setdefault(other, self._logprob(other, logprob, rank))
        return entries

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self.tokenizer.token_text(token) if self.tokenizer else None)

    def _collect(self, touched: dict[int, Update], child: Child, num_before: int) -> None:
        group = child.parent
        update = touched.get(id(group))
        kind = group.params.output_kind
        if kind is RequestOutputKind.DELTA:
            full = child.output  # what is new of it; text and log probabilities are handed out, not kept
            ids, told = full.token_ids[num_before:], full.logprobs
            new = CompletionOutput(
                full.index, full.text, ids, full.cumulative_logprob, told, full.finish_reason, full.stop_reason
            )
            full.text, full.logprobs = "", None if told is None else []
            if update is None and group.relay is not None and new.finish_reason is None and group.relay(new):
                return
        if update is None:
            update = touched[id(group)] = Update(group, None)
        if kind is RequestOutputKind.DELTA:
            if update.output is None:
                update.output = self._output(group, [])
            update.output.outputs.append(new)
        elif kind is RequestOutputKind.CUMULATIVE or group.finished:
            update.output = self._output(group, group.answers())

    def _close(self, update: Update, now: float) -> None:
        group = update.group
        if group.finished:
            group.metrics.finished_time = now
        if update.output is not None:
            if group.finished:
                update.output.num_generated = sum(len(child.output.token_ids) for child in group.children)
            update.output.finished = group.finished
            update.output.metrics = group.metrics.copy()

    def _output(self, group: Group, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=outputs,
            finished=False,
            num_cached_tokens=group.num_cached_tokens,
            prompt_logprobs=group.prompt_logprobs,
            vector=group.vector,
        )


def _engine_ids(children: Iterable[Child]) -> list[str]:
    """The engine requests of these answers; the answers to a beam search share one."""
    return list(dict.fromkeys(child.request.request_id for child in children))


def _error(delta: RequestDelta) -> Exception | None:
    """What a failed request's caller gets: its own error where the engine says which, else a StepError."""
    if delta.error is None:
        return None
    if delta.error_kind == QueueFullError.__name__:
        return QueueFullError(delta.error, retry_after=delta.retry_after)
    for kind, param in _OWN_ERRORS.items():
        if delta.error_kind == kind.__name__:
            return kind(delta.error, param=param)
    return StepError(delta.error)
