"""Mutated requests against a real server on a tiny model: `python tools/fuzz_server.py --requests 100000 --seed 1`.

fuzz_requests.py draws them. What must hold, for each:

- it is answered or hung up on within SECONDS (no hang), and never with 500 or 502;
- 503 and 504 come only with a documented code; an error has its API's shape; a stream ends as streams do;

and for the server: canary requests in between keep their tokens to the bit, the engine is never restarted, nothing is
logged as a failure, and in the end nothing runs and the whole pool can be taken.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

from serving import serving  # noqa: E402
from tiny_text import FLAGS, write_tiny_text  # noqa: E402

from lab.machine import describe_machine  # noqa: E402
from tools.fuzz_requests import USER, Requests  # noqa: E402
from tools.wire import HungUp, Reply, Wire  # noqa: E402

SECONDS = 60.0
CUT_SECONDS = 1.0
CANARY_EVERY = 250
POOL_TOKENS = 512
CODES_503 = {"engine_dead", "loading", "draining", "stalled"}


class Fuzzer:
    """Judges the answers to what was drawn."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def judge(self, number: int, path: str, reply: Reply) -> None:
        """Books an answer; what must not be is a failure."""
        self.counts[str(reply.status)] += 1
        wrong = None
        if reply.status in (500, 502):
            wrong = "our fault"
        elif reply.status in (503, 504, 529):
            wrong = "the server says that it cannot serve"  # nothing here is a reason for that
        elif reply.status >= 400:
            wrong = self._wrong_shape(path, reply)
        elif reply.headers.get("content-type", "").startswith("text/event-stream"):
            self.counts["streams"] += 1
            text = reply.body
            if path == "/v1/messages":
                if b"event: message_stop" not in text[-200:] and b"event: error" not in text:
                    wrong = "a stream without its end"
            elif path.startswith("/v1/") and "completions" in path and not text.endswith(b"data: [DONE]\n\n"):
                wrong = "a stream without its end"
            if b"server_error" in text or b"api_error" in text:
                wrong = "our fault, in a stream"
        if wrong:
            self.fail(number, f"{wrong}: {reply.status} {reply.body[:300]!r}")

    def _wrong_shape(self, path: str, reply: Reply) -> str | None:
        if "x-request-id" not in reply.headers:  # refused by the HTTP layer: it did not come to a request
            return None if reply.status in (400, 431) else "an error without X-Request-Id"
        if not reply.body:
            return None  # HEAD
        try:
            document = reply.json()
            error = document["error"]
            known = isinstance(error["message"], str) and isinstance(error["type"], str)
        except (ValueError, KeyError, TypeError):
            return "an error in no known shape"
        self.counts[f"{reply.status} {error.get('code') or error['type']}"] += 1
        return None if known else "an error in no known shape"

    def fail(self, number: int, what: str) -> None:
        """Notes what must not be."""
        self.counts["failures"] += 1
        if len(self.failures) < 50:
            _, raw = self.requests.draw(number)
            self.failures.append(f"request {number} of seed {self.requests.seed}: {what}\n    {raw[:600]!r}")


