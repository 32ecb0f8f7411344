"""What every endpoint needs: the engine, the names it serves under, and the way from a body to prompt ids and
SamplingParams. What is wrong with a request is refused here, with the limit in the message.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fastapi import Request

from octavo.errors import ContextLengthError, InvalidValueError, UnknownModelError, UnsupportedParameterError
from octavo.outputs import RequestOutput
from octavo.sampling_params import Pooling, RequestOutputKind, SamplingParams
from octavo.server.errors import Failure, Refused, unavailable
from octavo.server.keys import Key
from octavo.server.protocol import ChatRequest, EngineRequest, GenerationRequest, TokenizeRequest
from octavo.server.tools import Form
from octavo.text.chat import cut_at_open_end, plain_message, with_open_end
from octavo.text.tokenizer import LONG_TEXT, refuse_hopeless

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine
    from octavo.engine.outbox import Relay
    from octavo.text.tokenizer import Tokenizer

PING_SECONDS = 15.0  # of silence in a stream
# of SamplingParams, what a body has under the same name and with the same meaning
SAMPLING = {"best_of", *GenerationRequest.__annotations__} & {f.name for f in fields(SamplingParams)}
SAMPLING -= {"max_tokens", "logit_bias", "structured_outputs"}
RESERVED_KWARGS = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and under which id."""

    request_id: str
    key: Key

    @classmethod
    def of(cls, request: Request) -> Caller:
        """What Door and Gate found out about a request."""
        return cls(request.state.request_id, request.state.key)


