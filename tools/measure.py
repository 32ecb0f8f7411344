"""Measures what README says about install and start-up, and writes it to docs/results: `measure.py install|start`.

install: wheel size; distributions and megabytes of a fresh environment; seconds from there to the first token.
start:   a new `octavo serve` process, weights in the page cache: seconds to ready and to the first token, median of N.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUEST = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "stream": True}


def main() -> None:
    """Runs one measurement and writes its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("install", "start"))
    parser.add_argument("--runs", type=int, default=5, help="of start")
    arguments = parser.parse_args()
    if arguments.what == "install":
        write("install", "Install", "python tools/measure.py install", measure_install())
    else:
        command = f"python tools/measure.py start --runs {arguments.runs}"
        write("start", f"Start-up, default model, median of {arguments.runs}", command, measure_start(arguments.runs))


def measure_install() -> list[tuple[str, str]]:
    """A wheel, built and installed into a fresh environment outside the tree, and its first token."""
    with tempfile.TemporaryDirectory() as scratch:
        venv, wheels = Path(scratch, "venv"), Path(scratch, "wheels")
        began = time.monotonic()
        run(sys.executable, "-m", "venv", str(venv))
        python = str(venv / "bin" / "python")
        run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(ROOT))
        wheel = next(wheels.glob("*.whl"))
        run(python, "-m", "pip", "install", "-q", str(wheel))
        installed = time.monotonic() - began
        _, first_token = start_once([str(venv / "bin" / "octavo")])
        listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
        packages = next((venv / "lib").glob("python*")) / "site-packages"
        size = sum(f.stat().st_size for f in packages.rglob("*") if f.is_file())
        return [
            ("wheel", f"{wheel.stat().st_size / 1e6:.1f} MB"),
            ("distributions, pip included", str(len(listed))),
            ("site-packages", f"{size / 1e6:.0f} MB"),
            ("fresh environment, built and installed", f"{installed:.0f} s"),
            ("from nothing to the first token", f"{installed + first_token:.0f} s"),
        ]


def measure_start(runs: int) -> list[tuple[str, str]]:
    """Medians over new processes; one that is not counted warms the page cache."""
    command = [sys.executable, "-m", "octavo"]
    start_once(command)
    ready, first_token = zip(*(start_once(command) for _ in range(runs)), strict=True)
    return [
        ("process to ready", f"{statistics.median(ready):.2f} s"),
        ("process to first token", f"{statistics.median(first_token):.2f} s"),
    ]


def start_once(command: list[str]) -> tuple[float, float]:
    """Seconds from a new process to ready, and to the first token of a request sent then."""
    began = time.monotonic()
    process = subprocess.Popen([*command, "serve", "--port", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.match(r"Ready in [\d.]+ s: (\S+)", line):
                ready = time.monotonic() - began
                return ready, time_first_token(found[1], began)
        raise SystemExit(f"the server ended with status {process.wait()}")
    finally:
        process.terminate()
        process.communicate()


def time_first_token(url: str, began: float) -> float:
    """Seconds from `began` to the first text of a streamed answer."""
    body = json.dumps(REQUEST).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                return time.monotonic() - began
    raise SystemExit("the answer had no token")


def run(*command: str) -> str:
    """Runs a command and returns its output; its failure ends the measurement."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(name: str, what: str, command: str, rows: list[tuple[str, str]]) -> None:
    """Writes a result as tools/readme_numbers.py reads it."""
    result = {"what": what, "date": date.today().isoformat(), "machine": machine(), "command": command, "rows": rows}
    path = ROOT / "docs" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{key:<40} {value}" for key, value in rows))


def machine() -> str:
    """The processor, the cores this process may use, and Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {cores} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
