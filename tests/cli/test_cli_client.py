from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_server import TinyServer, completion, event

from octavo.cli.client import EventParser, Server, fetch_json, raise_for_status, request
from octavo.errors import ConfigError, ServerError

STREAM = b"data: one\n\ndata: two\r\n\r\n: comment\ndata: three\ndata: lines\n\nevent: x\n\ndata:four\n\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    parser = EventParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    found = [e for a, b in pairwise(edges) for e in parser.feed(STREAM[a:b])]
    assert found == [b"one", b"two", b"three\nlines", b"four"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("127.0.0.1:9", "http://127.0.0.1:9"),
        ("https://example.org/api/v1/", "https://example.org:443/api"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    assert Server.parse(url).url == expected


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://host:99999", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Server.parse(url)


async def two_events(body: dict[str, Any]) -> AsyncIterator[bytes]:
    first = completion("a") + completion("b")
    yield first[:20]
    yield first[20:]
    yield event(b"[DONE]")


@pytest.mark.parametrize("framing", ["chunked", "until close"])
def test_streams_in_every_framing(framing: str) -> None:
    async def read() -> list[bytes]:
        async with request(Server.parse(server.url), "POST", "/v1/completions", {"a": 1}) as response:
            return [data async for data in response.events()]

    with TinyServer(two_events, framing=framing) as server:
        assert asyncio.run(read())[-1] == b"[DONE]"
        assert asyncio.run(fetch_json(Server.parse(server.url), "GET", "/v1/models")) == {"data": [{"id": "tiny"}]}
    assert server.asked[0] == ("POST /v1/completions", {"a": 1})


def test_an_error_answer_carries_the_servers_words() -> None:
    async def read() -> None:
        async with request(Server.parse(server.url), "POST", "/v1/completions", {}) as response:
            await raise_for_status(response, "there")

    with TinyServer(two_events, status=429) as server, pytest.raises(ServerError, match="there answered 429: too much"):
        asyncio.run(read())


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"no server answers at .*octavo serve"):
            asyncio.run(fetch_json(Server.parse(url), "GET", "/v1/models"))


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
def test_what_is_no_whole_http_answer_is_an_error(answer: bytes) -> None:
    async def read() -> None:
        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(reply, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await fetch_json(Server.parse(url), "GET", "/v1/models")

    with pytest.raises(ServerError, match="broke off"):
        asyncio.run(read())
