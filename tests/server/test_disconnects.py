"""A client that leaves ends its request in the engine, whatever it was waiting for."""

from __future__ import annotations

import socket
import time

import pytest
from fake_engine import FakeEngine
from live_server import Server


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def leave_after(server: Server, body: str, num_bytes: int, num_running: int = 1) -> None:
    """Sends a request, reads `num_bytes` of the answer, goes away; then so many were running."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall((head + body).encode())
        wait_until(lambda: len(server.engine.running) >= num_running)
        while num_bytes > 0:
            num_bytes -= len(connection.recv(num_bytes))


@pytest.mark.parametrize(
    ("body", "num_bytes", "num_requests"),
    [
        ('{"prompt": "a", "max_tokens": 60}', 0, 1),
        ('{"prompt": "a", "max_tokens": 60, "stream": true}', 0, 1),
        ('{"prompt": "a", "max_tokens": 60, "stream": true}', 400, 1),
        ('{"prompt": ["a", "b", "c"], "max_tokens": 60}', 0, 3),
        ('{"prompt": ["a", "b", "c"], "max_tokens": 60, "stream": true}', 400, 3),
    ],
)
def test_leaving_aborts(serve, body: str, num_bytes: int, num_requests: int) -> None:
    server = serve(FakeEngine(held_after=10))  # the whole answer never comes
    leave_after(server, body, num_bytes, num_requests)
    wait_until(lambda: len(server.engine.aborted) == num_requests)
    assert not server.engine.running


def test_others_go_on_when_one_leaves(serve) -> None:
    server = serve(FakeEngine(held_after=10))
    stream = server.client.completions.create(model="fake", prompt="ab", max_tokens=40, stream=True)
    first = next(stream).choices[0].text
    leave_after(server, '{"prompt": "a", "max_tokens": 60, "stream": true}', 0, 2)
    wait_until(lambda: server.engine.aborted)
    server.engine.held_after = None
    rest = "".join(chunk.choices[0].text for chunk in stream)
    assert len(first + rest) == 40
    assert len(server.engine.aborted) == 1


def test_a_finished_request_is_not_aborted(serve) -> None:
    server = serve()
    for stream in (False, True):
        server.http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "stream": stream})
    assert server.engine.seen
    assert not server.engine.aborted


def test_a_client_that_left_is_counted_as_499(serve) -> None:
    server = serve(FakeEngine(held_after=10))
    leave_after(server, '{"prompt": "a"}', 0)
    wait_until(lambda: server.engine.aborted)
    wait_until(lambda: 'status="4xx"' in server.http.get("/metrics").text)
