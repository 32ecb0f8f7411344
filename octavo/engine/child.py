"""The engine process as its front sees it: spawned with one end of a socket pair, watched, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.channel import FrontChannel, StartEngine
from octavo.models.spec import ModelFiles

END_SECONDS = 5.0
SOCKET_BYTES = 1 << 22


class EngineProcess:
    """One engine process and the channel to it. Make it with `spawn`."""

    def __init__(self, process: subprocess.Popen[bytes], channel: FrontChannel) -> None:
        self._process = process
        self.channel = channel

    @classmethod
    async def spawn(cls, config: EngineConfig, files: ModelFiles) -> EngineProcess:
        """Starts a process that loads the model; its first message says whether it could."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "octavo.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        channel = await FrontChannel.open(ours)
        channel.send(StartEngine(config, files.name, files.format, str(files.path)))
        return cls(process, channel)

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

    async def end(self) -> None:
        """Closes the channel, on which it ends by itself; kills it if it does not."""
        await self.channel.close()
        try:
            await asyncio.to_thread(self._process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
