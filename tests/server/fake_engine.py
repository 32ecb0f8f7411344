"""An AsyncEngine without a model: the same interface, answers that can be computed by hand.

Its tokenizer has one token per byte (0 to 255), <bos> 256, <eos> 257 and whole words from 258 on. What a parameter does
to an answer is as small as can be: see `_Script`.
"""

from __future__ import annotations

import asyncio
import struct
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

from octavo.engine.watchdog import Progress
from octavo.errors import EngineDeadError, InvalidValueError
from octavo.observe.metrics import Metrics
from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.text.chat import missing_template

BOS, EOS = 256, 257
WORDS = ["hello", " world"]
VOCAB_SIZE = 258 + len(WORDS)
HERMES_CALL = b'Hm. <tool_call>{"name": "time", "arguments": {"zone": "CET"}}</tool_call>'  # a word, then a tool call


class FakeTokenizer:
    vocab_size = VOCAB_SIZE
    bos_token_id, eos_token_id = BOS, EOS
    special_ids = frozenset((BOS, EOS))
    chat_template = "fake"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def fewest_tokens(self, text: str) -> int:
        return -(-len(text) // 5)  # a word's length

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        raw = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.special_ids))
        return raw.decode("utf-8", "replace")

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        if token in self.special_ids:
            return {BOS: b"<bos>", EOS: b"<eos>"}[token]
        return bytes([token]) if token < 256 else WORDS[token - 258].encode()


class FakeTemplate:
    """<role>content per message, then <assistant>; `shout=True` writes it in capitals."""

    def render(
        self, messages: list[dict], *, add_generation_prompt: bool = True, tools: None = None, **kwargs: object
    ) -> str:
        if messages[-1]["content"] == "raise":
            raise InvalidValueError("the template says no", param="messages")
        text = "".join(f"<{m['role']}>{m.get('name', '')}{m['content']}\n" for m in messages)
        text += "<assistant>" * add_generation_prompt
        return text.upper() if kwargs.get("shout") else text


@dataclass
class FakeEngine:
    model_name: str = "fake"
    max_model_len: int = 128
    token_seconds: float = 0.0
    answer: bytes | None = None  # instead of the alphabet
    held_after: int | None = None  # tokens until it waits, for this to be set to something else
    fail_after: int | None = None  # tokens until `failure` is raised; 0: before the first output
    failure: Exception = field(default_factory=lambda: EngineDeadError("killed by a test"))
    has_text: bool = True
    generation_defaults: dict[str, float] = field(default_factory=dict)
    compat: str = "octavo"
    policy: str = "fcfs"

    def __post_init__(self) -> None:
        self.dead: str | None = None
        self.restarting: str | None = None
        self.stage = "idle"
        self.tokenizer = FakeTokenizer() if self.has_text else None
        self.chat_template = FakeTemplate() if self.has_text else None
        self.ready = SimpleNamespace(vocab_size=VOCAB_SIZE, generation_defaults=self.generation_defaults)
        self.config = SimpleNamespace(max_logprobs=10, scheduling_policy=self.policy)
        self.metrics = Metrics(self.model_name, cache_config={"block_size": "16"}, compat=self.compat)
        self.seen: list[SimpleNamespace] = []  # every call of generate
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.num_relayed = 0  # outputs that went to the client past the iterator

    async def generate(self, prompt, params: SamplingParams, request_id: str, **options):
        self.seen.append(SimpleNamespace(prompt=prompt, params=params, request_id=request_id, **options))
        if self.dead:
            raise EngineDeadError(self.dead)
        assert request_id not in self.running
        self.running.add(request_id)
        ended = False
        try:
            async for output in self._outputs(
                prompt, params, request_id, options.get("on_tokens"), options.get("pooling")
            ):
                ended = output.finished
                relay = None if ended else options.get("relay")
                new = output.outputs
                if relay is not None:
                    output.outputs = [one for one in new if one.finish_reason is not None or not relay(one)]
                if new and not output.outputs:
                    self.num_relayed += 1
                else:
                    yield output
        finally:
            self.running.discard(request_id)
            if not ended:
                self.aborted.append(request_id)

    async def render(self, messages: list[dict], **variables: object) -> str:
        if self.chat_template is None:
            raise missing_template(self.model_name)
        return self.chat_template.render(messages, **variables)

    @property
    def num_unfinished(self) -> int:
        return len(self.running)

    def describe(self) -> dict:
        return {"config": {}}

    async def memory(self) -> dict:
        return {"states": "", "holders": [], "metrics": self.metrics.now()}

    def progress(self) -> Progress:
        return Progress(self.stage, len(self.running), 0.5, 0.0, 0.01, 5.0, 0)

    async def shutdown(self) -> None:
        self.dead = "the engine was shut down"

    async def _outputs(self, prompt, params, request_id, on_tokens, pooling):
        began = time.monotonic()
        scripts = [_Script(self, len(prompt), index, params) for index in range(params.num_candidates)]
        times = RequestMetrics(began, began + 0.1, began + 0.4, queue_seconds=0.05)
        cached = len(prompt) // 16 * 16
        output = RequestOutput(request_id, None, list(prompt), [], False, times, num_cached_tokens=cached)
        if params.prompt_logprobs is not None:
            told = [_entries(token, params.prompt_logprobs) for token in output.prompt_token_ids[1:]]
            output.prompt_logprobs = [None, *told]
        if pooling is not None:
            vector = [sum(prompt) / len(prompt) if pooling == "mean" else prompt[-1], len(prompt), 0.0]
            yield replace(output, finished=True, vector=struct.pack("<3f", *vector))
            return
        num_tokens = 0
        while any(script.output.finish_reason is None for script in scripts):
            while num_tokens == self.held_after and not self.dead:
                await asyncio.sleep(0.002)
            if num_tokens == self.fail_after:
                raise self.failure
            if self.dead:
                raise EngineDeadError(self.dead)
            await asyncio.sleep(self.token_seconds)
            deltas = [script.next() for script in scripts if script.output.finish_reason is None]
            num_tokens += 1
            if on_tokens:
                on_tokens(len(deltas))
            self.metrics.on_tokens(time.monotonic(), None if num_tokens == 1 else began, began, len(deltas))
            if params.output_kind is RequestOutputKind.DELTA:
                finished = all(script.output.finish_reason for script in scripts)
                yield replace(output, outputs=deltas, finished=finished)
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            answers = [script.output for script in scripts]
            if len(answers) > params.n:  # the last one is the best
                answers = [replace(answer, index=i) for i, answer in enumerate(reversed(answers))][: params.n]
            num_generated = sum(len(script.output.token_ids) for script in scripts)
            yield replace(output, outputs=answers, finished=True, num_generated=num_generated)


