"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same path as a chat.

A request becomes a ChatRequest, what a chat answers becomes content blocks; events and errors have Anthropic's shapes.
"""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from octavo import sampling_params as limits
from octavo.outputs import CompletionOutput
from octavo.server import protocol
from octavo.server.chat import Chat
from octavo.server.chunks import encode
from octavo.server.errors import Failure
from octavo.server.protocol import Count, FunctionName, JsonSchema, Name, StopString, Strict, StringOrList, Text
from octavo.server.tools import Delta, whole_message

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CACHE = {"cache_control": ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"})}  # prefixes are cached anyway
_BLOCKS = {"<text>", "<tool_use>", "<tool_result>", "<thinking>"}


def _block_kind(value: object) -> str:
    kind = f"<{value.get('type')}>" if isinstance(value, dict) else f"<{getattr(value, 'type', 'text')}>"
    return kind if kind in _BLOCKS else "<text>"


class TextBlock(Strict):
    """Text."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {**_CACHE, "citations": ([],)}

    type: Literal["text"]
    text: Text


class ThinkingBlock(Strict):
    """What the model thought before."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class ToolUseBlock(Strict):
    """A call that the model made before."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = _CACHE

    type: Literal["tool_use"]
    id: Name
    name: FunctionName
    input: JsonSchema


Texts = StringOrList[Text, Annotated[list[TextBlock], Field(max_length=protocol.MAX_PARTS)]]


class ToolResultBlock(Strict):
    """What a call gave."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = _CACHE

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Texts | None = None
    is_error: bool | None = None  # the model reads "Error: " before it


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(_block_kind),
]


class Turn(Strict):
    """One turn of the conversation."""

    role: Literal["user", "assistant"]
    content: StringOrList[Text, Annotated[list[Block], Field(min_length=1, max_length=protocol.MAX_PARTS)]]


class CustomTool(Strict):
    """A function that the model may call."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {**_CACHE, "eager_input_streaming": (True,)}

    name: FunctionName
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    input_schema: JsonSchema
    type: Literal["custom"] | None = None
    strict: bool | None = None


class Choice(Strict):
    """Whether and which tool must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    _consistent = protocol.goes_with("name", type="tool")


class Thinking(Strict):
    """For how many tokens the model may think; adaptive: as it likes."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None

    _consistent = protocol.goes_with("budget_tokens", type="enabled")


class OutputFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")


