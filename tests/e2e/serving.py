"""A real `octavo serve` in its own process, as a user starts it; found by the URL it prints."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 120


def engine_of(pid):
    """The engine process of a server."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    (engine,) = [child for child, command in commands.items() if b"octavo.engine.process" in command]
    return engine


class Server:
    """A running server: `url` ends in /v1, `lines` is what it has printed so far."""

    def __init__(self, arguments):
        environment = {
            **os.environ,
            "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "160",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines = []
        self._found = threading.Event()
        self.url = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._found.wait(START_SECONDS), "no URL within two minutes:\n" + "".join(self.lines)
        assert self.url, "the server ended:\n" + "".join(self.lines)

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if self.url is None and (match := re.search(r"Ready in .*(http://\S+/v1)", line)):
                self.url = match[1]
                self._found.set()
        self._found.set()

    @property
    def root(self):
        """The URL without /v1."""
        return self.url.removesuffix("/v1")

    def engine_pid(self):
        """The engine process, a child of the front."""
        return engine_of(self.process.pid)

    def stop(self, number=signal.SIGINT):
        """Ctrl-C, or another signal; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(120)
        self._reader.join(5)
        self.process.stdout.close()
        return status


@contextmanager
def serving(*arguments):
    server = Server(arguments)
    try:
        yield server
    finally:
        server.stop()
