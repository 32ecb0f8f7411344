from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tiny_server import TinyServer, completion, delta, event, usage

from octavo.cli.app import run
from octavo.cli.talk import Answer, read_chunk
from octavo.errors import ServerError

ROOT = Path(__file__).resolve().parents[2]


async def echo_count(body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Says how many messages there were."""
    yield delta(f"{len(body['messages'])} ")
    yield delta("messages", "stop")
    yield usage(prompt=5, output=3)
    yield event(b"[DONE]")


def chat(server: TinyServer, lines: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo", "chat", "--url", server.url, *flags]
    return subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_piped_chat_keeps_its_history_and_obeys() -> None:
    lines = "hello\nagain\n/reset\nfresh\n/system Be kind\nwho\n/unknown\n/exit\nnever\n"
    with TinyServer(echo_count) as server:
        done = chat(server, lines, "--temperature", "0", "--max-tokens", "7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 messages", "3 messages", "1 messages", "2 messages"]
    assert "3 tokens, first after" in done.stderr
    assert "There is no /unknown." in done.stderr
    last = server.asked[-1][1]
    assert last["messages"] == [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "who"}]
    assert (last["temperature"], last["max_tokens"], last["model"]) == (0.0, 7, "tiny")


def test_a_refused_turn_is_forgotten_and_the_chat_goes_on() -> None:
    calls = 0

    async def refuse_second(body: dict[str, Any]) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        if calls == 2:
            yield event({"error": {"message": "too long"}})
            return
        async for piece in echo_count(body):
            yield piece

    with TinyServer(refuse_second) as server:
        done = chat(server, "one\ntwo\nthree\n")
    assert done.stdout.splitlines() == ["1 messages", "3 messages"]
    assert "error: the server ended the stream: too long" in done.stderr
    assert done.returncode == 1, "a pipe is told that one line was not answered"


def test_complete_streams_to_stdout_and_reads_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def stream(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield completion(" of")
        yield completion(" paper", "length")
        yield event(b"[DONE]")

    with TinyServer(stream) as server:
        assert run(["complete", "made", "--url", server.url]) == 0
        monkeypatch.setattr("sys.stdin", io.StringIO("piped\n"))
        assert run(["complete", "--url", server.url]) == 0
    captured = capsys.readouterr()
    assert captured.out == " of paper\n of paper\n"
    assert "2 tokens" in captured.err
    assert "cut at the token limit" in captured.err
    assert [body["prompt"] for path, body in server.asked if "completions" in path] == ["made", "piped"]


def test_what_is_no_text_is_not_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff\n"), encoding="utf-8"))
    assert run(["complete", "--url", "http://127.0.0.1:1"]) == 2
    assert "stdin is no text in utf-8: invalid start byte at byte 3" in capsys.readouterr().err


def test_summary_counts_rate_after_the_first_token() -> None:
    answer = Answer(asked_at=10.0)
    assert answer.summary() == "no tokens"
    answer.first_at, answer.last_at, answer.num_tokens = 10.5, 12.5, 5
    assert answer.summary() == "5 tokens, first after 500 ms, 2.0 tok/s"


def test_events_that_are_errors_or_nonsense() -> None:
    with pytest.raises(ServerError, match="gone"):
        read_chunk(b'{"error": {"message": "gone"}}')
    with pytest.raises(ServerError, match="no JSON"):
        read_chunk(b"<html>")
    assert read_chunk(b'{"choices": [{"delta": {"role": "assistant"}}]}').text == ""
