"""Health says what is so: live, ready, stalled, loading, dead, draining. Silent streams are kept alive."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable

import httpx
import pytest
from fake_engine import FakeEngine
from inside import Inside

from octavo.errors import EngineDeadError
from octavo.server import loop
from octavo.server.answer import PING, Answer
from octavo.server.app import create_app
from octavo.server.loop import run_server

COMPLETION = {"prompt": "ab", "max_tokens": 8}


def test_a_ready_server() -> None:
    ask = Inside()
    for path in ("/health", "/health/live", "/health/ready"):
        assert ask("GET", path).json() == {"status": "ok"}
        head = ask("HEAD", path)
        assert (head.status_code, head.content) == (200, b"")
    answer = ask("GET", "/health/progress").json()
    assert answer["draining"] is False
    assert answer["progress"]["stage"] == "idle"
    assert {"last_step_age", "oldest_waiting", "expected_step", "stall_limit"} <= answer["progress"].keys()


@pytest.mark.parametrize(
    ("attribute", "value", "code"),
    [("dead", "it is gone", "engine_dead"), ("restarting", "it is gone", "loading"), ("stage", "stalled", "stalled")],
)
def test_an_unready_server(attribute: str, value: str, code: str) -> None:
    ask = Inside()
    setattr(ask.engine, attribute, value)
    for path in ("/health", "/health/ready"):
        answer = ask("GET", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
        assert answer.headers["retry-after"] == "5"
        assert ask("HEAD", path).status_code == 503
    assert ask("GET", "/health/live").status_code == 200, "this process need not be killed"
    assert ask("GET", "/health/progress").status_code == 200


def test_a_drain_refuses_the_new_and_ends_the_old() -> None:
    """The signal comes in the middle of a stream; from then on new requests get 503, and the stream ends whole."""
    engine = FakeEngine(held_after=5)
    app = create_app(engine, served_model_names=["fake"])
    got: dict[str, object] = {}

    def client(port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        body = {**COMPLETION, "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            while not app.state.front.draining:
                time.sleep(0.002)
            got["new"] = httpx.post(f"{url}/v1/completions", json=COMPLETION)
            got["ready"] = httpx.get(f"{url}/health/ready")
            got["live"] = httpx.get(f"{url}/health/live")
            engine.held_after = None
            got["end"] = [line for line in lines if line][-2:]

    threads: list[threading.Thread] = []

    def ready(port: int) -> None:
        threads.append(threading.Thread(target=client, args=(port,)))
        threads[0].start()

    asyncio.run(run_server(app, port=0, ready=ready, drain_seconds=600))
    threads[0].join()
    for name in ("new", "ready"):
        assert got[name].status_code == 503
        assert got[name].json()["error"]["code"] == "draining"
    assert got["live"].status_code == 200
    assert 'finish_reason":"length' in got["end"][0]
    assert got["end"][1] == "data: [DONE]"


def test_a_server_without_an_engine_tells_everybody_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in its own time, which is over here once it has told."""
    monkeypatch.setattr(loop, "DEAD_SECONDS", 600)
    engine = FakeEngine()
    seen = []

    def ask(port: int) -> None:
        seen.append(httpx.get(f"http://127.0.0.1:{port}/health", timeout=60))
        monkeypatch.setattr(loop, "DEAD_SECONDS", 0)

    def ready(port: int) -> None:
        engine.dead = "killed too often"
        threading.Thread(target=ask, args=(port,)).start()

    with pytest.raises(EngineDeadError, match="killed too often"):
        asyncio.run(run_server(create_app(engine, served_model_names=["fake"]), port=0, ready=ready))
    assert seen[0].status_code == 503


def watch(ask: Inside, see: Callable[[bytes], None]) -> None:
    """Has each part of an answer seen when it is sent."""
    app = ask.app

    async def watched(scope: dict, receive: Callable, send: Callable) -> None:
        async def sending(message: dict) -> None:
            see(message.get("body", b""))
            await send(message)

        await app(scope, receive, sending)

    ask.app = watched


def test_silent_streams_are_kept_alive() -> None:
    """The first token comes after two pings, the second after two more."""
    engine = FakeEngine(held_after=0)
    ask = Inside(engine, ping_seconds=0.01)
    pings = [0, 0]  # before the first token, behind it

    def see(body: bytes) -> None:
        if body == PING:
            pings[engine.held_after or 0] += 1
            if pings[0] >= 2 and engine.held_after == 0:
                engine.held_after = 1
            elif pings[1] >= 2:
                engine.held_after = None

    watch(ask, see)
    streamed = ask("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 2, "stream": True})
    events = streamed.text.split("\n\n")
    assert events[:2] == [": still here"] * 2, "before the first token, too"
    assert events.count(": still here") >= 4
    assert [e[:5] for e in events if e and e != ": still here"] == ["data:"] * 4
    whole = Inside(FakeEngine(token_seconds=0.05), ping_seconds=0.01)
    assert "still here" not in whole("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 2}).text
    quiet = Inside(FakeEngine(token_seconds=0.05), ping_seconds=0)
    assert (
        "still here" not in quiet("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 2, "stream": True}).text
    )


def test_an_error_after_a_ping_is_in_the_stream() -> None:
    engine = FakeEngine(held_after=0, fail_after=0, failure=EngineDeadError("gone"))
    ask = Inside(engine, ping_seconds=0.01)
    watch(ask, lambda body: setattr(engine, "held_after", None) if body == PING else None)
    answer = ask("POST", "/v1/completions", json={**COMPLETION, "stream": True})
    assert answer.status_code == 200
    assert '"code":"engine_dead"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_no_ping_comes_behind_the_end() -> None:
    """A client takes nothing for a while, so a ping waits behind a part; then it takes all, and the stream ends."""
    sent: list[dict] = []
    free = asyncio.Event()

    async def send(message: dict) -> None:
        await free.wait()
        assert not sent or sent[-1].get("more_body", True), "the answer has ended"
        sent.append(message)

    async def receive() -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    async def parts() -> AsyncGenerator[bytes, None]:
        yield b"data: a\n\n"

    async def use() -> None:
        asyncio.get_running_loop().call_later(0.1, free.set)
        stream = Answer(parts(), broken=lambda failure: b"", stream=True, ping_seconds=0.02)
        await stream({"type": "http", "state": {"request_id": "r"}}, receive, send)

    asyncio.run(use())
    bodies = [message["body"] for message in sent[1:]]
    assert bodies in ([b"data: a\n\n", b""], [b"data: a\n\n", PING, b""])


@pytest.mark.parametrize("ping_seconds", [0.1, 0])
def test_a_client_that_takes_nothing_is_given_up(serve, monkeypatch: pytest.MonkeyPatch, ping_seconds: float) -> None:
    """It reads nothing; once the buffers are full, nothing moves for STUCK_SECONDS, and its request is aborted."""
    import socket

    from octavo.server import answer

    monkeypatch.setattr(answer, "STUCK_SECONDS", 0.3)
    engine = FakeEngine(answer=b"x" * 100_000, token_seconds=0, max_model_len=200_000)
    server = serve(engine, ping_seconds=ping_seconds)
    body = b'{"prompt": "a", "max_tokens": 100000, "stream": true, "return_token_ids": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head % len(body) + body)
        deadline = time.monotonic() + 60
        while not engine.aborted:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert server.http.post("/v1/completions", json=COMPLETION).status_code == 200
