"""Health says what is so: live, ready, stalled, loading, dead, draining. Silent streams are kept alive."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator

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
    app = create_app(FakeEngine(token_seconds=0.04), served_model_names=["fake"])
    got: dict[str, object] = {}

    def client(port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        body = {**COMPLETION, "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            got["new"] = httpx.post(f"{url}/v1/completions", json=COMPLETION)
            got["ready"] = httpx.get(f"{url}/health/ready")
            got["live"] = httpx.get(f"{url}/health/live")
            got["end"] = [line for line in lines if line][-2:]

    threads: list[threading.Thread] = []

    def ready(port: int) -> None:
        threads.append(threading.Thread(target=client, args=(port,)))
        threads[0].start()

    asyncio.run(run_server(app, port=0, ready=ready, drain_seconds=5))
    threads[0].join()
    for name in ("new", "ready"):
        assert got[name].status_code == 503
        assert got[name].json()["error"]["code"] == "draining"
    assert got["live"].status_code == 200
    assert 'finish_reason":"length' in got["end"][0]
    assert got["end"][1] == "data: [DONE]"


def test_a_server_without_an_engine_tells_everybody_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DEAD_SECONDS", 0.3)
    engine = FakeEngine()
    seen = []

    def ready(port: int) -> None:
        engine.dead = "killed too often"
        threading.Thread(target=lambda: seen.append(httpx.get(f"http://127.0.0.1:{port}/health"))).start()

    with pytest.raises(EngineDeadError, match="killed too often"):
        asyncio.run(run_server(create_app(engine, served_model_names=["fake"]), port=0, ready=ready))
    assert seen[0].status_code == 503


def test_silent_streams_are_kept_alive() -> None:
    ask = Inside(FakeEngine(token_seconds=0.12), ping_seconds=0.05)
    streamed = ask("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 2, "stream": True})
    events = streamed.text.split("\n\n")
    assert events[0] == ": still here", "before the first token, too"
    assert 3 <= events.count(": still here") <= 6
    assert [e[:5] for e in events if e and e != ": still here"] == ["data:"] * 4
    whole = ask("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 2})
    assert "still here" not in whole.text
    quiet = Inside(FakeEngine(token_seconds=0.12), ping_seconds=0)
    assert (
        "still here" not in quiet("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 2, "stream": True}).text
    )


def test_an_error_after_a_ping_is_in_the_stream() -> None:
    ask = Inside(FakeEngine(token_seconds=0.2, fail_after=1, failure=EngineDeadError("gone")), ping_seconds=0.05)
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


def test_a_client_that_takes_nothing_is_given_up(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing; once the buffers are full, nothing moves for STUCK_SECONDS, and its request is aborted."""
    import socket

    from octavo.server import answer

    monkeypatch.setattr(answer, "STUCK_SECONDS", 0.3)
    engine = FakeEngine(answer=b"x" * 100_000, token_seconds=0, max_model_len=200_000)
    server = serve(engine, ping_seconds=0.1)
    body = b'{"prompt": "a", "max_tokens": 100000, "stream": true, "return_token_ids": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head % len(body) + body)
        deadline = time.monotonic() + 10
        while not engine.aborted:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert server.http.post("/v1/completions", json=COMPLETION).status_code == 200