@dataclass(slots=True)
class Front:
    """One server: an engine under its served names."""

    engine: AsyncEngine
    model_names: list[str]
    ping_seconds: float = PING_SECONDS
    tool_form: Form | None = None  # how the model writes calls
    reasoning_parser: str | None = None
    draining: bool = False  # running answers end, new ones are refused
    created: int = field(default_factory=lambda: int(time.time()))
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def unready(self) -> Failure | None:
        """Why this server should get no new requests now, if it should not."""
        engine = self.engine
        if self.draining:
            return unavailable("the server is shutting down: ask another one", "draining")
        if engine.dead:
            return unavailable(f"the engine is not running: {engine.dead}", "engine_dead")
        if engine.restarting:
            return unavailable(f"the engine is being loaded again: {engine.restarting}", "loading")
        if engine.progress().stage == "stalled":
            return unavailable("the engine has work and makes no progress; it will be restarted", "stalled")
        return None

    def admit(self, request: Request) -> Caller:
        """Who asks for something to be computed. Raises Refused when the server is shutting down."""
        if self.draining and (failure := self.unready()):
            raise Refused(failure)
        return Caller.of(request)

    def model(self, asked: str | None) -> str:
        """The name to answer under. Raises UnknownModelError for one that is not served."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            served = ", ".join(self.model_names)
            raise UnknownModelError(f"the model {asked!r} is not served here; served: {served}", param="model")
        return asked

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InvalidValueError when this server takes token ids only."""
        if self.engine.tokenizer is None:
            raise InvalidValueError(
                "this server runs without a tokenizer: send token ids as prompt to /v1/completions", param="prompt"
            )
        return self.engine.tokenizer

    def generate(
        self,
        ids: list[int],
        params: SamplingParams,
        body: EngineRequest,
        request_id: str,
        key: Key,
        pooling: Pooling | None = None,
        relay: Relay | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Hands a prompt to the engine. Clients may repeat their ids; the engine's get a number behind."""
        key.spend(len(ids))
        return self.engine.generate(
            ids,
            params,
            f"{request_id}-{next(self._numbers)}",
            priority=body.priority or 0,
            cache_salt=key.salt(body.cache_salt),
            tenant=key.tenant or body.user or "",
            weight=key.weight,
            timeout=body.timeout,
            pooling=pooling,
            on_tokens=key.spend if key.tokens else None,
            relay=relay,
        )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; a long one is tokenised off the event loop, which goes on meanwhile."""
        tokenizer = self.tokenizer
        if len(text) < LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def prompt_ids(self, prompt: str | list[int], body: EngineRequest, param: str, *, room: int = 1) -> list[int]:
        """Checked token ids of a prompt, the last `truncate_prompt_tokens` of them where that is asked for (-1: as many
        as leave `room` for the answer). A text that is too long whatever its tokens are is refused without counting
        them.

        Raises ContextLengthError, InvalidValueError.
        """
        most = body.truncate_prompt_tokens
        if isinstance(prompt, str):
            if most is None:
                refuse_hopeless(self.tokenizer, prompt, self.engine.max_model_len, param=param)
            prompt = await self.encode(prompt, add_special_tokens=body.add_special_tokens)
        if most is not None:
            most = max(self.engine.max_model_len - room, 1) if most < 0 else most
            prompt = prompt[max(len(prompt) - most, 0) :]
        self.check_ids(prompt, param)
        return prompt

    async def render(self, body: ChatRequest | TokenizeRequest) -> str:
        """The messages of `body` as one prompt, through the model's chat template."""
        if self.engine.tokenizer is None:
            raise InvalidValueError("this server runs without a tokenizer, so it cannot chat", param="messages")
        messages = [_template_message(message.model_dump(exclude_none=True)) for message in body.messages or ()]
        kwargs: Mapping[str, Any] = body.chat_template_kwargs or {}
        for name in kwargs:
            if name in RESERVED_KWARGS or name.endswith("_token"):
                raise InvalidValueError(f"{name} cannot be set here", param="chat_template_kwargs")
        tools = None
        if isinstance(body, ChatRequest) and body.tools and body.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
        opened, continues = body.add_generation_prompt, body.continue_final_message
        asked = with_open_end(messages) if continues else messages
        text = await self.engine.render(asked, tools=tools, add_generation_prompt=opened, **kwargs)
        return cut_at_open_end(text, messages) if continues else text

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises InvalidValueError for an empty prompt or an id that the model does not have."""
        vocab_size = self.engine.ready.vocab_size
        if not ids:
            raise InvalidValueError("the prompt is empty: give at least one token", param=param)
        if max(ids) >= vocab_size:
            raise InvalidValueError(f"token id {max(ids)} is outside the vocabulary of {vocab_size}", param=param)

    def max_tokens(self, num_prompt: int, asked: int | None, *, default: int | None, param: str) -> int:
        """How many tokens to generate at most; `default` None is the rest of the context.

        Raises ContextLengthError with the numbers when it cannot fit.
        """
        limit = self.engine.max_model_len
        room = limit - num_prompt
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens; the context is {limit} tokens, of which at least one is for the "
                f"answer: shorten the prompt by {1 - room}",
                param=param,
            )
        if asked is not None and asked > room:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and max_tokens is {asked}, together {num_prompt + asked}; the "
                f"context is {limit} tokens: shorten the prompt or lower max_tokens to {room}",
                param=param,
            )
        return asked or min(room, default or room)

    def check_priority(self, body: EngineRequest) -> None:
        """Raises UnsupportedParameterError for one that nothing would heed."""
        if body.priority and (policy := self.engine.config.scheduling_policy) != "priority":
            why = f"this server runs --scheduling-policy {policy}, which knows no priority: leave it out"
            raise UnsupportedParameterError(why, param="priority")

    def sampling_params(self, body: GenerationRequest, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """SamplingParams of a body; what it leaves out comes from the model's generation_config, then from OpenAI."""
        engine, most = self.engine, self.engine.config.max_logprobs
        name = "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
        for asked, param in ((logprobs, name), (body.prompt_logprobs, "prompt_logprobs")):
            if asked is not None and asked > most:
                raise InvalidValueError(
                    f"{asked} {param} were asked for; this server gives at most {most}", param=param
                )
        self.check_priority(body)
        if body.stop and engine.tokenizer is None:
            raise UnsupportedParameterError("stop strings need a tokenizer: use stop_token_ids", param="stop")
        given = {name: value for name in SAMPLING if (value := getattr(body, name, None)) is not None}
        params = SamplingParams(
            **{**({} if body.use_beam_search else engine.ready.generation_defaults), **given},
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(token): bias for token, bias in body.logit_bias.items()} if body.logit_bias else None,
            structured_outputs=body.structure(),
            detokenize=engine.tokenizer is not None,
            output_kind=RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
        )
        params.check_vocabulary(engine.ready.vocab_size)
        return params


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates know it: the arguments of calls are mappings, not JSON."""
    for call in message.get("tool_calls", ()):
        # a model may have written what is no JSON, or nests without end: shown as it is
        with contextlib.suppress(ValueError, RecursionError):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return plain_message(message)
