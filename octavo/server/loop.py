"""The loop that serves the application: the address, TLS, slow connections, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.errors import ConfigError, EngineDeadError
from octavo.server.address import bind
from octavo.server.wire import Wire

if TYPE_CHECKING:
    from octavo.server.front import Front

KEEP_ALIVE_SECONDS = 75
DRAIN_SECONDS = 30
DRAIN_POLL_SECONDS = 0.05
DEAD_SECONDS = 5.0  # of telling everybody, before a server whose engine is gone for good ends
CLOSE_SECONDS = 5  # for the last bytes, when nothing is generated any more


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate chain and its key, as PEM files.

    Raises ConfigError when they cannot be read or do not belong together.
    """

    certfile: Path
    keyfile: Path

    def __post_init__(self) -> None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certfile, self.keyfile)
        except OSError as error:  # ssl's errors are OSErrors
            raise ConfigError(f"--ssl-certfile {self.certfile} --ssl-keyfile {self.keyfile}: {error}") from error


async def run_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[int], None] | None = None,
    drain_seconds: int = DRAIN_SECONDS,
    tls: Tls | None = None,
    head_seconds: float = KEEP_ALIVE_SECONDS,
) -> None:
    """Serves until SIGINT or SIGTERM, then refuses new requests and gives open answers `drain_seconds` to end; a second
    signal gives none.

    What is open after that ends with the error that the engine was shut down. Port 0 takes a free one; `ready` is
    called with the real port once connections are accepted. A connection on which no request arrives for twice
    `head_seconds` is closed, however slowly it sends.

    Raises ConfigError when the address cannot be bound, EngineDeadError some seconds after the engine is gone for good.
    Prints nothing.
    """
    front: Front = app.state.front
    listener = bind(host, port)
    config = uvicorn.Config(
        Wire.under(app),
        # h11 bounds the head of a request (64 KiB), which httptools, if installed, would not
        http=type("Connection", (_Connection,), {"head_seconds": head_seconds}),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        server_header=False,
        lifespan="off",
        ssl_certfile=tls.certfile if tls else None,
        ssl_keyfile=tls.keyfile if tls else None,
    )
    with listener:
        server = _Server(config, front, drain_seconds, ready)
        await server.serve(sockets=[listener])
    if server.dead_since is not None:
        raise EngineDeadError(front.engine.dead)


class _Connection(H11Protocol):
    """uvicorn's, which waits for ever for the rest of a head; this one looks twice and hangs up."""

    head_seconds: float = KEEP_ALIVE_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to look."""
        super().connection_made(transport)
        self._seen: object = self  # the exchange that was over at the last look, None before the first; self: none was
        self._look = self.loop.call_later(self.head_seconds, self._is_anybody_there)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends it."""
        self._look.cancel()
        super().connection_lost(exc)

    def _is_anybody_there(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self.cycle is self._seen:
            self.transport.abort()
            return
        self._seen = self.cycle if waiting else self
        self._look = self.loop.call_later(self.head_seconds, self._is_anybody_there)


class _Server(uvicorn.Server):
    """uvicorn, with word when it is ready, a drain that ends answers properly, and signals that only end the loop: who
    called us cleans up afterwards."""

    def __init__(
        self, config: uvicorn.Config, front: Front, drain_seconds: float, ready: Callable[[int], None] | None
    ) -> None:
        super().__init__(config)
        self._front = front
        self._drain_seconds = drain_seconds
        self._ready = ready
        self.dead_since: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Calls `ready` once connections are accepted."""
        await super().startup(sockets)
        if self._ready and sockets:
            self._ready(sockets[0].getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        """Ends the loop some time after the engine's end, too."""
        if self._front.engine.dead and self.dead_since is None:
            self.dead_since = time.monotonic()
        if self.dead_since is not None and time.monotonic() - self.dead_since > DEAD_SECONDS:
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new requests, lets open answers end in time, then accepts no more and ends the others by ending the
        engine."""
        self._front.draining = True
        deadline = time.monotonic() + self._drain_seconds
        while self.server_state.tasks and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        for server in self.servers:
            server.close()
        if self.server_state.tasks:
            await self._front.engine.shutdown()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second does not wait."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but the signals are not raised again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
