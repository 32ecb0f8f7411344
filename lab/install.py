"""Measures what a stranger meets: install size, time from a clone to the first token, time of a warm start.

    python -m lab.install            writes docs/results/install.json (a few minutes; needs the network)

Works in a temporary clone of HEAD with an empty cache, so nothing on this machine helps except pip's own cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from lab.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
WARM_STARTS = 7
PROMPT = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "stream": True}


class Started:
    """A server on its way: seconds to ready and to the first token, counted from `began`."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], began: float) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.url = self._wait_for_url()
        self.ready = time.monotonic() - began
        self._first_token()
        self.first_token = time.monotonic() - began

    def _wait_for_url(self) -> str:
        lines = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.append(line)
            if match := re.search(r"Ready in .*(http://\S+/v1)", line):
                return match[1]
        raise SystemExit("the server ended:\n" + "".join(lines[-30:]))

    def _first_token(self) -> None:
        body = json.dumps(PROMPT).encode()
        request = urllib.request.Request(f"{self.url}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            for line in response:
                if line.startswith(b"data:") and json.loads(line[5:])["choices"][0]["text"]:
                    return
        raise SystemExit("the stream ended without a token")

    def stop(self) -> None:
        """Ctrl-C for the whole group; waits."""
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.communicate(timeout=30)


def megabytes(path: Path) -> float:
    """Size on disk of a file or a folder, in MB (10^6 bytes)."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(p.stat().st_blocks * 512 for p in files) / 1e6


def measure(work: Path) -> list[tuple[str, str]]:
    """All figures, as (name, value) rows."""
    clone = work / "octavo"
    environment = {**os.environ, "OCTAVO_CACHE": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
    environment.pop("VIRTUAL_ENV", None)
    began = time.monotonic()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    cold = Started(["make", "serve", "ARGS=--port 0"], clone, environment, began)
    cold.stop()
    python = clone / ".venv" / "bin" / "python"
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True, text=True
    )
    subprocess.run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", work, clone], check=True)
    wheel = next(work.glob("octavo-*.whl"))
    ready, first = [], []
    for _ in range(WARM_STARTS):
        warm = Started([str(python.with_name("octavo")), "serve", "--port", "0"], work, environment, time.monotonic())
        warm.stop()
        ready.append(warm.ready)
        first.append(warm.first_token)
    packages = clone / ".venv" / "lib"
    return [
        ("distributions in the environment, pip among them", str(len(json.loads(listed.stdout)))),
        ("environment on disk", f"{megabytes(packages):.0f} MB"),
        (f"wheel ({wheel.name})", f"{megabytes(wheel):.2f} MB"),
        ("`git clone` to first token: install, compile, fetch the model, start", f"{cold.first_token:.1f} s"),
        ("new process to ready, model cached", spread(ready)),
        ("new process to first token over HTTP, model cached", spread(first)),
    ]


def spread(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, n={len(seconds)})"


def main() -> int:
    """Measures, writes the result, prints it."""
    argparse.ArgumentParser(prog="python -m lab.install", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(work))
    result = {
        "what": "Install and start",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python -m lab.install",
        "rows": rows,
    }
    path = ROOT / "docs" / "results" / "install.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, value in rows:
        print(f"{name:<70} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
