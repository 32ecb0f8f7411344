"""The outermost layer: request ids, the size and type of bodies, HTTP metrics, and the last catch.

Plain ASGI, so that a streamed token passes through one extra function call and nothing else.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.observe.metrics import Metrics
from octavo.server.errors import Failure, failure_of
from octavo.server.protocol import REQUEST_ID

MAX_BODY_BYTES = 16 << 20
CLIENT_LEFT = 499  # nginx's number; never on the wire
_REQUEST_ID = re.compile(REQUEST_ID)


class Door:
    """Wraps the application. `max_body_bytes` limits a request's body, announced or not."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP exchange."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(receive, send, request_id, self.max_body_bytes)
        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal.response()(scope, exchange.receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            failure = failure_of(error, request_id)
            if exchange.status is None:
                await failure.response()(scope, exchange.receive, exchange.send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.on_http(route, _method(scope), exchange.status or CLIENT_LEFT, time.monotonic() - began)

    def _refusal(self, scope: Scope, headers: Headers) -> Failure | None:
        """What can be told from the headers alone."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return failure_of(_too_large(self.max_body_bytes), "")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = f"Content-Type is {kind[:80] or 'missing'}: send JSON with 'Content-Type: application/json'"
            return Failure(400, message, code="invalid_content_type")
        return None


class _Exchange:
    """The two channels of one exchange: counts what comes in, marks what goes out."""

    __slots__ = ("_limit", "_num_bytes", "_receive", "_request_id", "_send", "status")

    def __init__(self, receive: Receive, send: Send, request_id: str, limit: int) -> None:
        self._receive, self._send = receive, send
        self._request_id = (b"x-request-id", request_id.encode())
        self._limit = limit
        self._num_bytes = 0
        self.status: int | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._limit:
                raise _too_large(self._limit)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._request_id]
        await self._send(message)


def _method(scope: Scope) -> str:
    known = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
    return scope["method"] if scope["method"] in known else "other"


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes: send less")
