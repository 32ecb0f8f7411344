"""`octavo serve` without a flag on a card: it answers, streams, and says how it is. The stage `server` of gpu_check."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PORT = 8437
AT_ONCE, NUM_TOKENS = 300, 48  # more than run at once
START_SECONDS, END_SECONDS = 120.0, 30.0
Report = Callable[..., None]


def check_server(name: str, arguments: list[str], prompt: str | list[int], report: Report, out: Path) -> None:
    """Starts it, asks one after the other and all at once, stops it.

    Raises:
        AssertionError: no answer, another one than expected, or an exit status.
    """
    log, began = out / f"server-{name}.txt", time.monotonic()
    command = [sys.executable, "-m", "octavo", "serve", *arguments, "--port", str(PORT)]
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    try:
        while not is_healthy():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() - began < START_SECONDS, log.read_text()
            time.sleep(0.05)
        ready_s = time.monotonic() - began
        values = ask_all(prompt)
        server.send_signal(signal.SIGTERM)
        values["exit_status"] = server.wait(END_SECONDS)
    finally:
        server.kill()
        print(log.read_text(errors="replace"), flush=True)
    report(f"server {name}", ready_s=ready_s, **values)
    assert values["exit_status"] == 0


def is_healthy() -> bool:
    """Whether somebody answers there."""
    try:
        return bool(json.loads(fetch("/health"))["status"] == "ok")
    except OSError:
        return False


def fetch(path: str, body: dict[str, Any] | None = None) -> str:
    """What a request is answered."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(answer.read().decode())


def metric(name: str) -> float:
    """What /metrics says of it, over all labels."""
    return sum(float(value) for value in re.findall(rf"^octavo:{name}(?:{{.*}})? (\S+)$", fetch("/metrics"), re.M))


def ask_all(prompt: str | list[int]) -> dict[str, Any]:
    """One answer, the same as a stream, many at once, and what /metrics says of them.

    `same`: how many of those at once are the one alone; in bfloat16 steps of other sizes round otherwise.
    """
    model = json.loads(fetch("/v1/models"))["data"][0]["id"]
    wanted = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    wanted["return_token_ids"] = True
    first = json.loads(fetch("/v1/completions", wanted))
    start = time.perf_counter()
    events = [line[6:] for line in fetch("/v1/completions", wanted | {"stream": True}).splitlines() if line]
    stream_s = time.perf_counter() - start
    assert events[-1] == "[DONE]", events[-3:]
    streamed = [
        token for event in events[:-1] for c in json.loads(event)["choices"] for token in c.get("token_ids") or ()
    ]
    assert streamed == first["choices"][0]["token_ids"]
    assert first["usage"]["completion_tokens"] == NUM_TOKENS == len(streamed)
    start, widest = time.perf_counter(), 0.0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(fetch, "/v1/completions", wanted) for _ in range(AT_ONCE)]
        while not all(one.done() for one in asked):
            widest = max(widest, metric("num_requests_running"))
            time.sleep(0.02)
    seconds = time.perf_counter() - start
    answers = [json.loads(one.result()) for one in asked]
    same = sum(answer["choices"][0]["token_ids"] == streamed for answer in answers)
    assert metric("generation_tokens_total") == (AT_ONCE + 2) * NUM_TOKENS
    assert metric("request_success_total") == AT_ONCE + 2
    assert metric("num_requests_running") == 0
    print(json.dumps(first["choices"][0].get("text")))
    return {
        "stream_s": stream_s, "events": len(events) - 1, "at_once": AT_ONCE, "same": same, "widest": int(widest),
        "tok_s": AT_ONCE * NUM_TOKENS / seconds,
    }  # fmt: skip
