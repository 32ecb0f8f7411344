"""Anthropic's API, through its official client: messages, events, tools, thoughts, counts and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import HERMES_CALL, FakeEngine
from inside import Inside

from octavo.errors import EngineDeadError, QueueFullError
from octavo.server.keys import KeyEntry, Keyring
from octavo.server.tools import TOOL_PARSERS

anthropic = pytest.importorskip("anthropic", minversion="2")
httpx = pytest.importorskip("httpx2")  # what that client speaks through
ASK = {"model": "fake", "max_tokens": 60, "messages": [{"role": "user", "content": "hi"}]}
HOUR = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
TOOLS = [
    {
        "name": "time",
        "description": "Now",
        "input_schema": {"type": "object", "properties": {"zone": {"type": "string"}}},
    }
]


def client_of(ask: Inside, use: Callable[[Any], Any], key: str = "none") -> Any:
    async def run() -> Any:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(ask.app, raise_app_exceptions=False))
        options = {"base_url": "http://octavo", "api_key": key, "max_retries": 0, "http_client": http}
        async with anthropic.AsyncAnthropic(**options) as client:
            return await use(client)

    return asyncio.run(run())


def create(ask: Inside, **changes: Any) -> Any:
    return client_of(ask, lambda client: client.messages.create(**{**ASK, **changes}))


def streamed(ask: Inside, **changes: Any) -> Any:
    """The message that the client puts together from the events, and their types."""

    async def use(client: Any) -> Any:
        types = []
        async with client.messages.stream(**{**ASK, **changes}) as stream:
            async for event in stream:
                types.append(event.type)
            return await stream.get_final_message(), types

    return client_of(ask, use)


def test_text_whole_and_streamed() -> None:
    ask = Inside(FakeEngine(answer=b"Hello."))
    message = create(ask)
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello.")]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    prompt = len("<user>hi\n<assistant>")
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == prompt
    assert message.usage.output_tokens == 7
    other, types = streamed(ask)
    assert [block.text for block in other.content] == ["Hello."]
    assert other.usage.output_tokens == 7
    assert other.id.startswith("msg_")
    raw = [t for t in types if t.startswith(("message", "content"))]
    assert raw[0] == "message_start"
    assert raw[-1] == "message_stop"
    assert "content_block_delta" in raw


@pytest.mark.parametrize("get", [create, lambda ask, **changes: streamed(ask, **changes)[0]])
def test_why_it_stopped(get: Callable[..., Any]) -> None:
    ask = Inside(FakeEngine(answer=b"Hello."))
    assert get(ask, max_tokens=2).stop_reason == "max_tokens"
    stopped = get(ask, stop_sequences=["o"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "o", "Hell")


@pytest.mark.parametrize("get", [create, lambda ask, **changes: streamed(ask, **changes)[0]])
def test_tools_and_thoughts(get: Callable[..., Any]) -> None:
    ask = Inside(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    message = get(ask, tools=TOOLS, max_tokens=100)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert (message.content[1].name, message.content[1].input) == ("time", {"zone": "CET"})
    assert message.stop_reason == "tool_use"
    for choice, kind in (({"type": "any"}, "array"), ({"type": "tool", "name": "time"}, "object")):
        forced = Inside(FakeEngine(answer=b'{"name": "time", "parameters": {}}'))
        message = get(forced, tools=TOOLS, tool_choice=choice)
        assert forced.engine.seen[0].params.structured_outputs.chosen[1]["type"] == kind
        assert (message.content[0].type, message.stop_reason) == ("tool_use", "tool_use")
    ask = Inside(FakeEngine(answer=b"<think>Hm.</think>Yes."), reasoning_parser="qwen3")
    message = get(ask)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Hm."


def test_a_tool_s_input_comes_piece_by_piece() -> None:
    ask = Inside(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    raw = ask("POST", "/v1/messages", json={**ASK, "tools": TOOLS, "max_tokens": 100, "stream": True}).text
    events = [json.loads(event.split("data: ", 1)[1]) for event in raw.strip().split("\n\n")]
    pieces = [event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("partial_json")]
    assert pieces == list('{"zone": "CET"}')
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_answer_has_the_form_that_was_asked_for() -> None:
    ask = Inside(FakeEngine(answer=b'{"city": "Rome"}'))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    create(ask, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert ask.engine.seen[-1].params.structured_outputs.json == schema


def test_thinking_is_limited_and_strict_tools_are_bound() -> None:
    ask = Inside(FakeEngine(), reasoning_parser="qwen3", tool_form=TOOL_PARSERS["hermes"])
    for thinking, most in (({"type": "enabled", "budget_tokens": 9}, 9), ({"type": "disabled"}, 0)):
        create(ask, thinking=thinking)
        assert ask.engine.seen[-1].params.max_thinking_tokens == most
    create(ask, thinking={"type": "adaptive"}, tools=[{**TOOLS[0], "strict": True}])
    params = ask.engine.seen[-1].params
    assert params.max_thinking_tokens is None
    assert '{"const": "time"}' in params.structured_outputs.grammar


def test_the_conversation_becomes_a_chat() -> None:
    seen = []

    class Template:
        def render(self, messages, *, tools=None, add_generation_prompt=True):
            seen.append((messages, tools))
            return "prompt"

    engine = FakeEngine()
    engine.chat_template = Template()
    ask = Inside(engine, tool_form=TOOL_PARSERS["hermes"])
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": ""},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t1", "name": "time", "input": {"zone": "CET"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "12:00"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no such zone", "is_error": True},
                {"type": "text", "text": "c"},
            ],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "only this"}]},
        {"role": "user", "content": "d"},
    ]
    create(ask, messages=turns, system=[{"type": "text", "text": "be"}], tools=TOOLS)
    messages, tools = seen[0]
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "be"),
        ("user", "a"),
        ("assistant", "b"),
        ("tool", "12:00"),
        ("tool", "Error: no such zone"),
        ("user", "c"),
        ("assistant", ""),
        ("user", "d"),
    ]
    assert messages[6]["reasoning_content"] == "only this"
    assert messages[2]["tool_calls"][0]["function"] == {"name": "time", "arguments": {"zone": "CET"}}
    assert messages[2]["reasoning_content"] == "so"
    assert messages[3]["tool_call_id"] == "t1"
    assert tools[0]["function"]["name"] == "time"


def test_an_answer_that_is_begun_goes_on() -> None:
    engine = FakeEngine()
    ask, user = Inside(engine), ASK["messages"]
    call = {"type": "tool_use", "id": "1", "name": "time", "input": {}}
    for begun, prompt in (("He", "<assistant>He"), ([call], "<assistant>\n<assistant>")):
        create(ask, messages=[*user, {"role": "assistant", "content": begun}])
        assert bytes(engine.seen[-1].prompt).decode() == "<user>hi\n" + prompt


def test_count_tokens() -> None:
    ask = Inside()
    body = {"model": "fake", "messages": ASK["messages"], "system": "be"}
    counted = client_of(ask, lambda client: client.messages.count_tokens(**body))
    assert counted.input_tokens == len("<system>be\n<user>hi\n<assistant>")
    assert not ask.engine.seen


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": "other"}, "NotFoundError", "is not served"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
        ({"max_tokens": 4000}, "BadRequestError", "context"),
        ({"tools": TOOLS}, "BadRequestError", "--tool-call-parser"),
        (
            {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
            "BadRequestError",
            "cache_control",
        ),
        ({"service_tier": "priority"}, "BadRequestError", "service_tier"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "BadRequestError", "--reasoning-parser"),
        ({"thinking": {"type": "enabled"}}, "BadRequestError", "budget_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "BadRequestError", "type"),
        ({"tool_choice": {"type": "tool"}}, "BadRequestError", "name goes with"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "BadRequestError", "not among the tools"),
    ],
)
def test_errors_have_its_shape(change: dict, kind: str, words: str) -> None:
    with pytest.raises(getattr(anthropic, kind), match=words) as caught:
        create(Inside(), **change)
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert body["request_id"] == caught.value.response.headers["x-request-id"]


def test_keys_overload_and_broken_streams() -> None:
    ask = Inside(keyring=Keyring([KeyEntry("key-0123456789ab")]))
    with pytest.raises(anthropic.AuthenticationError):
        create(ask)
    assert client_of(ask, lambda client: client.messages.create(**ASK), key="key-0123456789ab").content
    with pytest.raises(anthropic.RateLimitError):
        create(Inside(FakeEngine(fail_after=0, failure=QueueFullError("full", retry_after=1))))
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(Inside(FakeEngine(fail_after=0)))
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (529, "overloaded_error")
    broken = Inside(FakeEngine(fail_after=2, failure=EngineDeadError("gone")))
    raw = broken("POST", "/v1/messages", json={**ASK, "stream": True}).text
    last = raw.strip().split("\n\n")[-1].split("\n")
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["error"]["type"] == "overloaded_error"
