"""Server-sent events of a stream, byte by byte as OpenAI sends them.

A token without logprobs, the common case, is two prepared byte strings around its encoded text. Everything else goes
through a dictionary.
"""

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.outputs import RequestOutput
from octavo.server.answer import DONE

encode = msgspec.json.encode


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request, over its prompts and answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def add_prompt(self, output: RequestOutput) -> None:
        """Counts a prompt, once."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Timing:
    """When the prompts of one HTTP request were served; vLLM's names, milliseconds."""

    arrival: float = math.inf
    first_token: float = math.inf
    last_token: float = 0.0
    queue_seconds: float = 0.0

    def add(self, output: RequestOutput) -> None:
        """Takes the last output to a prompt."""
        times = output.metrics
        if times is None or times.first_token_time is None or times.last_token_time is None:
            return
        self.arrival = min(self.arrival, times.arrival_time)
        self.first_token = min(self.first_token, times.first_token_time)
        self.last_token = max(self.last_token, times.last_token_time)
        self.queue_seconds = max(self.queue_seconds, times.queue_seconds)

    def as_dict(self, num_tokens: int) -> dict[str, float] | None:
        """The `metrics` object of an answer of `num_tokens` tokens; None when there was no token."""
        if not num_tokens or self.last_token == 0.0:
            return None
        decode = self.last_token - self.first_token
        whole = self.last_token - self.arrival
        return {
            "time_to_first_token_ms": 1e3 * (self.first_token - self.arrival),
            "generation_time_ms": 1e3 * decode,
            "queue_time_ms": 1e3 * self.queue_seconds,
            "mean_itl_ms": 1e3 * decode / max(num_tokens - 1, 1),
            "tokens_per_second": num_tokens / whole if whole > 0 else 0.0,
        }


class ChunkWriter:
    """Writes the chunks of one stream.

    Args:
        head: the fields every chunk begins with (id, object, created, model).
        num_choices: prompts x n.
        chat: the text is {"delta": {"content": text}} of a choice; else {"text": text}.
        usage: None leaves the field out; else every chunk carries it, null unless `continuous`.
    """

    def __init__(
        self, head: dict[str, Any], num_choices: int, *, chat: bool, usage: Usage | None, continuous: bool = False
    ) -> None:
        self._head = head
        self._chat = chat
        self._usage = usage
        self._continuous = continuous
        before = b"data: " + encode(head)[:-1] + b',"choices":[{"index":'
        behind = b',"delta":{"content":' if chat else b',"text":'
        self._before = [before + str(index).encode() + behind for index in range(num_choices)]
        self._after = b"}" if chat else b""
        self._after += b',"logprobs":null,"finish_reason":null}]'
        self._after += b"}\n\n" if usage is None else b',"usage":null}\n\n'

    def text(self, index: int, text: str) -> bytes:
        """A chunk with text and nothing else."""
        if self._continuous:
            return self.choice(index, text)
        return self._before[index] + encode(text) + self._after

    def choice(
        self, index: int, text: str, *, logprobs: Any = None, finish_reason: str | None = None, **fields: Any
    ) -> bytes:
        """A chunk with text and what else a choice may carry."""
        content: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return self.chunk({"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason, **fields})

    def chunk(self, choice: dict[str, Any], **top: Any) -> bytes:
        """A chunk with this choice."""
        chunk = {**self._head, "choices": [choice], **top}
        if self._usage is not None:
            chunk["usage"] = self._usage.as_dict() if self._continuous else None
        return b"data: " + encode(chunk) + b"\n\n"

    def last(self, timing: Timing) -> bytes:
        """The chunk without choices that carries usage and times, if usage was asked for; then the end."""
        if self._usage is None:
            return DONE
        times = timing.as_dict(self._usage.completion_tokens)
        chunk = {**self._head, "choices": [], "usage": self._usage.as_dict(), "metrics": times}
        return b"data: " + encode(chunk) + b"\n\n" + DONE