class _Script:
    """One answer: the alphabet from letter (prompt length + seed + index) on; the rest as SamplingParams says."""

    def __init__(self, engine: FakeEngine, start: int, index: int, params: SamplingParams) -> None:
        start += (params.seed or 0) + index
        letters = bytes((start + i) % 26 + 97 for i in range(64))
        self.tokens = list(engine.answer or letters)
        self.params = params
        self.has_text = params.detokenize
        self.output = CompletionOutput(index, "", [], logprobs=None if params.logprobs is None else [])
        self.raw = b""

    def next(self) -> CompletionOutput:
        params, full = self.params, self.output
        count = len(full.token_ids)
        token = self.tokens[count] if count < len(self.tokens) else EOS
        before = len(full.text)
        full.token_ids.append(token)
        delta = CompletionOutput(full.index, "", [token])
        if full.logprobs is not None:
            delta.logprobs = [self._logprobs(token)]
            full.logprobs += delta.logprobs
            full.cumulative_logprob = -1.0 * len(full.token_ids) + full.index  # the last answer is the best
        if token != EOS and self.has_text:
            self.raw += bytes([token])
            full.text = self.raw.decode("utf-8", "ignore")
        if token == EOS and not params.ignore_eos:
            full.finish_reason = "stop"
        elif token in (params.stop_token_ids or ()):
            full.finish_reason, full.stop_reason = "stop", token
        elif hit := next((s for s in params.stops if s in full.text), None):
            full.text = full.text[: full.text.index(hit) + len(hit) * params.include_stop_str_in_output]
            full.finish_reason, full.stop_reason = "stop", hit
        elif len(full.token_ids) >= (params.max_tokens or 16):
            full.finish_reason = "length"
        delta.text = full.text[before:]
        delta.finish_reason, delta.stop_reason = full.finish_reason, full.stop_reason
        return delta

    def _logprobs(self, token: int) -> dict[int, Logprob]:
        return _entries(token, self.params.logprobs or 0)


def _entries(token: int, num_top: int) -> dict[int, Logprob]:
    """The token itself at -1, the alternatives (next letters) at -1.5, -2, ..."""
    entries = {token: Logprob(-1.0, 1, chr(token))}
    for rank in range(2, num_top + 1):
        other = (token + rank - 1) % 256
        entries[other] = Logprob(-0.5 - rank / 2, rank, chr(other))
    return entries
