"""Programs of strangers run in a process that can be killed: a question is answered within seconds and bytes, or not.

A JSON schema, a regular expression, a grammar, a chat template: each is a program that may loop or grow without end. It
runs in `python -m MODULE`, which calls `serve` and answers one line of JSON with another, under the same number. The
process is replaced when it was too slow or too large, or when nobody waits for its answer any more.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

from octavo.engine.spawn import unsignalled
from octavo.errors import QueueFullError

MAX_LINE = 1 << 26  # bytes of an answer
RETRY_SECONDS = 5.0


class SandboxError(Exception):
    """There is no answer; the message says why."""


class Sandbox:
    """Asks a process of its own, one question after the other.

    Args:
        module: what the process runs.
        seconds: that an answer may take.
        max_waiting: questions that may wait for theirs.
    """

    def __init__(self, module: str, *, seconds: float, max_waiting: int) -> None:
        self._module = module
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._num_asked = 0
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, question: Any) -> Any:
        """The answer to a question, both JSON.

        Raises SandboxError: there is none. QueueFullError: too many wait already.
        """
        if self._num_waiting >= self._max_waiting:
            message = f"{self._num_waiting} requests wait to be looked at already: try again later"
            raise QueueFullError(message, retry_after=RETRY_SECONDS)
        self._num_waiting += 1
        try:
            async with self._lock:
                reply = await self._reply(question)
        finally:
            self._num_waiting -= 1
        if "error" in reply:
            raise SandboxError(reply["error"])
        return reply["answer"]

    async def start(self) -> None:
        """Starts the process, so that the first question need not wait for that."""
        async with self._lock:
            await self._running()

    async def close(self) -> None:
        """Ends the process."""
        if (process := self._kill()) is not None:
            await process.wait()

    async def _reply(self, question: Any) -> dict[str, Any]:
        try:
            line = json.dumps([self._num_asked + 1, question]).encode() + b"\n"
        except RecursionError:
            raise SandboxError("it is nested too deeply") from None
        self._num_asked += 1
        try:
            process = await self._running()
            return await asyncio.wait_for(self._exchange(process, line), self._seconds)
        except TimeoutError:
            self._kill()
            raise SandboxError(f"it took longer than {self._seconds:g} s: simplify it") from None
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            self._kill()
            raise SandboxError("it is too large: simplify it") from None
        except BaseException:  # who asked is gone: the next one must not read the answer
            self._kill()
            raise

    async def _exchange(self, process: asyncio.subprocess.Process, line: bytes) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line)
        await process.stdin.drain()
        while True:
            reply: dict[str, Any] = json.loads(await process.stdout.readuntil(b"\n"))
            if reply["number"] == self._num_asked:
                return reply

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            command = [sys.executable, "-m", self._module]
            with unsignalled():
                self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=MAX_LINE)
        return self._process

    def _kill(self) -> asyncio.subprocess.Process | None:
        """Ends the process at once, whatever it does; the next question gets another one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return process


def serve(answer: Callable[[Any], Any], *, max_bytes: int) -> None:
    """What such a process does: answers questions until there are no more, in `max_bytes` of memory. It writes no file
    and leaves no core."""
    import resource

    for limit, most in ((resource.RLIMIT_AS, max_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):  # macOS limits no address space: there the seconds must do
            resource.setrlimit(limit, (most, most))
    for line in sys.stdin.buffer:
        number, question = json.loads(line)
        try:
            reply = json.dumps({"number": number, "answer": answer(question)})
        except Exception as error:  # a stranger's program may fail in any way
            reply = json.dumps({"number": number, "error": str(error) or type(error).__name__})
        print(reply, flush=True)
