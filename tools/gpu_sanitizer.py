"""The kernel tests under compute-sanitizer's memcheck and racecheck, side by side: the stage `sanitizer` of gpu_check.

Under memcheck torch asks the driver for each tensor, else a read behind one falls into torch's cache of memory and is
found nowhere; but for what captures graphs, in which that is not allowed. Left out are draws by the hundred thousand,
whose kernels others launch, too, over fewer rows.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Report = Callable[..., None]
ALONE = ("test_kernels", "test_operators", "test_sampler", "test_host")
CAPTURING = (
    "test_runtime",
    "test_fusions",
)  # products, norms, activations, rotation and KV write, by the nodes that launch them
CAPTURES, LONG = "takes_them_by_its_flag", "frequencies_follow"
PROCESSES = {("memcheck", ALONE): 4, ("memcheck", CAPTURING): 2, ("racecheck", ALONE): 6, ("racecheck", CAPTURING): 4}
SECONDS = 540.0  # of 16 cores racecheck needs most of them
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts=", "-W", "ignore")
SUMMARY = re.compile(r"=+ (?:RACECHECK SUMMARY: .*?\((\d+) errors?, (\d+) warnings?\)|ERROR SUMMARY: (\d+) errors?)")


def check_kernels(report: Report, out: Path) -> None:
    """Runs all, keeps what the tools say in `out`, reports a line for each.

    Raises:
        AssertionError: a test failed or did not end, or a tool found something.
    """
    from octavo.runtime.cuda import build

    build.built_library()
    running = []
    for (tool, files), count in PROCESSES.items():
        tests = collected(files)
        for i in range(count):
            running.append((tool, *started(tool, tests[i::count], out / f"{tool}-{files[0]}-{i}.log", files)))
    deadline = time.monotonic() + SECONDS
    found = {tool: {"passed": 0, "skipped": 0, "errors": 0, "warnings": 0} for tool, _, _ in running}
    failures = []
    for tool, process, log in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.1))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        text = log.read_text(errors="replace")
        counts, errors, warnings = read(text)
        for name, number in [*counts.items(), ("errors", errors or 0), ("warnings", warnings)]:
            found[tool][name] = found[tool].get(name, 0) + number
        if errors is None or errors or warnings or "failed" in counts or not counts.get("passed"):
            said = [line for line in text.splitlines() if "=========" in line or "FAILED" in line]
            failures.append("\n".join([log.name, *said[:40], text[-1000:]]))
    for tool, counts in found.items():
        report(f"compute-sanitizer {tool}", ok=not counts["errors"] + counts["warnings"], **counts)
    print("\n\n".join(failures))
    assert not failures, f"{len(failures)} of {len(running)} processes"


def read(text: str) -> tuple[dict[str, int], int | None, int]:
    """pytest's counts, and errors (None: it did not end) and warnings of the tool."""
    ended = re.findall(r"^.*\d+ (?:passed|failed).* in [\d.]+s.*$", text, re.M)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|skipped|failed)", "".join(ended[-1:]))}
    summary = SUMMARY.search(text)
    if summary is None:
        return counts, None, 0
    errors, warnings, others = summary.groups()
    return counts, int(errors or others or 0), int(warnings or 0)


def collected(files: tuple[str, ...]) -> list[str]:
    """The ids of the tests."""
    left_out = [LONG, *([CAPTURES] if files is ALONE else [])]
    paths = [f"tests/gpu/{name}.py" for name in files]
    if files is CAPTURING:
        paths.append(f"tests/gpu/test_operators.py::test_the_runtime_{CAPTURES}")
    command = [sys.executable, *PYTEST, "--collect-only", "-k", f"not ({' or '.join(left_out)})", *paths]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if "::" in line]


def started(
    tool: str, tests: list[str], log: Path, files: tuple[str, ...]
) -> tuple[subprocess.Popen[bytes], Path]:  # fmt: skip
    """A process on its way, and where it writes."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", sys.executable, *PYTEST, *tests]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if tool == "memcheck" and files is ALONE:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    return process, log
