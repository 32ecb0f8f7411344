"""The outermost layers. Door: request ids, the size and type of bodies, HTTP metrics, the last catch. Gate: keys.

Plain ASGI, so that a streamed token passes through one extra function call and nothing else.
"""

import asyncio
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
from octavo.server.keys import Key, Keyring
from octavo.server.protocol import REQUEST_ID

MAX_BODY_BYTES = 16 << 20
BODY_SECONDS = 60.0  # between two pieces of a body
WHOLE_BODY_SECONDS = 300.0  # 16 MiB at half a megabit a second
CLIENT_LEFT = 499  # nginx's number; never on the wire
_REQUEST_ID = re.compile(REQUEST_ID)
_HANG_UP = {"Connection": "close"}  # the rest of a body is not read


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
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(receive, send, request_id, self.max_body_bytes)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            failure = failure_of(error, request_id)
            if exchange.status is None:
                await failure.response(scope)(scope, exchange.receive, exchange.send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.on_http(route, _method(scope), exchange.status or CLIENT_LEFT, time.monotonic() - began)


class Gate:
    """Asks for a key before anything else is done, then for a body that can be read, and holds to the allowance."""

    def __init__(self, app: ASGIApp, *, keyring: Keyring, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.keyring = keyring
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP exchange; what is none is refused, whatever it asks."""
        if scope["type"] != "http":
            raise RuntimeError(f"this server does not speak {scope['type']}")
        headers = Headers(scope=scope)
        key = self.keyring.check(scope["path"], headers)
        refusal = key if isinstance(key, Failure) else self._refusal(scope, headers, key)
        if refusal is not None:
            await refusal.response(scope)(scope, receive, send)
            return
        scope["state"]["key"] = key
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers, key: Key) -> Failure | None:
        """What can be told from the headers alone."""
        if scope["method"] != "POST":  # no route reads a body sent otherwise
            return None
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return failure_of(_too_large(self.max_body_bytes), "")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and (kind or length != "0" or "transfer-encoding" in headers):
            message = f"Content-Type is {kind[:80] or 'missing'}: send JSON with 'Content-Type: application/json'"
            return Failure(400, message, code="invalid_content_type")
        if (packed := headers.get("content-encoding", "identity")) != "identity":
            message = f"Content-Encoding is {packed[:80]}: send the JSON as it is"
            return Failure(400, message, code="invalid_content_type")
        return key.admit()


class _Exchange:
    """The two channels of one exchange: counts what comes in, marks what goes out."""

    __slots__ = ("_deadline", "_ended", "_limit", "_num_bytes", "_receive", "_request_id", "_send", "status")

    def __init__(self, receive: Receive, send: Send, request_id: str, limit: int) -> None:
        self._receive, self._send = receive, send
        self._request_id = (b"x-request-id", request_id.encode())
        self._limit = limit
        self._num_bytes = 0
        self._deadline = time.monotonic() + WHOLE_BODY_SECONDS
        self._ended = False  # the body
        self.status: int | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        if self._ended:
            return await self._receive()
        seconds = min(BODY_SECONDS, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(seconds):  # wait_for would make a task of it
                message = await self._receive()
        except TimeoutError:
            limits = f"nothing of it for {BODY_SECONDS:g} s, or not all within {WHOLE_BODY_SECONDS:g} s"
            raise HTTPException(408, f"the body came too slowly ({limits}): send it again", _HANG_UP) from None
        self._ended = not message.get("more_body", False)
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
    return HTTPException(413, f"the body is larger than {limit} bytes: send less", _HANG_UP)
