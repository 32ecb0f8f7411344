"""A server just large enough for the client: canned answers in OpenAI's shape, and a note of what was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

Handler = Callable[[dict[str, Any]], AsyncIterator[bytes]]


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def completion(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def delta(content: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]})


def usage(prompt: int, output: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}})


class TinyServer:
    """Streams what `stream` yields for every POST; GET /v1/models lists one model. Runs in a thread."""

    def __init__(self, stream: Handler, *, framing: str = "chunked", status: int = 200) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.under_way = self.most_under_way = 0
        self._stream, self._framing, self._status = stream, framing, status
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> TinyServer:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        async with server:
            await self._stop.wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            method, path, _ = (await reader.readline()).decode().split(" ")
            length = 0
            while (line := await reader.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = json.loads(await reader.readexactly(length) or b"{}")
            self.asked.append((f"{method} {path}", body))
            if path == "/v1/models":
                await self._send_whole(writer, 200, json.dumps({"data": [{"id": "tiny"}]}).encode())
            elif self._status != 200:
                await self._send_whole(writer, self._status, json.dumps({"error": {"message": "too much"}}).encode())
            else:
                await self._send_stream(writer, body)
        except ConnectionError:
            return
        finally:
            self.under_way -= 1
            writer.close()

    async def _send_whole(self, writer: asyncio.StreamWriter, status: int, data: bytes) -> None:
        writer.write(f"HTTP/1.1 {status} Any\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    async def _send_stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        chunked = self._framing == "chunked"
        framing = "Transfer-Encoding: chunked\r\n" if chunked else ""
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n".encode())
        async for piece in self._stream(body):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
