"""A client that says what it is told to say, right or wrong, byte by byte, and reads what comes back."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_HEAD = 1 << 16


class HungUp(Exception):
    """The server closed the connection without an answer."""


@dataclass(slots=True)
class Reply:
    """One answer. `body` of a stream is all of it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection, made when it is needed and kept while the server keeps it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, raw: bytes, *, has_body: bool = True) -> Reply:
        """Sends bytes, reads one answer. Raises HungUp when there is none; a reused connection is tried anew once."""
        for fresh in (self._streams is None, True):
            if self._streams is None:
                self._streams = await asyncio.open_connection(self.host, self.port, limit=1 << 24)
            try:
                return await self._exchange(raw, has_body)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                self.close()
                if fresh:
                    raise HungUp(str(error)) from None
        raise AssertionError("unreachable")

    async def post(self, path: str, body: Any) -> Reply:
        """A well-formed request."""
        return await self.ask(request("POST", path, json.dumps(body).encode()))

    async def get(self, path: str) -> Reply:
        """A well-formed request."""
        return await self.ask(request("GET", path))

    def close(self) -> None:
        """Hangs up."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, raw: bytes, has_body: bool) -> Reply:
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(raw)
        lines = ["HTTP/1.1 100"]
        while lines[0].startswith("HTTP/1.1 100"):  # "go on" comes before an answer
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        reply = Reply(int(lines[0].split(" ")[1]))
        for line in filter(None, lines[1:]):
            name, _, value = line.partition(":")
            reply.headers[name.lower()] = value.strip()
        if has_body:
            reply.body = await self._body(reader, reply)
        if reply.headers.get("connection", "").lower() == "close":
            self.close()
        return reply

    async def _body(self, reader: asyncio.StreamReader, reply: Reply) -> bytes:
        if "content-length" in reply.headers:
            return await reader.readexactly(int(reply.headers["content-length"]))
        if reply.headers.get("transfer-encoding") != "chunked":
            return b"" if reply.status in (204, 304) else await reader.read()
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(parts)


def request(method: str, path: str, body: bytes | None = None, headers: tuple[str, ...] = ()) -> bytes:
    """A request as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: octavo", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + (body or b"")
