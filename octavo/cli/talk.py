"""Who answers `octavo chat` and `octavo complete`: a server at --url, or an engine started here."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from octavo.cli.client import Server, error_message, fetch_json, raise_for_status, request
from octavo.cli.flags import flag_name
from octavo.config import DEFAULT_MODEL, EngineConfig
from octavo.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

Message = dict[str, str]
TEMPERATURE = 0.3  # of an engine started here whose model recommends none: small models ramble at 1

UrlOption = Annotated[
    str | None, Option("--url", help="Talk to the server at this address instead of loading a model.", metavar="URL")
]
TemperatureOption = Annotated[
    float | None, Option(help="0 is greedy; default: the model's or server's own, else 0.3.", min=0.0, metavar="X")
]
TopPOption = Annotated[
    float | None, Option(help="Keep the most likely tokens of this mass.", min=0.0, max=1.0, metavar="X")
]
ApiKeyOption = Annotated[str | None, Option("--api-key", help="Key for --url.", metavar="KEY", envvar="OPENAI_API_KEY")]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What may be set from the command line; None leaves it to the model's own defaults."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None

    def given(self) -> dict[str, Any]:
        """The settings that were set."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True)
class Answer:
    """One answer while it comes: its text and when things happened, in seconds of time.monotonic()."""

    asked_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    last_at: float | None = None
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None

    def add(self, text: str, num_tokens: int) -> None:
        """Takes a piece as it arrives."""
        now = time.monotonic()
        if self.first_at is None and (text or num_tokens):
            self.first_at = now
        self.last_at = now
        self.text += text
        self.num_tokens += num_tokens

    def summary(self) -> str:
        """Tokens, time to first token, and tokens per second after it."""
        if self.first_at is None or self.last_at is None:
            return "no tokens"
        parts = [f"{self.num_tokens} tokens", f"first after {(self.first_at - self.asked_at) * 1000:.0f} ms"]
        decoding = self.last_at - self.first_at
        if self.num_tokens > 1 and decoding > 0:
            parts.append(f"{(self.num_tokens - 1) / decoding:.1f} tok/s")
        if self.finish_reason == "length":
            parts.append("cut at the token limit")
        return ", ".join(parts)


async def show(pieces: AsyncGenerator[str, None]) -> None:
    """Writes the pieces of an answer to stdout as they come."""
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()


async def open_talker(
    config: EngineConfig, url: str | None, api_key: str | None, *, chats: bool = False, chat_template: str | None = None
) -> Talker:
    """The server at `url`, checked to be there, or an engine of `config`, loaded.

    Raises ConfigError when flags of an engine come with a url, or when an engine that `chats` has no template.
    """
    if url is not None:
        refuse_engine_flags(config)
        if chat_template is not None:
            raise ConfigError("--chat-template belongs to an engine, but --url names a server with its own: give one")
        server = Server.parse(url, api_key=api_key)
        served = await served_model(server)
        return ServerTalker(server, served if config.model == DEFAULT_MODEL else config.model)
    from octavo.engine.async_engine import AsyncEngine

    engine = await AsyncEngine.start(config, chat_template=chat_template)
    if chats and engine.chat_template is None:
        await engine.shutdown()
        raise ConfigError(
            f"{config.model} has no chat template, so it cannot chat: use `octavo complete`, or give "
            "--chat-template FILE"
        )
    return EngineTalker(engine)


def refuse_engine_flags(config: EngineConfig) -> None:
    """Raises ConfigError when a flag shapes an engine although --url names one that runs already."""
    default = EngineConfig()
    for name in (f.name for f in fields(EngineConfig) if f.name != "model"):
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(f"{flag_name(name)} shapes an engine, but --url names one that runs: give one")


async def served_model(server: Server) -> str:
    """The first model a server lists. Raises ServerError when it lists none."""
    listed = await fetch_json(server, "GET", "/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"{server.url}/v1/models lists no model") from error


class EngineTalker:
    """An engine process of our own. Answers come in pieces; `answer` is filled as they do."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._count = 0

    def chat(self, messages: list[Message], sampling: Sampling, answer: Answer) -> AsyncGenerator[str, None]:
        engine = self._engine
        assert engine.chat_template is not None, "checked by open_talker"
        assert engine.tokenizer is not None, "a template comes with a tokenizer"
        text = engine.chat_template.render([dict(m) for m in messages], add_generation_prompt=True)
        # the template writes the special tokens itself
        return self._generate(engine.tokenizer.encode(text, add_special_tokens=False), sampling, answer)

    def complete(self, prompt: str, sampling: Sampling, answer: Answer) -> AsyncGenerator[str, None]:
        return self._generate(prompt, sampling, answer)

    async def close(self) -> None:
        await self._engine.shutdown()

    async def _generate(self, prompt: str | list[int], sampling: Sampling, answer: Answer) -> AsyncGenerator[str, None]:
        from octavo.sampling_params import RequestOutputKind, SamplingParams

        defaults = {"temperature": TEMPERATURE, "max_tokens": None} | self._engine.ready.generation_defaults
        settings = defaults | sampling.given()
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **settings)
        self._count += 1
        async for output in self._engine.generate(prompt, params, f"cli-{self._count}"):
            delta = output.outputs[0]
            answer.add(delta.text, len(delta.token_ids))
            answer.finish_reason = delta.finish_reason or answer.finish_reason
            yield delta.text


class ServerTalker:
    """The same of a server that speaks OpenAI's API."""

    def __init__(self, server: Server, model: str) -> None:
        self._server = server
        self._model = model

    def chat(self, messages: list[Message], sampling: Sampling, answer: Answer) -> AsyncGenerator[str, None]:
        return self._stream("/v1/chat/completions", {"messages": messages}, sampling, answer)

    def complete(self, prompt: str, sampling: Sampling, answer: Answer) -> AsyncGenerator[str, None]:
        return self._stream("/v1/completions", {"prompt": prompt}, sampling, answer)

    async def close(self) -> None:
        """Nothing to let go of: each request has its own connection."""

    async def _stream(
        self, path: str, body: dict[str, Any], sampling: Sampling, answer: Answer
    ) -> AsyncGenerator[str, None]:
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}} | sampling.given()
        async with request(self._server, "POST", path, body) as response:
            await raise_for_status(response, self._server.url + path)
            num_chunks = 0
            async for data in response.events():
                if data == b"[DONE]":
                    break
                chunk = read_chunk(data)
                if chunk.usage_tokens is not None:
                    answer.num_tokens = chunk.usage_tokens
                if chunk.text:
                    num_chunks += 1
                    answer.add(chunk.text, 0)
                    yield chunk.text
                answer.finish_reason = chunk.finish_reason or answer.finish_reason
            answer.num_tokens = answer.num_tokens or num_chunks


Talker = EngineTalker | ServerTalker


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event of a streamed answer brought."""

    text: str
    finish_reason: str | None
    usage_tokens: int | None  # completion tokens
    prompt_tokens: int | None


def read_chunk(data: bytes) -> Chunk:
    """Reads one event of a chat or completions stream. Raises ServerError for an error event or what is no JSON."""
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ServerError(f"the server sent an event that is no JSON: {data[:200]!r}") from error
    if "error" in event:
        raise ServerError(f"the server ended the stream: {error_message(data)}")
    usage = event.get("usage") or {}
    choice = (event.get("choices") or [{}])[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return Chunk(text, choice.get("finish_reason"), usage.get("completion_tokens"), usage.get("prompt_tokens"))
