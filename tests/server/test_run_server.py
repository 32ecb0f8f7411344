"""Binding, readiness and ending of the server loop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from fake_engine import FakeEngine
from uvicorn.server import ServerState

from octavo.errors import ConfigError
from octavo.server.address import bind
from octavo.server.app import create_app
from octavo.server.loop import _Connection, run_server


def make_app():
    return create_app(FakeEngine(), served_model_names=["fake"])


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on .*:{port} .* in use.*--port"):
            asyncio.run(run_server(make_app(), port=port))


def test_an_address_is_nobody_else_s_before_anything_is_served() -> None:
    """Two servers that start together: the second is told so, and not by its loop."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on .*:{port} .* in use"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "word"),
    [("256.0.0.1", 0, "256.0.0.1"), ("192.0.2.1", 0, "192.0.2.1"), ("127.0.0.1", 1 << 20, "65535")],
)
def test_an_impossible_address_is_a_config_error(host: str, port: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        asyncio.run(run_server(make_app(), host=host, port=port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_and_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    ports = []

    def ready(port: int) -> None:
        ports.append(port)
        os.kill(os.getpid(), number)

    asyncio.run(run_server(make_app(), port=0, ready=ready))
    assert ports[0] > 0
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("drain_seconds", "num_signals", "whole"), [(600, 1, True), (0, 1, False), (600, 2, False)])
def test_open_streams_end_in_time_or_with_an_error(drain_seconds: int, num_signals: int, whole: bool) -> None:
    """The signals come in the middle of an answer, which goes on only where it should come whole."""
    engine = FakeEngine(held_after=5)
    app = create_app(engine, served_model_names=["fake"])
    got: list[str] = []

    def read(port: int) -> None:
        body = {"prompt": "a", "max_tokens": 20, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                got.append(line)
                if len(got) == 1:
                    for _ in range(num_signals):
                        os.kill(os.getpid(), signal.SIGTERM)
                        while not app.state.front.draining:  # two at once would be one
                            time.sleep(0.002)
                    if whole:
                        engine.held_after = None

    client: list[threading.Thread] = []

    def ready(port: int) -> None:
        client.append(threading.Thread(target=read, args=(port,)))
        client[0].start()

    asyncio.run(run_server(app, port=0, ready=ready, drain_seconds=drain_seconds))
    client[0].join()
    events = [line for line in got if line]
    assert events[-1] == "data: [DONE]"
    assert ('finish_reason":"length' in events[-2]) == whole
    assert ("the engine was shut down" in events[-2]) != whole


def test_loopback_is_the_default(serve) -> None:
    server = serve()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.port))


class Wire(asyncio.Transport):
    """The other end of a connection: what was sent, and whether we hung up."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def test_a_connection_in_use_is_never_hung_up_on() -> None:
    """Each look finds it between two requests, but never between the same two; then nothing more comes."""

    async def use() -> None:
        async def app(scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
        config.load()
        connection, wire = _Connection(config, ServerState(), {}), Wire()
        connection.connection_made(wire)
        connection._is_anybody_there()
        for number in range(1, 5):
            connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while wire.sent.count(b" 204 ") < number or not connection.cycle.response_complete:
                await asyncio.sleep(0)
            connection._is_anybody_there()
            assert not wire.aborted
        connection._is_anybody_there()
        assert wire.aborted
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(use(), 10))
