"""The application: routes to handlers, and the loop that serves it.

Routes: POST /v1/chat/completions, /v1/completions, /tokenize, /detokenize; GET /v1/models, /v1/models/{id}, /health,
/metrics, /version, /openapi.json. No documentation page: those load their scripts from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from octavo import __version__
from octavo.errors import ConfigError
from octavo.server import errors
from octavo.server.chat import chat
from octavo.server.completions import complete
from octavo.server.door import MAX_BODY_BYTES, Door
from octavo.server.front import Front
from octavo.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

KEEP_ALIVE_SECONDS = 75
DRAIN_SECONDS = 30
DRAIN_POLL_SECONDS = 0.05
CLOSE_SECONDS = 5  # for the last bytes, when nothing is generated any more


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: Annotated[str, Field(max_length=65536)]
    type: Annotated[str, Field(max_length=64)]
    param: Annotated[str, Field(max_length=65536)] | None
    code: Annotated[str, Field(max_length=64)] | None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


def create_app(engine: AsyncEngine, *, served_model_names: list[str], max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The ASGI application for an engine. The first served name is the one answers carry by default."""
    app = FastAPI(title="Octavo", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Door, metrics=engine.metrics, max_body_bytes=max_body_bytes)
    app.state.engine = engine
    errors.install(app)
    front = Front(engine, served_model_names)
    _add_generation(app, front)
    _add_text(app, front)
    _add_information(app, front)
    return app


async def run_server(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[int], None] | None = None,
    drain_seconds: int = DRAIN_SECONDS,
) -> None:
    """Serves until SIGINT or SIGTERM, then gives open answers `drain_seconds` to end; a second signal gives none.

    What is open after that ends with the error that the engine was shut down. Port 0 takes a free one; `ready` is
    called with the real port once connections are accepted.

    Raises ConfigError when the address cannot be bound. Prints nothing.
    """
    listener = _bind(host, port)
    config = uvicorn.Config(
        app,
        http="h11",  # it bounds the head of a request (64 KiB), which httptools, if installed, would not
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        server_header=False,
        lifespan="off",
    )
    with listener:
        await _Server(config, app.state.engine, drain_seconds, ready).serve(sockets=[listener])


def _add_generation(app: FastAPI, front: Front) -> None:
    @_post(app, "/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(front, body, request.state.request_id)

    @_post(app, "/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(front, body, request.state.request_id)


def _add_text(app: FastAPI, front: Front) -> None:
    @_post(app, "/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        front.model(body.model)
        text = await front.render(body) if body.prompt is None else body.prompt
        special = body.add_special_tokens
        ids = await front.encode(text, add_special_tokens=body.messages is None if special is None else special)
        strings = [front.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        counts = {"count": len(ids), "max_model_len": front.engine.max_model_len}
        return _json({**counts, "tokens": ids, "token_strs": strings})

    @_post(app, "/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        front.model(body.model)
        if body.tokens:
            front.check_prompt_ids(body.tokens, "tokens")
        return _json({"prompt": front.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _add_information(app: FastAPI, front: Front) -> None:
    engine = front.engine

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_card(front, name) for name in front.model_names]})

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def model(model: Annotated[str, Field(max_length=256)]) -> Response:
        return _json(_card(front, front.model(model)))

    @app.get("/health", responses=_ERRORS)
    async def health() -> Response:
        if engine.dead is not None:
            return errors.engine_dead(engine.dead).response()
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type=engine.metrics.content_type)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})


_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}


def _post(app: FastAPI, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return app.post(path, responses=_ERRORS)


def _card(front: Front, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": front.created,
        "owned_by": "octavo",
        "root": front.model_names[0],
        "parent": None,
        "max_model_len": front.engine.max_model_len,
    }


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _bind(host: str, port: int) -> socket.socket:
    """A listening address of our own, so that a port in use is one clear sentence."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port must be from 0 (any free one) to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use: choose another with --port, or --port 0") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn, with word when it is ready, a drain that ends answers properly, and signals that only end the loop: who
    called us cleans up afterwards."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, drain_seconds: float, ready: Callable[[int], None] | None
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Calls `ready` once connections are accepted."""
        await super().startup(sockets)
        if self._ready and sockets:
            self._ready(sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more, lets open answers end in time, ends the others by ending the engine."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        deadline = time.monotonic() + self._drain_seconds
        while self.server_state.tasks and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        if self.server_state.tasks:
            await self._engine.shutdown()
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