class OutputConfig(Strict):
    """What the answer looks like."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {"effort": ()}

    format: OutputFormat | None = None


class Metadata(Strict):
    """Whose request it is."""

    user_id: Annotated[str, Field(max_length=512)] | None = None


class CountRequest(Strict):
    """Body of POST /v1/messages/count_tokens."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {**_CACHE, "mcp_servers": ([],), "container": ()}

    model: Name
    messages: Annotated[list[Turn], Field(min_length=1, max_length=protocol.MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[CustomTool], Field(max_length=protocol.MAX_TOOLS)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def as_chat(self) -> dict[str, Any]:
        """The same as a chat's body."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system)})
        for turn in self.messages:
            messages += _turn(turn)
        chat: dict[str, Any] = {"model": self.model, "messages": messages}
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:  # the answer goes on with it
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.thinking is not None and self.thinking.type != "adaptive":
            chat["max_thinking_tokens"] = self.thinking.budget_tokens or 0
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.tools:
            functions = (
                {"name": t.name, "description": t.description, "parameters": t.input_schema, "strict": t.strict}
                for t in self.tools
            )
            chat["tools"] = [{"type": "function", "function": function} for function in functions]
        if self.tool_choice is not None:
            named = {"type": "function", "function": {"name": self.tool_choice.name}}
            kind = self.tool_choice.type
            chat["tool_choice"] = named if kind == "tool" else "required" if kind == "any" else kind
            if self.tool_choice.disable_parallel_tool_use:
                chat["parallel_tool_calls"] = False
        return chat


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **CountRequest.refused,
        "service_tier": ("auto", "standard_only"),
    }

    max_tokens: Count
    stop_sequences: Annotated[list[StopString], Field(max_length=limits.MAX_STOP)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    top_p: protocol.TopP | None = None
    metadata: Metadata | None = None

    def as_chat(self) -> dict[str, Any]:
        """The same as a chat's body."""
        same = ("max_tokens", "stream", "temperature", "top_k", "top_p")
        chat = {**super().as_chat(), **{name: getattr(self, name) for name in same}, "stop": self.stop_sequences}
        chat["user"] = self.metadata.user_id if self.metadata else None
        return chat


class Messages(Chat):
    """A chat that answers with content blocks."""

    async def _whole(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._outputs()) as outputs:
            async for _, output in outputs:
                self.usage.add_prompt(output)
                answer = output.outputs[0]
                self.usage.completion_tokens += len(answer.token_ids)
        content = _content(whole_message(self.deltas(answer)))
        yield encode({**self._message(), "content": content, **self._stop(answer), "usage": self._usage()})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        blocks, begun = _Blocks(), False
        async with aclosing(self._outputs()) as outputs:
            async for _, output in outputs:
                parts: list[bytes] = []
                if not begun:
                    begun = True
                    self.usage.add_prompt(output)
                    start = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None}
                    parts.append(_event("message_start", message={**start, "usage": self._usage()}))
                answer = output.outputs[0]
                self.usage.completion_tokens += len(answer.token_ids)
                for delta in self.deltas(answer):
                    parts += blocks.add(delta)
                if answer.finish_reason is not None:
                    parts += blocks.close()
                    parts.append(_event("message_delta", delta=self._stop(answer), usage=self._usage()))
                    parts.append(_event("message_stop"))
                if parts:
                    yield b"".join(parts)

    def broken(self, failure: Failure) -> bytes:
        """The event that ends a stream with an error."""
        return b"event: error\ndata: " + failure.anthropic_body(self.caller.request_id) + b"\n\n"

    def _message(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._head["model"]}

    def _stop(self, answer: CompletionOutput) -> dict[str, Any]:
        reason = STOP_REASONS.get(str(self._ending(0, answer)["finish_reason"]), "end_turn")
        if self.messages and self.messages[0].num_calls and reason == "end_turn":
            reason = "tool_use"
        sequence = answer.stop_reason if isinstance(answer.stop_reason, str) else None
        return {"stop_reason": "stop_sequence" if sequence is not None else reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        usage = self.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


class _Blocks:
    """Content blocks as events: one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: str | None = None

    def add(self, delta: Delta) -> Iterator[bytes]:
        """The events of one more piece of a message."""
        if "reasoning_content" in delta:
            yield from self._grow("thinking", delta["reasoning_content"])
        elif "content" in delta:
            yield from self._grow("text", delta["content"])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                name = call["function"]["name"]
                yield from self._begin({"type": "tool_use", "id": call["id"], "name": name, "input": {}})
            json_delta = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
            yield _event("content_block_delta", index=self._index, delta=json_delta)

    def close(self) -> Iterator[bytes]:
        """Ends the open block."""
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._index)

    def _grow(self, kind: str, text: str) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._begin({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
        yield _event("content_block_delta", index=self._index, delta={"type": f"{kind}_delta", kind: text})

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self.close()
        self._index += 1
        self._open = block["type"]
        yield _event("content_block_start", index=self._index, content_block=block)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A chat's message as blocks."""
    blocks: list[dict[str, Any]] = []
    if thought := message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", ()):
        function = call["function"]
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):  # max_tokens cut it, or it is no JSON
            arguments = {}
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content or ())


def _turn(turn: Turn) -> Iterator[dict[str, Any]]:
    """One turn as a chat's messages: the results of calls are messages of their own, and come first."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    texts, calls, thoughts = [], [], []
    for block in turn.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            failed = "Error: " if block.is_error else ""
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": failed + _text(block.content)}
    if texts or calls or thoughts:
        message: dict[str, Any] = {"role": turn.role, "content": "\n".join(texts)}
        if calls:
            message["tool_calls"] = calls
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        yield message
