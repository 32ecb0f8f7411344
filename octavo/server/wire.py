"""The short way of a stream's next piece to its socket.

Between an application and its connection lie layers that only look at heads, and h11, which frames each piece and
checks that pieces may still come. For a token that was most of the work, so a stream that has begun frames its chunks
itself (RFC 9112, 7.1) and hands them to the transport. Heads, the end and whatever is not chunked go the usual way.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle


class Wire:
    """Where the body of one response goes, chunk by chunk."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self.num_written = 0  # chunks

    @classmethod
    def of(cls, scope: Scope, send: Send) -> Wire | None:
        """The wire behind uvicorn's `send`; None where another server calls, or what follows would not be chunked."""
        cycle = getattr(send, "__self__", None)
        if not isinstance(cycle, RequestResponseCycle) or scope["http_version"] != "1.1" or scope["method"] == "HEAD":
            return None
        return cls(cycle)

    @classmethod
    def under(cls, app: ASGIApp) -> ASGIApp:
        """The application, told the wire of each request in its state."""

        async def with_wire(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                scope.setdefault("state", {})["wire"] = cls.of(scope, send)
            await app(scope, receive, send)

        return with_wire

    @property
    def is_free(self) -> bool:
        """Whether the head is sent, somebody is there, and the buffer has room: then write() may be called."""
        cycle = self._cycle
        is_between = cycle.response_started and not cycle.response_complete
        return is_between and not cycle.disconnected and not cycle.flow.write_paused

    def write(self, part: bytes) -> None:
        """Writes a chunk; not an empty one, which would be the last."""
        assert part
        self.num_written += 1
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
