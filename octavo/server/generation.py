"""One generating HTTP request: its prompts go to the engine, its answer comes back whole or as events.

Chat and completions differ in how a choice looks and how a stream opens; those are the methods of the subclasses.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from octavo.errors import InvalidValueError
from octavo.outputs import CompletionOutput, Logprob
from octavo.sampling_params import SamplingParams
from octavo.server.answer import DONE, Answer, Outputs, merge
from octavo.server.chunks import ChunkWriter, Timing, Usage, encode
from octavo.server.errors import Failure
from octavo.server.front import Caller, Front
from octavo.server.logprobs import LogprobsWriter
from octavo.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from octavo.server.tools import Message

MAX_LOGPROBS = 1 << 22  # numbers in an answer in one piece: 280 bytes each until it is written


class Generation(ABC):
    """A checked request. `prompts` are token ids; choice `prompt * n + i` is the i-th answer to a prompt.

    Streams send a chunk when there is text; a token that completes no character brings none, except with logprobs or
    `return_token_ids`, where every token is told.
    """

    body: ChatRequest | CompletionRequest
    object: str  # OpenAI's name of the answer
    chunk_object: str
    is_chat: bool

    def __init__(
        self,
        front: Front,
        caller: Caller,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        id: str,
    ) -> None:
        self.front = front
        self.caller = caller
        self.body = body
        self.prompts = prompts
        self.params = params
        self.id = id
        self.n = body.n or 1
        self.num_choices = len(prompts) * self.n
        self.timing = Timing()
        self.messages: list[Message] | None = None  # by choice, where text is not all there is
        self.is_named = False  # a function that must be called
        self._has_opened = False  # the stream's first chunks are sent
        self._is_plain = False  # its chunks tell text alone
        self._answer: Answer
        self._writer: ChunkWriter
        self.usage = Usage()
        self.told: dict[int, list[dict[int, Logprob] | None] | None] = {}  # of each prompt, where asked for
        self._head = {"id": id, "created": int(time.time()), "model": front.model(body.model)}
        self.writers: list[LogprobsWriter] | None = None  # by choice
        if params.logprobs is not None and body.logprobs is not None and body.logprobs is not False:
            most = self.num_choices * (params.max_tokens or 0) * (params.logprobs + 1)
            if not body.stream and most > MAX_LOGPROBS:
                raise InvalidValueError(
                    f"this answer may have {most} log probabilities; one in a piece has at most {MAX_LOGPROBS}: stream "
                    "it, or ask for fewer, for fewer answers, or a smaller max_tokens",
                    param="logprobs",
                )
            tokenizer = front.engine.tokenizer
            unseen = tokenizer.special_ids if tokenizer and params.skip_special_tokens else frozenset()
            self.writers = [
                LogprobsWriter(tokenizer, params.logprobs, as_ids=bool(body.return_tokens_as_token_ids), unseen=unseen)
                for _ in range(self.num_choices)
            ]

    @abstractmethod
    def choice(self, number: int, output: CompletionOutput) -> dict[str, Any]:
        """What a finished choice to prompt `number` carries besides index, logprobs and the reasons it ended."""

    @abstractmethod
    def opening(self, writer: ChunkWriter, number: int) -> list[bytes]:
        """The chunks that come before the first text to prompt `number`."""

    @abstractmethod
    def shape(self, writer: LogprobsWriter, number: int, output: CompletionOutput) -> dict[str, Any]:
        """The logprobs of an output to prompt `number`, as this endpoint shows them."""

    def top(self) -> dict[str, Any]:
        """What a whole answer carries beside its choices."""
        return {}

    def answer(self) -> Answer:
        """The HTTP response."""
        stream = bool(self.body.stream)
        parts = self._events() if stream else self._whole()
        self._answer = Answer(parts, broken=self.broken, stream=stream, ping_seconds=self.front.ping_seconds)
        return self._answer

    def broken(self, failure: Failure) -> bytes:
        """What ends a stream in which something went wrong."""
        return b"data: " + failure.body() + b"\n\n" + DONE

    def _outputs(self) -> Outputs:
        generate, key = self.front.generate, self.caller.key
        relay = self._relay if self.body.stream and len(self.prompts) == 1 else None
        return merge([generate(ids, self.params, self.body, self.id, key, relay=relay) for ids in self.prompts])

    async def _whole(self) -> AsyncGenerator[bytes, None]:
        usage = self.usage
        choices = []
        async with aclosing(self._outputs()) as outputs:
            async for number, output in outputs:
                usage.add_prompt(output)
                self.timing.add(output)
                usage.completion_tokens += output.num_generated
                self.told[number] = output.prompt_logprobs
                choices += [self._finished(number, answer) for answer in output.outputs]
        choices.sort(key=lambda choice: choice["index"])
        times = self.timing.as_dict(usage.completion_tokens)
        end = {"choices": choices, "usage": usage.as_dict(), "metrics": times, **self.top()}
        yield encode({**self._head, "object": self.object, **end})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        usage, options = self.usage, self.body.stream_options or StreamOptions()
        writer = self._writer = ChunkWriter(
            {**self._head, "object": self.chunk_object},
            self.num_choices,
            chat=self.is_chat,
            usage=usage if options.include_usage else None,
            continuous=bool(options.continuous_usage_stats),
        )
        self._is_plain = self.messages is None and self.writers is None and not self.body.return_token_ids
        begun = [False] * len(self.prompts)
        num_left = len(self.prompts)
        async with aclosing(self._outputs()) as outputs:
            async for number, output in outputs:
                parts = []
                if not begun[number]:
                    begun[number] = True
                    usage.add_prompt(output)
                    self.told[number] = output.prompt_logprobs
                    parts = self.opening(writer, number)
                parts += [self._chunks(writer, number, answer) for answer in output.outputs]
                if output.finished:
                    self.timing.add(output)
                    num_left -= 1
                    parts += [] if num_left else [writer.last(self.timing)]
                if part := b"".join(parts):
                    yield part
                self._has_opened = True

    def _relay(self, new: CompletionOutput) -> bool:
        """Sends what came while `_events` waits, without waking it. Its first output and its last are its own."""
        wire = self._answer.wire
        if not self._has_opened or wire is None or not wire.is_free:
            return False
        if self._is_plain and new.text:  # what most are: no further function for it
            self.usage.completion_tokens += len(new.token_ids)
            wire.write(self._writer.text(new.index, new.text))
        elif part := self._chunks(self._writer, 0, new):
            wire.write(part)
        return True

    def _chunks(self, writer: ChunkWriter, number: int, answer: CompletionOutput) -> bytes:
        """The chunks of what came of an answer to prompt `number`; counts its tokens."""
        self.usage.completion_tokens += len(answer.token_ids)
        index = number * self.n + answer.index
        chunks = b""
        if self.messages is not None:
            chunks = b"".join(self._message_parts(writer, index, answer))
        elif answer.token_ids and (self.writers is not None or self.body.return_token_ids):
            chunks = writer.choice(index, answer.text, **self._token_fields(index, answer))
        elif answer.text:
            chunks = writer.text(index, answer.text)
        if answer.finish_reason is not None:
            chunks += writer.choice(index, "", **self._ending(index, answer))
        return chunks

    def _finished(self, number: int, answer: CompletionOutput) -> dict[str, Any]:
        index = number * self.n + answer.index
        choice = {"index": index, **self.choice(number, answer), "logprobs": None}  # counts calls, before the ending
        return {**choice, **self._token_fields(index, answer), **self._ending(index, answer)}

    def _message_parts(self, writer: ChunkWriter, index: int, answer: CompletionOutput) -> list[bytes]:
        """The chunks of some more text of a message that may hold thoughts and calls."""
        assert self.messages is not None
        deltas = self.messages[index].feed(answer.text, last=answer.finish_reason is not None)
        fields = {"logprobs": None, **(self._token_fields(index, answer) if answer.token_ids else {})}
        if not deltas and fields.keys() == {"logprobs"} and fields["logprobs"] is None:
            return []
        first, *others = deltas or [{}]
        chunks = [{"index": index, "delta": first, "finish_reason": None, **fields}]
        chunks += [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in others]
        return [writer.chunk(chunk) for chunk in chunks]

    def _ending(self, index: int, answer: CompletionOutput) -> dict[str, Any]:
        reason = answer.finish_reason
        if reason == "stop" and not self.is_named and self.messages and self.messages[index].num_calls:
            reason = "tool_calls"
        return {"finish_reason": reason, "stop_reason": answer.stop_reason}

    def _token_fields(self, index: int, answer: CompletionOutput) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.writers is not None:
            fields["logprobs"] = self.shape(self.writers[index], index // self.n, answer)
        if self.body.return_token_ids:
            fields["token_ids"] = answer.token_ids
        return fields
