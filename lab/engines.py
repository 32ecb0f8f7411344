"""An engine under measurement: a server behind HTTP, or a peer's library in a process of its own behind a pipe.

All engines of a run are alive at once, so that repetitions can be interleaved; those that are not measured are stopped
(SIGSTOP), so that nothing they do in the background is measured with the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from lab.workloads import Work
from octavo.cli.client import Server, raise_for_status, request

TINY = Work([1000, 2000, 3000], 2)
LOG_LINES = 12


class EngineError(Exception):
    """An engine did not start, ended, or answered wrongly; the message says which and how."""


@dataclass(slots=True)
class Timed:
    """What one request saw; seconds since the batch began. `gaps` lie between chunks of a stream."""

    start: float
    first: float
    end: float
    num_tokens: int
    gaps: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Batch:
    """Seconds for all of it, and each request."""

    seconds: float
    timed: list[Timed]

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return sum(t.num_tokens for t in self.timed)


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is asked: works, `at_once` of them at a time, each sent `send_at` seconds after the start."""

    works: list[Work]
    at_once: int
    stream: bool
    send_at: list[float] | None
    sampling: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine is started, and how long it may take. `command` may hold {port}."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 60.0


class Engine(ABC):
    """One engine in a process group of its own."""

    def __init__(self, name: str, launch: Launch, note: str = "") -> None:
        self.name = name
        self.note = note  # what a reader of the table must know: types of weights, HTTP or not
        self._launch = launch
        self._process: subprocess.Popen[bytes]
        self._log: Path
        self._peak = 0.0

    def start(self, log_folder: Path) -> float:
        """Starts it and waits for its first token; returns the seconds that took.

        Raises EngineError with the end of its log.
        """
        self._log = log_folder / f"{self.name.replace(' ', '-').replace(',', '')}.log"
        began = time.perf_counter()
        try:
            self._open()
            self.run([TINY], 1)
        except BaseException as error:
            self.stop()
            if isinstance(error, EngineError | OSError):
                raise EngineError(f"{error}\n{self._last_words()}") from error
            raise
        return time.perf_counter() - began

    def run(
        self,
        works: list[Work],
        at_once: int,
        *,
        stream: bool = True,
        send_at: list[float] | None = None,
        sampling: Mapping[str, float] | None = None,
    ) -> Batch:
        """Does the works, `at_once` of them at a time; `send_at`: seconds after which each is sent at the earliest.

        Raises EngineError for answers of a wrong length.
        """
        batch = self._run(Load(works, at_once, stream, send_at, sampling or {}))
        for work, seen in zip(works, batch.timed, strict=True):
            if seen.num_tokens != work.num_out:
                raise EngineError(f"{seen.num_tokens} tokens came where {work.num_out} were asked for")
        return batch

    @abstractmethod
    def _run(self, load: Load) -> Batch:
        """As run(), whose answers may still be of a wrong length."""

    @abstractmethod
    def _open(self) -> None:
        """Starts the process and waits until it can be asked."""

    def pause(self) -> None:
        """Takes every core away from it."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run on, and wakes it with a short request."""
        os.killpg(self._process.pid, signal.SIGCONT)
        self.run([TINY], 1)

    def stop(self) -> None:
        """Ends its process group."""
        if not hasattr(self, "_process"):
            return
        for sign in (signal.SIGCONT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):  # what its first process left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that nobody read is still in its buffer
                    pipe.close()

    def peak_memory(self) -> float:
        """The sum of peak resident memory over its processes, in MiB."""
        found = (re.search(r"VmHWM:\s*(\d+)", (p / "status").read_text()) for p in self.processes())
        return sum(int(match[1]) for match in found if match) / 1024

    def processes(self) -> list[Path]:
        """Its processes in /proc, the one that was started first."""
        found, todo = [], [self._process.pid]
        while todo:
            process = Path(f"/proc/{todo.pop(0)}")
            found.append(process)
            todo += [int(child) for t in process.glob("task/*/children") for child in t.read_text().split()]
        return found

    def _spawn(self, command: list[str], *, piped: bool = False) -> None:
        if command[0].startswith("/") and not Path(command[0]).exists():
            raise EngineError(f"{command[0]} does not exist")
        environment = {**os.environ, **self._launch.environment}
        environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # installed packages have theirs, a checkout from its first start
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(line[:300] for line in lines[-LOG_LINES:])


