"""One answer on the wire, whole or streamed, and the client who may leave before its end.

The answer is a generator of byte strings. Nothing is sent before its first one is there, so whatever goes wrong until
the first token still gets an honest status; only a stream that is silent for long begins without, because proxies hang
up on silence. When the client leaves, the generator is closed, which closes the engine's
iterators in it: the requests are aborted at the next step boundary.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi import Response
from starlette.types import Receive, Scope, Send

from octavo.outputs import RequestOutput
from octavo.server.errors import Failure, failure_of
from octavo.server.wire import Wire

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"  # a comment: clients skip it
STUCK_SECONDS = 60.0  # a client whose full buffer takes nothing for so long is gone
Outputs = AsyncGenerator[tuple[int, RequestOutput], None]  # with the number of the prompt
MERGED_AHEAD = 64  # outputs of several prompts that may wait for a slow client


class Answer(Response):
    """A JSON document (the generator's one part) or, with `stream`, server-sent events. `broken`
    writes an error into a stream."""

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        broken: Callable[[Failure], bytes],
        stream: bool,
        ping_seconds: float,
    ) -> None:
        super().__init__()
        self.parts = parts
        self.broken = broken
        self.stream = stream
        self.ping_seconds = ping_seconds
        self._begun = False
        self._num_sent = 0  # parts
        self._turn = asyncio.Lock()  # a comment does not come between, nor behind the end
        self._ended = False
        self.wire: Wire | None = None  # the short way; free once the stream has begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer until it ends or the client is gone."""
        self.wire = scope["state"].get("wire")
        work = asyncio.create_task(self._send(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await self._attend(work, gone, send)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait((work, gone))
        with contextlib.suppress(asyncio.CancelledError):
            work.result()

    async def _attend(self, work: asyncio.Task[None], gone: asyncio.Task[None], send: Send) -> None:
        """Returns when the answer has ended, the client is gone, or it takes nothing any more."""
        pause = (self.ping_seconds or STUCK_SECONDS) if self.stream else None
        comment = PING if self.ping_seconds else b""  # without one, its turn must come all the same
        while True:
            num_sent = self._count()
            done, _ = await asyncio.wait((work, gone), timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            if self._count() == num_sent:
                try:
                    await asyncio.wait_for(self._part(send, comment), STUCK_SECONDS)
                except TimeoutError:
                    return

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.parts) as parts:
            if not self.stream:
                await Response(await anext(parts), media_type="application/json")(scope, receive, send)
                return
            try:
                async for part in parts:
                    await self._part(send, part)
            except Exception as error:
                if not self._begun:
                    raise
                failure = failure_of(error, scope["state"]["request_id"])
                await self._part(send, self.broken(failure))  # the status is sent: the error goes into the stream
            async with self._turn:
                self._ended = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _count(self) -> int:
        """Parts that were sent."""
        return self._num_sent + (self.wire.num_written if self.wire else 0)

    async def _part(self, send: Send, part: bytes) -> None:
        """Sends a piece of a stream, behind its head if it is the first."""
        async with self._turn:
            if self._ended or not part:
                return
            if self.wire is not None and self.wire.is_free:
                self.wire.write(part)
                return
            if not self._begun:
                self._begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": part, "more_body": True})
            self._num_sent += 1


async def merge(streams: list[AsyncGenerator[RequestOutput, None]]) -> Outputs:
    """Outputs of several prompts as they come, with the number of the prompt. The first error ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for output in only:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(MERGED_AHEAD)
    pumps = [asyncio.create_task(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        for _ in streams:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)


async def _pump(
    number: int,
    stream: AsyncGenerator[RequestOutput, None],
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None],
) -> None:
    try:
        async with aclosing(stream):
            async for output in stream:
                await queue.put((number, output))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
