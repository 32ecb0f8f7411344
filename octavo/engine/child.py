"""The engine process as its front sees it: spawned with its ends of a socket and a pipe, watched, ended."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.channel import StartEngine, encode
from octavo.engine.front_channel import FrontChannel
from octavo.engine.spawn import spawn
from octavo.models.spec import ModelFiles

END_SECONDS = 5.0


class EngineProcess:
    """One engine process and the channel to it. It imports what it needs, then waits for `load`."""

    channel: FrontChannel

    def __init__(self) -> None:
        self._process, self._socket, self._pipe = spawn()

    def load(self, config: EngineConfig, files: ModelFiles) -> None:
        """Has it load a model; its first message says whether it could."""
        self.told_at = time.monotonic()
        with contextlib.suppress(ConnectionError):  # it has ended, as the channel will say
            self._socket.sendall(encode(StartEngine(config, files.name, files.format, str(files.path))))

    async def open(self) -> None:
        """Opens the channel."""
        self.channel = await FrontChannel.open(self._socket, self._pipe)

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