class HttpEngine(Engine):
    """Any server with OpenAI's /v1/completions that takes token ids as a prompt and honours `ignore_eos`."""

    def __init__(self, name: str, launch: Launch, note: str = "", *, model: str = "smollm2") -> None:
        super().__init__(name, launch, note)
        self.model = model
        self.server: Server

    def _open(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = Server("127.0.0.1", port)
        self._spawn([part.format(port=port) for part in self._launch.command])
        deadline = time.monotonic() + self._launch.seconds
        while not asyncio.run(self._answers()):
            if self._process.poll() is not None:
                raise EngineError(f"the server ended with status {self._process.returncode}")
            if time.monotonic() > deadline:
                raise EngineError(f"the server was not ready after {self._launch.seconds:.0f} s")
            time.sleep(0.01)

    async def _answers(self) -> bool:
        """True once /health says so: llama-server listens before its model is loaded."""
        try:
            async with asyncio.timeout(1), request(self.server, "GET", "/health") as response:
                return response.status == 200
        except Exception:
            return False

    def _run(self, load: Load) -> Batch:
        """One connection a request."""
        return asyncio.run(self._batch(load))

    async def _batch(self, load: Load) -> Batch:
        gate = asyncio.Semaphore(load.at_once)
        began = time.perf_counter()

        async def one(index: int, work: Work) -> Timed:
            if load.send_at is not None:
                await asyncio.sleep(load.send_at[index] - (time.perf_counter() - began))
            async with gate:
                return await self._call(work, load.stream, began, load.sampling)

        timed = await asyncio.gather(*(one(i, work) for i, work in enumerate(load.works)))
        return Batch(time.perf_counter() - began, list(timed))

    async def _call(self, work: Work, stream: bool, began: float, sampling: Mapping[str, float]) -> Timed:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": work.prompt,
            "max_tokens": work.num_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **sampling,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        start = time.perf_counter() - began
        times: list[float] = []
        num_tokens = 0
        async with request(self.server, "POST", "/v1/completions", body) as response:
            await raise_for_status(response, self.server.url)
            if not stream:
                answer = json.loads(await response.body())
                times = [time.perf_counter() - began]
                num_tokens = answer["usage"]["completion_tokens"]
            else:
                async with aclosing(response.events()) as events:  # type: ignore[type-var]
                    async for event in events:
                        if event == b"[DONE]":
                            break
                        chunk = json.loads(event)
                        if chunk["choices"] and chunk["choices"][0]["text"]:
                            times.append(time.perf_counter() - began)
                        if chunk.get("usage"):
                            num_tokens = chunk["usage"]["completion_tokens"]
        times = times or [time.perf_counter() - began]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return Timed(start, times[0], times[-1], num_tokens, gaps)


class OctavoEngine(HttpEngine):
    """`octavo serve` with fields of EngineConfig."""

    def __init__(self, name: str, options: Mapping[str, str | int]) -> None:
        flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        flags[:2] = flags[1:2]  # the model is an argument
        command = [sys.executable, "-m", "octavo", "serve", *flags, "--port", "{port}"]
        super().__init__(name, Launch(command), " ".join(["octavo serve", *flags]), model=str(options["model"]))
        self.options = options


class PipeEngine(Engine):
    """A peer without a server: lab/peer_NAME.py runs in the peer's own environment and reads JSON lines of work."""

    def _open(self) -> None:
        self._spawn(self._launch.command, piped=True)
        too_late = threading.Timer(self._launch.seconds, os.killpg, (self._process.pid, signal.SIGKILL))
        too_late.start()
        try:
            self._answer()
        finally:
            too_late.cancel()

    def _run(self, load: Load) -> Batch:
        """Greedily in the peer's process; times are of the peer's clock: no HTTP, and not this pipe."""
        if load.send_at is not None or load.sampling:
            raise EngineError("arrivals and sampling are not measured in process")
        asked = {"works": [[w.prompt, w.num_out] for w in load.works], "at_once": load.at_once}
        pipe: IO[bytes] | None = self._process.stdin
        assert pipe is not None
        pipe.write(json.dumps(asked).encode() + b"\n")
        pipe.flush()
        answer = self._answer()
        return Batch(answer["seconds"], [Timed(*values) for values in answer["timed"]])

    def _answer(self) -> Any:
        """The next line that is an answer; a peer's own prints go to the log."""
        assert self._process.stdout is not None
        noise: deque[bytes] = deque(maxlen=LOG_LINES)
        for line in self._process.stdout:
            if line.startswith(b"{"):
                return json.loads(line)
            noise.append(line)
        raise EngineError(f"the process ended with status {self._process.wait()}: {b''.join(noise).decode()}")
