"""The front's end of the channel (channel.py), apart from it so that the engine process does without asyncio."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import IO, Any

from octavo.engine.channel import encode, take_frames


class FrontChannel(asyncio.Protocol):
    """The front's end, on its event loop. Messages wait for receive(), or deliver() hands them on as they arrive."""

    _socket: asyncio.WriteTransport
    _pipe: asyncio.BaseTransport

    def __init__(self) -> None:
        self._received = bytearray()
        self._messages: deque[Any] = deque()
        self._take: Callable[[Any], None] = self._messages.append
        self._news = asyncio.Event()
        self._lost = asyncio.Event()
        self._error: Exception | None = None

    @classmethod
    async def open(cls, sock: socket.socket, pipe: IO[bytes]) -> FrontChannel:
        """Wraps a connected socket to write to, and the pipe to read."""
        loop = asyncio.get_running_loop()
        writer, _ = await loop.create_unix_connection(asyncio.Protocol, sock=sock)
        reader, channel = await loop.connect_read_pipe(cls, pipe)
        channel._socket, channel._pipe = writer, reader
        return channel

    def data_received(self, data: bytes) -> None:
        """The loop's. What cannot be read, or taken, ends the channel."""
        self._received += data
        try:
            for message in take_frames(self._received):
                self._take(message)
        except Exception as error:  # told to whoever waits
            self._error = error
            self._socket.abort()
            self._pipe.close()
        if self._messages or self._error:
            self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The loop's: everything was read."""
        self._lost.set()
        self._news.set()

    def send(self, message: object) -> None:
        """Queues a message; the loop writes it."""
        if not self._socket.is_closing():
            self._socket.write(encode(message))

    async def receive(self) -> Any | None:
        """The next message, or None when the engine is gone. Raises what is wrong with what came."""
        while not (self._messages or self._error or self._lost.is_set()):
            self._news.clear()
            await self._news.wait()
        if self._messages:
            return self._messages.popleft()
        if self._error:
            raise self._error
        return None

    async def deliver(self, take: Callable[[Any], None]) -> None:
        """Hands every message to `take` where it arrives, until the engine is gone: no task is woken for it. Raises
        what `take` raises."""
        while self._messages:
            take(self._messages.popleft())
        self._take = take
        try:
            await self.receive()
        finally:
            self._take = self._messages.append

    async def close(self) -> None:
        """Closes both ways; the engine process ends on it."""
        self._socket.close()
        self._pipe.close()
        await self._lost.wait()
