"""Starts engine processes. Imports next to nothing, so that a server can start its engine before anything else."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

SOCKET_BYTES = 1 << 22

PIPE_BYTES = 1 << 20  # the most that Linux gives everybody

Spawned = tuple["subprocess.Popen[bytes]", socket.socket, IO[bytes]]
ahead: list[Spawned] = []  # what spawn() returns next


@contextmanager
def unsignalled() -> Iterator[None]:
    """Processes begun in it never hear SIGINT and SIGTERM. Terminals and init systems send them to a whole group; it is
    for the server to handle them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn() -> Spawned:
    """An engine process, which imports what it needs and waits for StartEngine, our end of its socket and that of the
    pipe that it answers on: with the socket it ends."""
    if ahead:
        return ahead.pop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    told, telling = os.pipe()
    if sys.platform == "linux":
        with suppress(OSError):  # a user who has many pipes gets no more: outputs are merged sooner
            fcntl.fcntl(told, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with theirs, os.fdopen(telling, "wb"), unsignalled():
        ends = (theirs.fileno(), telling)
        command = [sys.executable, "-m", "octavo.engine.process", *map(str, ends)]
        # numpy's BLAS has threads that spin for 30 ms before they sleep: on the cores that import and load
        environment = {"OPENBLAS_THREAD_TIMEOUT": "4", **os.environ}  # a power of two, cycles
        process = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.DEVNULL, env=environment)
    return process, ours, os.fdopen(told, "rb", 0)