async def canary(url: str) -> list[Any]:
    """Answers that must stay the same: greedy, sampled, with logprobs, a chat, a grammar."""
    wire = Wire(url)
    greedy = {"prompt": "The canary", "max_tokens": 12, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    sampled = {"prompt": "sings", "max_tokens": 12, "seed": 7, "n": 2, "ignore_eos": True}
    chat = {"messages": [USER], "max_tokens": 8, "temperature": 0, "response_format": {"type": "json_object"}}
    answers = []
    for path, body in (("completions", greedy), ("completions", sampled), ("chat/completions", chat)):
        reply = await wire.post(f"/v1/{path}", {**body, "return_token_ids": True})
        answers.append([(c["token_ids"], c["logprobs"]) for c in reply.json()["choices"]])
    wire.close()
    return answers


async def fuzz(fuzzer: Fuzzer, url: str, first: int, num_requests: int, connections: int) -> None:
    """All requests, some at a time, canaries in between."""
    numbers = iter(range(first, first + num_requests))
    probe = Wire(url)
    expected = await canary(url)
    bar = tqdm(total=num_requests, unit="request", disable=None, file=sys.stderr)

    async def work() -> None:
        wire = Wire(url)
        for number in numbers:
            path, raw = fuzzer.requests.draw(number)
            wants_body = not raw.startswith(b"HEAD ")
            try:
                # who announces more than it sends is waited for, as long as a body may take: it leaves
                seconds = CUT_SECONDS if _is_cut(raw) else SECONDS
                reply = await asyncio.wait_for(wire.ask(raw, has_body=wants_body), seconds)
            except TimeoutError:
                fuzzer.counts["left"] += 1
                if seconds == SECONDS:
                    fuzzer.fail(number, f"no answer within {SECONDS:g} s")
                wire.close()
            except HungUp:
                fuzzer.counts["hung up"] += 1
                wire.close()
            except (ValueError, IndexError) as error:
                fuzzer.fail(number, f"no HTTP: {error}")
                wire.close()
            else:
                fuzzer.judge(number, path, reply)
            if number % CANARY_EVERY == 0:
                fuzzer.counts["canaries"] += 1
                if await canary(url) != expected:
                    fuzzer.fail(number, "a canary's tokens changed")
            bar.update()
        wire.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    bar.close()
    while (await probe.get("/load")).json()["server_load"]:
        await asyncio.sleep(0.05)
    progress = (await probe.get("/health/progress")).json()["progress"]
    if progress["num_restarts"] or progress["stage"] != "idle":
        fuzzer.fail(first, f"the engine stands at {progress}")
    whole = {"prompt": [5] * (POOL_TOKENS - 2), "max_tokens": 2, "ignore_eos": True}
    reply = await probe.post("/v1/completions", whole)
    if reply.status != 200 or reply.json()["usage"]["completion_tokens"] != 2:
        fuzzer.fail(first, f"the whole pool cannot be taken in the end: {reply.body[:300]!r}")
    if await canary(url) != expected:
        fuzzer.fail(first, "the last canary's tokens changed")
    probe.close()


def _is_cut(raw: bytes) -> bool:
    return b"Content-Length: 1000000000000000000" in raw or b"Transfer-Encoding: chunked" in raw


def run(num_requests: int, *, seed: int, first: int = 0, connections: int = 8, flags: tuple[str, ...] = ()) -> Fuzzer:
    """Starts a server, fuzzes it, ends it; the Fuzzer has what happened."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_text(Path(folder), max_model_len=POOL_TOKENS)
        pool = ("--num-gpu-blocks-override", str(POOL_TOKENS // 16), "--max-num-seqs", "16", "--record", "off")
        name = ("--served-model-name", "tiny")
        with serving(model, *FLAGS, *name, *pool, *flags) as server:
            document = asyncio.run(_once(server.url, "/openapi.json"))
            fuzzer = Fuzzer(Requests(seed, document))
            asyncio.run(fuzz(fuzzer, server.url, first, num_requests, connections))
            for line in server.lines:
                if "Traceback" in line or "failed" in line or " ERROR" in line:
                    fuzzer.fail(first, f"the log says: {line.strip()}")
    return fuzzer


async def _once(url: str, path: str) -> Any:
    wire = Wire(url)
    try:
        return (await wire.get(path)).json()
    finally:
        wire.close()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first request: to go on, or to repeat one")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    arguments = parser.parse_args()
    began = time.monotonic()
    fuzzer = run(arguments.requests, seed=arguments.seed, first=arguments.first, connections=arguments.connections)
    seconds = time.monotonic() - began
    for failure in fuzzer.failures:
        print(failure)
    counts = dict(sorted(fuzzer.counts.items()))
    print(f"{arguments.requests} requests in {seconds:.0f} s, {fuzzer.counts['failures']} failures")
    print("\n".join(f"{count:>10,}  {name}" for name, count in counts.items()))
    if arguments.out:
        old = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
        command = f"python tools/fuzz_server.py --seed {arguments.seed} --first {arguments.first}"
        entry = {
            "command": f"{command} --requests {arguments.requests} --connections {arguments.connections}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "seconds": round(seconds),
            "counts": counts,
            "failures": fuzzer.failures,
        }
        arguments.out.write_text(json.dumps({"runs": [*old, entry]}, indent=1) + "\n")
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
