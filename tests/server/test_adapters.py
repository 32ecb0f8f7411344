"""Clients that people use, unchanged: LangChain's OpenAI adapter and Simon Willison's `llm`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import HERMES_CALL, FakeEngine
from live_server import Server

from octavo.server.tools import TOOL_PARSERS


@pytest.fixture
def langchain(serve: Callable[..., Server]) -> Iterator[Callable[..., Any]]:
    """The adapter's chat with a server; its connections are closed before the servers."""
    adapter = pytest.importorskip("langchain_openai")
    http = httpx.Client()

    def chat(server: Server, **kwargs: Any) -> Any:
        options = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "http_client": http}
        return adapter.ChatOpenAI(model="fake", **options, **kwargs)

    yield chat
    http.close()


def test_langchain_invokes_and_streams(serve, langchain) -> None:
    server = serve(FakeEngine(answer=b"Hello."))
    chat = langchain(server, max_tokens=60, stream_usage=True)
    answer = chat.invoke([("system", "be"), ("user", "hi")])
    assert (answer.content, answer.response_metadata["finish_reason"]) == ("Hello.", "stop")
    prompt = len("<system>be\n<user>hi\n<assistant>")
    assert (answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]) == (prompt, 7)
    chunks = list(chat.stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == "Hello."
    assert len(chunks) > 6
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 7


def test_langchain_binds_tools(serve, langchain) -> None:
    server = serve(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    tool = {"name": "time", "description": "Now", "parameters": {"type": "object", "properties": {}}}
    chat = langchain(server, max_tokens=100).bind_tools([tool])
    [call] = chat.invoke("hi").tool_calls
    assert (call["name"], call["args"]) == ("time", {"zone": "CET"})
    pieces = list(chat.stream("hi"))
    assert len(pieces) > 20
    assert sum(pieces[1:], pieces[0]).tool_calls[0]["args"] == {"zone": "CET"}
    forced = serve(FakeEngine(answer=b'[{"name": "time", "parameters": {"zone": "CET"}}]'))
    chat = langchain(forced, max_tokens=100).bind_tools([tool], tool_choice="required")
    assert [call["name"] for call in chat.invoke("hi").tool_calls] == ["time"]


def test_langchain_asks_for_a_schema(serve, langchain) -> None:
    server = serve(FakeEngine(answer=b'{"city": "Bern"}'))
    schema = {"title": "Place", "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    chat = langchain(server, max_tokens=60).with_structured_output(schema, method="json_schema")
    assert chat.invoke("hi") == {"city": "Bern"}
    assert server.engine.seen[0].params.structured_outputs.chosen[1]["required"] == ["city"]


def test_llm_on_the_command_line(serve, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    server = serve(FakeEngine(answer=b"Hello."))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: octavo\n  model_name: fake\n  api_base: {server.url}/v1\n  api_key_name: octavo\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    command = [sys.executable, "-m", "llm", "-m", "octavo", "--key", "none", "-o", "max_tokens", "60", "-s", "be", "hi"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "Hello."), done.stderr
    [asked] = server.engine.seen
    assert bytes(asked.prompt).decode() == "<system>be\n<user>hi\n<assistant>"
