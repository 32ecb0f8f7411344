"""A small HTTP/1.1 client on asyncio streams: JSON out, JSON or server-sent events back. One connection a request.

Used by `bench serve`, and by `chat` and `complete` against a server; it times chunks as they arrive, with nothing in
between that would buffer them. Sources: RFC 9112 (HTTP/1.1), WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import ConfigError, ServerError

MAX_HEADER = 1 << 16  # bytes of one header line, and lines of a response
MAX_ERROR_BODY = 1 << 20  # bytes read of an answer that is an error
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is. `path` is what its address has before `/v1`."""

    host: str
    port: int
    secure: bool = False
    path: str = ""
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, *, api_key: str | None = None) -> Server:
        """From `http://host:port`, with or without `/v1` at its end. Raises ConfigError for what is no such address."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the address of a server: write http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), secure, path, api_key)

    @property
    def url(self) -> str:
        """The address, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}{self.path}"


class Response:
    """Status, headers (lower-case names) and a body that is read as it arrives."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in pieces, as they come off the connection."""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int((await self._reader.readline()).split(b";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._reader.readexactly(2)  # CR LF
        elif "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left > 0:
                data = await self._reader.read(min(left, 1 << 16))
                if not data:
                    raise asyncio.IncompleteReadError(b"", left)
                left -= len(data)
                yield data
        else:
            while data := await self._reader.read(1 << 16):
                yield data

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event."""
        parser = EventParser()
        async for chunk in self.chunks():
            for event in parser.feed(chunk):
                yield event

    async def body(self, limit: int | None = None) -> bytes:
        """The whole body, or its first `limit` bytes."""
        data = bytearray()
        async for chunk in self.chunks():
            data += chunk
            if limit is not None and len(data) >= limit:
                break
        return bytes(data)


class EventParser:
    """Cuts a stream of bytes into events, however they are split; keeps the `data` of each."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Events that this chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


@contextlib.asynccontextmanager
async def request(server: Server, method: str, path: str, body: Any = None) -> AsyncIterator[Response]:
    """Sends a request (`body` as JSON) and gives the response while its body is still on the way.

    Leaving the block closes the connection, which is how a stream is given up.

    Raises:
        ServerError: nobody answers there, the connection breaks, or the answer is not HTTP.
    """
    try:
        context = ssl.create_default_context() if server.secure else None
        opening = asyncio.open_connection(server.host, server.port, ssl=context, limit=MAX_HEADER)
        reader, writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
    except (OSError, TimeoutError, UnicodeError) as error:  # the last: a name that no host can have
        raise ServerError(f"no server answers at {server.url} ({error}): start one with `octavo serve`") from error
    try:
        writer.write(_encode(server, method, path, body))
        await writer.drain()
        yield await _read_head(reader)
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise ServerError(f"{server.url}{path}: the connection broke off: {error}") from error
    finally:
        writer.close()


async def fetch_json(server: Server, method: str, path: str, body: Any = None) -> Any:
    """The JSON of an answer. Raises ServerError also when the status is an error."""
    async with request(server, method, path, body) as response:
        await raise_for_status(response, server.url + path)
        data = await response.body()
    try:
        return json.loads(data)
    except ValueError as error:
        raise ServerError(f"{server.url}{path} did not answer with JSON: {data[:200]!r}") from error


async def raise_for_status(response: Response, url: str) -> None:
    """Raises ServerError with the server's own message when the status is 400 or more."""
    if response.status < 400:
        return
    data = await response.body(MAX_ERROR_BODY)
    raise ServerError(f"{url} answered {response.status}: {error_message(data)}")


def error_message(data: bytes) -> str:
    """The message in an error of OpenAI's shape, else the start of the text."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return data[:500].decode(errors="replace").strip() or "(empty)"


def _encode(server: Server, method: str, path: str, body: Any) -> bytes:
    payload = b"" if body is None else json.dumps(body).encode()
    host = f"[{server.host}]" if ":" in server.host else server.host
    lines = [
        f"{method} {server.path}{path} HTTP/1.1",
        f"Host: {host}:{server.port}",
        "Connection: close",
        "Accept: */*",
        f"Content-Length: {len(payload)}",
    ]
    if payload:
        lines.append("Content-Type: application/json")
    if server.api_key:
        lines.append(f"Authorization: Bearer {server.api_key}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + payload


async def _read_head(reader: asyncio.StreamReader) -> Response:
    status_line = await reader.readline()
    version, _, rest = status_line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"not an HTTP/1.1 answer: {status_line[:80]!r}")
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADER):
        line = await reader.readline()
        if line in (b"\r\n", b"\n", b""):
            break
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return Response(int(rest[:3]), headers, reader)
