"""The short way of a stream's pieces: the bytes of the usual way, and only while nothing stands in between."""

from __future__ import annotations

import json
import socket
import time

import pytest
from fake_engine import FakeEngine
from live_server import Server

BODY = {"prompt": "ab", "max_tokens": 30, "stream": True, "stream_options": {"include_usage": True}}


def ask(server: Server, body: dict, version: str = "1.1", receive_buffer: int = 0) -> socket.socket:
    data = json.dumps({"model": "fake", "request_id": "same", **body}).encode()
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return connection


def read(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body as they came."""
    with connection:
        data = bytearray()
        while piece := connection.recv(1 << 16):
            data += piece
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    return head.lower(), body


def unframe(body: bytes) -> list[bytes]:
    """The chunks of a chunked body, its end checked."""
    chunks, at = [], 0
    while True:
        begin = body.index(b"\r\n", at) + 2
        end = begin + int(body[at : begin - 2], 16)
        at = end + 2
        assert body[end:at] == b"\r\n"
        if begin == end:
            assert at == len(body)
            return chunks
        chunks.append(body[begin:end])


def events(data: bytes) -> list[dict | str]:
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
    found = [line if line == "[DONE]" else json.loads(line) for line in lines]
    for event in found[:-1]:
        event.pop("created")
        event.pop("metrics", None)
    return found


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"n": 2}, {"return_token_ids": True}])
def test_the_short_way_brings_the_same_events(serve, options: dict) -> None:
    server = serve()
    head, body = read(ask(server, {**BODY, **options}))
    assert b"transfer-encoding: chunked" in head
    chunks = unframe(body)
    num_relayed = server.engine.num_relayed
    assert num_relayed > 20
    assert len(chunks) > 25
    head, plain = read(ask(server, {**BODY, **options}, version="1.0"))
    assert b"transfer-encoding" not in head
    assert server.engine.num_relayed == num_relayed, "without chunks there is no short way"
    assert events(b"".join(chunks)) == events(plain)


def test_prompts_side_by_side_go_the_usual_way(serve) -> None:
    server = serve()
    chunks = unframe(read(ask(server, {**BODY, "prompt": ["ab", "c"]}))[1])
    assert server.engine.num_relayed == 0
    assert sum(b'"finish_reason":"length"' in chunk for chunk in chunks) == 2


def test_a_client_that_does_not_read_stops_the_short_way_and_misses_nothing(serve) -> None:
    """Its buffers are full of long log probabilities; then the outputs wait where they always did."""
    server = serve(FakeEngine(answer=b"y" * 13000, max_model_len=13000))
    body = {**BODY, "logprobs": 10, "max_tokens": 12000}
    connection = ask(server, body, receive_buffer=4096)
    seen, deadline = 0, time.monotonic() + 60
    while (seen == 0 or server.engine.num_relayed != seen) and time.monotonic() < deadline:  # until it relays no more
        seen = server.engine.num_relayed
        time.sleep(0.3)
    assert 0 < seen < 11990
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    told = events(b"".join(unframe(read(connection)[1])))
    assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in told[:-3]) == 12000
