"""The engine process as its front sees it: spawned with its ends of a socket and a pipe, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.channel import StartEngine
from octavo.engine.front_channel import FrontChannel
from octavo.engine.sandbox import unsignalled
from octavo.models.spec import ModelFiles

END_SECONDS = 5.0
SOCKET_BYTES = 1 << 22
PIPE_BYTES = 1 << 20  # the most that Linux gives everybody


class EngineProcess:
    """One engine process and the channel to it. It imports what it needs, then waits for `load`."""

    channel: FrontChannel

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        told, telling = os.pipe()
        self._pipe = os.fdopen(told, "rb", 0)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a user who has many pipes gets no more: outputs are merged sooner
                fcntl.fcntl(told, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        with theirs, os.fdopen(telling, "wb"), unsignalled():
            ends = (theirs.fileno(), telling)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "octavo.engine.process", *map(str, ends)],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
            )

    async def load(self, config: EngineConfig, files: ModelFiles) -> None:
        """Has it load a model; its first message says whether it could."""
        self.channel = await FrontChannel.open(self._socket, self._pipe)
        self.channel.send(StartEngine(config, files.name, files.format, str(files.path)))

    def status(self) -> str:
        """How it ended, if it did: the end of a sentence that begins with "the engine process"."""
        code = self._process.poll()
        if code is None:
            return "closed its channel"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell_stacks(self) -> None:
        """Has it write where its threads stand, to the log."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Ends it at once, whatever it does."""
        self._process.kill()

    def cpu_seconds(self) -> float | None:
        """CPU time that it has used so far, all threads; None where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)

    def close(self) -> None:
        """Ends it at once, loaded or not, unless it has ended."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._pipe.close()

    async def end(self) -> None:
        """Closes the channel, on which it ends by itself; kills it if it does not."""
        await self.channel.close()
        try:
            await asyncio.to_thread(self._process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
