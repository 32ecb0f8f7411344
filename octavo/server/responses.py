"""/v1/responses: OpenAI's newer API over the same path as a chat.

A request becomes a ChatRequest, what a chat answers becomes output items. What is stored is kept in memory, within
bounds, oldest first to go, and is seen by its tenant alone.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from octavo.errors import InvalidValueError, UnknownResponseError
from octavo.outputs import CompletionOutput
from octavo.sampling_params import RequestOutputKind
from octavo.server import protocol
from octavo.server.chat import Chat, chat_request, prepare
from octavo.server.chunks import encode
from octavo.server.errors import Failure
from octavo.server.front import Caller, Front
from octavo.server.protocol import Count, FunctionName, Name, Strict, StringOrList, Text, ToolWord, WordOrObject
from octavo.server.tools import Delta

MAX_STORED = 1024
MAX_STORED_BYTES = 64 << 20
Item = dict[str, Any]
_STATUS = {"length": "incomplete", "abort": "cancelled"}


class Part(Strict):
    """A piece of text, of whoever's."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {"annotations": ([],), "logprobs": ([],)}

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: Text


Parts = Annotated[list[Part], Field(max_length=protocol.MAX_PARTS)]
Content = StringOrList[Text, Parts]


_NEEDED = {
    "message": {"role", "content"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
    "reasoning": {"summary", "content"},  # either may be missing
}


class InputItem(Strict):
    """A message, a call that the model made, what that gave, or what the model thought."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {"encrypted_content": ()}

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Name | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: Name | None = None
    name: FunctionName | None = None
    arguments: Text | None = None
    output: Content | None = None
    summary: Parts | None = None

    @model_validator(mode="after")
    def _complete(self) -> InputItem:
        needed = _NEEDED[self.type]
        given = {name for name in self.model_fields_set if getattr(self, name) is not None} - {"type", "id", "status"}
        for name in sorted(needed ^ given if self.type != "reasoning" else given - needed):
            verb = "needs" if name in needed else "has no"
            raise InvalidValueError(f"a {self.type} item {verb} {name}", param=name)
        return self


class FunctionTool(protocol.Function):
    """A function that the model may call."""

    type: Literal["function"]


class NamedFunction(protocol.FunctionReference):
    """The function that must be called."""

    type: Literal["function"]


class TextFormat(Strict):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: protocol.JsonSchema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """What the answer looks like."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat = Field(default_factory=TextFormat)


_NEVER = ("conversation", "max_tool_calls", "prompt", "prompt_cache_key", "request_id", "safety_identifier")
_NEUTRAL = {"background": (False,), "include": ([],), "reasoning": ({},), "stream_options": (), "top_logprobs": (0,)}
_SERVICE = {"service_tier": ("auto", "default"), "truncation": ("disabled",)}
UNBUILT: dict[str, tuple[object, ...]] = {**dict.fromkeys(_NEVER, ()), **_NEUTRAL, **_SERVICE}


class ResponsesRequest(protocol.EngineRequest):
    """Body of POST /v1/responses."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = UNBUILT

    input: StringOrList[Text, Annotated[list[InputItem], Field(min_length=1, max_length=protocol.MAX_MESSAGES)]]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    temperature: protocol.Temperature | None = None
    top_p: protocol.TopP | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=protocol.MAX_TOOLS)] | None = None
    tool_choice: WordOrObject[ToolWord, NamedFunction] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    stream: bool | None = None
    store: bool | None = None  # default: yes
    previous_response_id: Name | None = None
    metadata: protocol.Metadata | None = None

    def items(self) -> list[Item]:
        """What is new, one by one."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [item.model_dump(exclude_none=True) for item in self.input]

    def as_chat(self, items: Iterable[Item]) -> dict[str, Any]:
        """The same, behind what was said before, as a chat's body."""
        same = ("model", "temperature", "top_p", "parallel_tool_calls", "stream", "user", "priority", "cache_salt")
        chat: dict[str, Any] = {name: getattr(self, name) for name in (*same, "timeout", "truncate_prompt_tokens")}
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        chat |= {"messages": [*system, *_messages(items)], "max_completion_tokens": self.max_output_tokens}
        if self.tools:
            functions = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in self.tools]
            chat["tools"] = [{"type": "function", "function": function} for function in functions]
        chat["tool_choice"] = self.tool_choice
        if isinstance(self.tool_choice, NamedFunction):
            chat["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        form = self.text.format.model_dump(by_alias=True, exclude_none=True)
        chat["response_format"] = {"type": form.pop("type"), "json_schema": form or None}
        return chat


def _messages(items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Items as a chat's messages; thoughts and calls are parts of the message that they belong to."""
    said: dict[str, Any] = {}
    for item in items:
        kind = item.get("type", "message")
        if said and (kind == "function_call_output" or item.get("role", "assistant") != "assistant"):
            yield said
            said = {}
        if kind == "function_call_output":
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
        elif kind == "message" and item["role"] != "assistant":
            yield {"role": item["role"], "content": _text(item["content"])}
        else:
            said = said or {"role": "assistant", "content": ""}
            if kind == "message":
                said["content"] += _text(item["content"])
            elif kind == "reasoning":
                thought = _text(item.get("content") or item.get("summary") or ())
                said["reasoning_content"] = said.get("reasoning_content", "") + thought
            else:
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                said["tool_calls"] = [*said.get("tool_calls", ()), call]
    if said:
        yield said


def _text(content: str | Iterable[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


class ResponseStore:
    """Responses by id, at most MAX_STORED of them in MAX_STORED_BYTES."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Responses] = OrderedDict()
        self._num_bytes = 0

    def begin(self, job: Responses) -> None:
        """Keeps a place for a response that runs."""
        self._jobs[job.id] = job
        self._drop(len(self._jobs) - MAX_STORED)

    def end(self, job: Responses) -> None:
        """It has ended: it stays, if its place is there still."""
        job.prompts.clear()
        if job.id in self._jobs:
            job.num_bytes = len(encode([job.response(), job.said]))
            self._num_bytes += job.num_bytes
            while self._num_bytes > MAX_STORED_BYTES:
                self._drop(1)

    def find(self, response_id: str, tenant: str) -> Responses:
        """Raises UnknownResponseError for one that is not there, or another tenant's."""
        job = self._jobs.get(response_id)
        if job is None or job.caller.key.tenant != tenant:
            raise UnknownResponseError(f"there is no response {response_id!r} here, or no longer", param="response_id")
        return job

    def remove(self, job: Responses) -> None:
        """Forgets a response."""
        self._num_bytes -= self._jobs.pop(job.id).num_bytes

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._num_bytes -= self._jobs.popitem(last=False)[1].num_bytes


class Responses(Chat):
    """A chat that answers with items. `said`: what was said before; `output`: the answer's items so far."""

    asked: ResponsesRequest
    said: list[Item]
    store: ResponseStore

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.params = replace(self.params, output_kind=RequestOutputKind.DELTA)
        self.output: list[Item] = []
        self.status = "in_progress"  # then completed, incomplete, cancelled or failed
        self.num_thought = 0  # tokens
        self.num_bytes = 0  # in the store, once it has ended
        self._number = 0  # of the next event

    def response(self) -> dict[str, Any]:
        """As it is now."""
        asked, usage = self.asked, self.usage
        same = {"instructions", "max_output_tokens", "tools", "tool_choice", "text", "previous_response_id", "metadata"}
        counts = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.num_thought},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        absent = dict.fromkeys(("instructions", "max_output_tokens", "previous_response_id", "error"))
        usual = {"tools": [], "tool_choice": "auto", "metadata": {}, "truncation": "disabled", "background": False}
        head = {"id": self.id, "object": "response", "created_at": self._head["created"], "model": self._head["model"]}
        how = {"temperature": self.params.temperature, "top_p": self.params.top_p, "store": asked.store is not False}
        return {
            **(head | absent | usual | how),
            **asked.model_dump(by_alias=True, exclude_none=True, include=same),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "status": self.status,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "output": self.output,
            "usage": None if self.status == "in_progress" else counts,
        }

    def cancel(self) -> None:
        """Ends it at its next token. Raises InvalidValueError for one that has ended."""
        if self.status != "in_progress":
            raise InvalidValueError("the response has ended: there is nothing to cancel", param="response_id")
        self.status = "cancelled"

    async def _whole(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        yield encode(self.response())

    async def _events(self) -> AsyncGenerator[bytes, None]:
        if self.asked.store is not False:
            self.store.begin(self)
        parts = [self._event(f"response.{kind}", response=self.response()) for kind in ("created", "in_progress")]
        try:
            async with aclosing(self._outputs()) as outputs:
                async for _, output in outputs:
                    if not self.usage.prompt_tokens:
                        self.usage.add_prompt(output)
                    parts += self._grow(output.outputs[0])
                    if self.status != "in_progress":
                        break
                    if parts:
                        yield b"".join(parts)
                        parts = []
            parts += self._close()
            kind = "completed" if self.status == "cancelled" else self.status
            yield b"".join([*parts, self._event(f"response.{kind}", response=self.response())])
        finally:
            if self.status == "in_progress":  # an error, or the client left
                self.status = "failed"
            self.store.end(self)

    def broken(self, failure: Failure) -> bytes:
        """The event that ends a stream with an error."""
        return self._event("error", code=failure.code, message=failure.message, param=failure.param)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        body = encode({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"

    def _grow(self, answer: CompletionOutput) -> Iterator[bytes]:
        """The events of some more of the answer."""
        self.usage.completion_tokens += len(answer.token_ids)
        for delta in self.deltas(answer):
            yield from self._add(delta)
            self.num_thought += len(answer.token_ids) if "reasoning_content" in delta else 0
        if answer.finish_reason is not None and self.status == "in_progress":
            self.status = _STATUS.get(answer.finish_reason, "completed")

    def _add(self, delta: Delta) -> Iterator[bytes]:
        if "reasoning_content" in delta:
            if self._open != "reasoning":
                yield from self._begin({"type": "reasoning", "id": _new("rs"), "summary": [], "content": []})
            yield from self._say("reasoning_text", delta["reasoning_content"])
        elif "content" in delta:
            if self._open != "message":
                yield from self._begin({"type": "message", "id": _new("msg"), "role": "assistant", "content": []})
            yield from self._say("output_text", delta["content"])
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                called = {"call_id": call["id"], "name": function["name"], "arguments": ""}
                yield from self._begin({"type": "function_call", "id": _new("fc"), **called})
            if more := function["arguments"]:
                self.output[-1]["arguments"] += more
                yield self._event("response.function_call_arguments.delta", **self._place(), delta=more)

    @property
    def _open(self) -> str | None:
        last = self.output[-1] if self.output else None
        return last["type"] if last is not None and last["status"] == "in_progress" else None

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _begin(self, item: Item) -> Iterator[bytes]:
        yield from self._close()
        self.output.append({**item, "status": "in_progress"})
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=self.output[-1])

    def _say(self, kind: str, text: str) -> Iterator[bytes]:
        content = self.output[-1]["content"]
        place = {**self._place(), "content_index": 0}
        more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        if not content:
            content.append({"type": kind, "text": "", **({"annotations": [], **more} if more else {})})
            yield self._event("response.content_part.added", **place, part=content[0])
        content[0]["text"] += text
        yield self._event(f"response.{kind}.delta", **place, delta=text, **more)

    def _close(self) -> Iterator[bytes]:
        """Ends the open item."""
        if self._open is None:
            return
        item, place = self.output[-1], self._place()
        item["status"] = "incomplete" if self.status in ("incomplete", "cancelled") else "completed"
        if self.output[-1]["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **place, **told)
        for part in item.get("content", ()):
            place["content_index"] = 0
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield self._event(f"response.{part['type']}.done", **place, text=part["text"], **more)
            yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)


def _new(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


async def respond(front: Front, store: ResponseStore, body: ResponsesRequest, caller: Caller) -> Responses:
    """Checks a request; the job that answers it. Raises UnknownResponseError for a previous one that is not there."""
    said = body.items()
    if body.previous_response_id is not None:
        before = store.find(body.previous_response_id, caller.key.tenant)
        said = [*before.said, *before.output, *said]
    own = Caller(uuid.uuid4().hex, caller.key)  # nobody may choose, or guess, the id of what is stored
    job = await prepare(Responses, front, chat_request(body.as_chat(said)), own, "resp_")
    job.asked, job.said, job.store = body, said, store
    return job
