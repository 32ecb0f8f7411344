"""A real server under load for long: `python tools/soak_server.py --minutes 30 --rate 20`, or one part of it.

mixed        answers of all kinds, streams that are left, slow readers, refusals, grammars that are always new, at a low
             rate. Every minute the load stops, and each process tells its memory and file handles; a request that
             needs every block of the pool shows that none is lost; a canary must have the tokens it always had.
             Behind the warm-up memory may gain 5 % (a burst that takes more once is no leak), handles nothing.
connections  1,000 streams at once.
storm        short requests as fast as one client can send them, refused and answered ones, while a stream runs and
             /health/live is asked: how many a second, and how long either had to wait.

The model is a tiny one with random weights: what is measured is the server, not the model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import datetime
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

from serving import Server, serving  # noqa: E402
from tiny_text import FLAGS, write_tiny_text  # noqa: E402

from lab.machine import describe_machine  # noqa: E402
from tools.fuzz_requests import SEEDS  # noqa: E402
from tools.fuzz_server import canary  # noqa: E402
from tools.wire import HungUp, Wire, request  # noqa: E402

POOL_TOKENS = 512
WARM_UP = 0.2  # of the samples: caches fill
MOST_GAINED = 0.05  # of a process's memory
NUM_CONNECTIONS = 1000
STORM_CONNECTIONS = 32
NUM_CLIENTS = 16  # at rate 0
LOG_LINES = 60  # of a failure
WHOLE = {"prompt": [5] * (POOL_TOKENS - 2), "max_tokens": 2, "ignore_eos": True}
ODD = [  # what happens beside right requests, by weight
    ("leaves", 3),
    ("slow", 1),
    ("refused", 2),
    ("grammar", 2),
    ("long", 2),
    ("right", 10),
]


def processes(server: Server) -> dict[str, dict[str, int]]:
    """Memory (KiB), file handles and threads of the server's processes, by what they run."""
    found = {}
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in [str(pid), *children]:
        command = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        name = next((part.removeprefix("octavo.engine.") for part in command if part.startswith("octavo.eng")), "front")
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
        handles = len(list(Path(f"/proc/{child}/fd").iterdir()))
        found[name] = {
            "rss": int(status["VmRSS"].split()[0]),
            "handles": handles,
            "threads": int(status["Threads"]),
        }
    return found


class Mixed:
    """Sends requests of all kinds, some a second, and samples in between."""

    def __init__(self, server: Server, rate: float, seed: int) -> None:
        self.server = server
        self.rate = rate
        self.draw = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.samples: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._number = 0

    async def run(self, minutes: float, every: float) -> None:
        """The whole soak; a sample every `every` seconds."""
        began = time.monotonic()
        expected = await canary(self.server.url)
        bar = tqdm(total=round(60 * minutes), unit="s", disable=None, file=sys.stderr)
        while (at := time.monotonic() - began) < 60 * minutes:
            await self._load(min(every, 60 * minutes - at))
            await self._sample(time.monotonic() - began, expected)
            bar.update(round(time.monotonic() - began) - bar.n)
        bar.close()

    async def _load(self, seconds: float) -> None:
        tasks: set[asyncio.Task[None]] = set()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.rate:  # as fast as they are answered
                await asyncio.gather(*(self._one() for _ in range(NUM_CLIENTS)))
                continue
            tasks.add(asyncio.create_task(self._one()))
            await asyncio.sleep(self.draw.expovariate(self.rate))
            tasks = {task for task in tasks if not task.done()}
        if tasks:
            await asyncio.wait(tasks)

    async def _one(self) -> None:
        self._number += 1
        odd = [(name, weight) for name, weight in ODD if self.rate or name != "slow"]
        kind = self.draw.choices([name for name, _ in odd], [weight for _, weight in odd])[0]
        self.counts[kind] += 1
        path = self.draw.choice(list(SEEDS))
        body = copy.deepcopy(self.draw.choice(SEEDS[path]))
        if kind == "refused":
            body["no_such_parameter"] = 1
        elif kind == "grammar":
            pattern = f"[ab]{{{1 + self._number % 5}}}x{self._number}"
            path, body = "/v1/completions", {"prompt": "x", "max_tokens": 4, "structured_outputs": {"regex": pattern}}
        elif kind == "long":
            size = self.draw.randint(50, 400)
            path, body = (
                "/v1/completions",
                {"prompt": [self.draw.randint(3, 250) for _ in range(size)], "max_tokens": 20},
            )
        elif kind in ("leaves", "slow"):
            path = "/v1/completions"
            body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        wire = Wire(self.server.url)
        try:
            if kind in ("leaves", "slow"):
                await self._read_some(wire, path, body, slow=kind == "slow")
                return
            reply = await asyncio.wait_for(wire.post(path, body), 60)
            self.counts[str(reply.status)] += 1
            if reply.status >= 500 or (reply.status == 400) != (kind == "refused"):
                self.failures.append(f"{kind} {path}: {reply.status} {reply.body[:200]!r} to {json.dumps(body)[:200]}")
        except (TimeoutError, HungUp) as error:
            self.failures.append(f"{kind} {path}: {error!r}")
        finally:
            wire.close()

    async def _read_some(self, wire: Wire, path: str, body: dict[str, Any], *, slow: bool) -> None:
        """Reads the beginning of a stream, or all of it slowly."""
        reader, writer = await asyncio.open_connection(wire.host, wire.port, limit=2048)
        writer.write(request("POST", path, json.dumps(body).encode()))
        try:
            got = b""
            for _ in range(1000 if slow else self.draw.randint(0, 3)):
                data = await asyncio.wait_for(reader.read(1024), 60)
                got = got[-7:] + data
                if not data or got.endswith(b"\r\n0\r\n\r\n"):
                    break
                await asyncio.sleep(0.02 if slow else 0)
        finally:
            writer.transport.abort()
            writer.close()

    async def _sample(self, seconds: float, expected: list[Any]) -> None:
        """With nothing running: all blocks are there, the canary sings, and what the processes hold."""
        wire = Wire(self.server.url)
        while (await wire.get("/load")).json()["server_load"]:
            await asyncio.sleep(0.02)
        whole = await asyncio.wait_for(wire.post("/v1/completions", WHOLE), 60)
        if whole.status != 200 or whole.json()["usage"]["completion_tokens"] != 2:
            self.failures.append(f"at {seconds:.0f} s the pool was not whole: {whole.body[:200]!r}")
        if await canary(self.server.url) != expected:
            self.failures.append(f"at {seconds:.0f} s the canary had other tokens")
        progress = (await wire.get("/health/progress")).json()["progress"]
        if progress["num_restarts"]:
            self.failures.append(f"at {seconds:.0f} s the engine had been restarted")
        wire.close()
        await asyncio.sleep(0.2)  # until the server has seen that connections are closed
        self.samples.append({"seconds": round(seconds, 1), "processes": processes(self.server)})

    def lines(self) -> dict[str, dict[str, float]]:
        """By process: how its memory grows, and its handles; what grows is a failure."""
        found, failures = lines(self.samples)
        self.failures += failures
        return found


def lines(samples: list[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """By process: memory at the end (MiB), its growth behind the warm-up and how much a minute (KiB), handles; and what
    grew."""
    kept = samples[math.ceil(len(samples) * WARM_UP) :]
    found, failures = {}, []
    for name, last in kept[-1]["processes"].items():
        points = [(s["seconds"] / 60, s["processes"][name]) for s in kept if name in s["processes"]]
        pairs = itertools.combinations(points, 2)
        slopes = [(b["rss"] - a["rss"]) / (until - since) for (since, a), (until, b) in pairs if until > since + 0.5]
        slope = statistics.median(slopes) if slopes else 0.0
        gained = last["handles"] - points[0][1]["handles"]
        found[name] = {
            "rss_mib": round(last["rss"] / 1024, 1),
            "rss_gained_kib": last["rss"] - points[0][1]["rss"],
            "rss_kib_per_minute": round(slope, 1),
            "handles": last["handles"],
            "handles_gained": gained,
            "threads": last["threads"],
        }
        if last["rss"] > (1 + MOST_GAINED) * points[0][1]["rss"]:
            failures.append(f"the memory of {name} grew from {points[0][1]['rss']:,} to {last['rss']:,} KiB")
        if gained > 0:
            failures.append(f"{name} has {gained} file handles more than after the warm-up")
    return found, failures


async def connections(url: str, count: int) -> dict[str, Any]:
    """So many streams at once; how they ended, and how long /health/live took meanwhile."""
    body = {"prompt": "Once upon", "max_tokens": 20, "ignore_eos": True, "stream": True}
    open_now = asyncio.Semaphore(count)
    began = time.monotonic()

    async def one() -> str:
        wire = Wire(url)
        try:
            async with open_now:
                reply = await asyncio.wait_for(wire.post("/v1/completions", body), 120)
            whole = reply.status == 200 and reply.body.endswith(b"data: [DONE]\n\n") and reply.body.count(b"data: ") > 2
            return f"{reply.status}{'' if whole or reply.status != 200 else ' cut'}"
        except (TimeoutError, HungUp, OSError) as error:
            return f"lost: {error!r:.80}"
        finally:
            wire.close()

    stop = asyncio.Event()
    probe = asyncio.create_task(_probe(url, stop))
    ends = Counter(await asyncio.gather(*(one() for _ in range(count))))
    stop.set()
    return {"connections": count, "seconds": round(time.monotonic() - began, 2), "ends": dict(ends), **await probe}


async def storm(server: Server, seconds: float) -> list[dict[str, Any]]:
    """As many short requests as the client can send, by kind."""
    url = server.url
    kinds = {
        "refused (400)": {"prompt": "a", "no_such_parameter": 1},
        "answered, one token": {"prompt": [5, 6], "max_tokens": 1},
    }
    results = []
    for name, body in kinds.items():
        raw = request("POST", "/v1/completions", json.dumps(body).encode())
        until = time.monotonic() + seconds
        statuses: Counter[str] = Counter()

        async def work(raw: bytes = raw, until: float = until, statuses: Counter[str] = statuses) -> None:
            wire = Wire(url)
            while time.monotonic() < until:
                statuses[str((await wire.ask(raw)).status)] += 1
            wire.close()

        stop = asyncio.Event()
        probe = asyncio.create_task(_probe(url, stop))
        cpu = cpu_seconds(server.process.pid)
        await asyncio.gather(*(work() for _ in range(STORM_CONNECTIONS)))
        stop.set()
        count = sum(statuses.values())
        front = round(1e6 * (cpu_seconds(server.process.pid) - cpu) / count)
        rate = {"per_second": round(count / seconds), "front_cpu_us": front}
        results.append({"kind": name, **rate, "statuses": dict(statuses), **await probe})
    return results


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _probe(url: str, stop: asyncio.Event) -> dict[str, float]:
    """Asks /health/live ten times a second: the longest and the median wait, milliseconds."""
    wire, waits = Wire(url), []
    while not stop.is_set():
        at = time.monotonic()
        assert (await wire.get("/health/live")).status == 200
        waits.append(1e3 * (time.monotonic() - at))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)
    wire.close()
    return {"health_median_ms": round(statistics.median(waits), 1), "health_longest_ms": round(max(waits), 1)}


def soak(parts: list[str], *, minutes: float, rate: float, every: float, seed: int) -> dict[str, Any]:
    """Runs parts against one server each; what happened, with `failures`."""
    result: dict[str, Any] = {"failures": []}
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            model = write_tiny_text(Path(folder), max_model_len=POOL_TOKENS)
            flags = [*FLAGS, "--served-model-name", "tiny", "--record", folder]
            if part == "mixed":
                flags += ["--num-gpu-blocks-override", str(POOL_TOKENS // 16), "--max-num-seqs", "16"]
            with serving(model, *flags) as server:
                if part == "mixed":
                    mixed = Mixed(server, rate, seed)
                    asyncio.run(mixed.run(minutes, every))
                    result["lines"] = mixed.lines()
                    result["counts"] = dict(mixed.counts)
                    result["samples"] = mixed.samples
                    result["failures"] += mixed.failures
                elif part == "connections":
                    found = result[part] = asyncio.run(connections(server.url, NUM_CONNECTIONS))
                    result["failures"] += [end for end in found["ends"] if end not in ("200", "429")]
                else:
                    result[part] = asyncio.run(storm(server, 10.0))
                starts = [at for at, line in enumerate(server.lines) if "ERROR" in line]
                result["failures"] += ["".join(server.lines[at : at + LOG_LINES]) for at in starts]
    return result


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--rate", type=float, default=20, help="requests a second of the mixed load; 0: as many as can be"
    )
    parser.add_argument("--every", type=float, default=60, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["mixed", "connections", "storm"])
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    arguments = parser.parse_args()
    result = soak(
        arguments.parts, minutes=arguments.minutes, rate=arguments.rate, every=arguments.every, seed=arguments.seed
    )
    for name, line in result.get("lines", {}).items():
        grown = f"{line['rss_gained_kib']:+6.0f} KiB behind the warm-up, {line['rss_kib_per_minute']:+5.1f} a minute"
        print(
            f"{name:10} {line['rss_mib']:7.1f} MiB ({grown}), {line['handles']} handles ({line['handles_gained']:+d})"
        )
    for part in ("counts", "connections", "storm"):
        if part in result:
            print(part, json.dumps(result[part]))
    for failure in result["failures"][:50]:
        print(failure)
    if arguments.out:
        command = f"python tools/soak_server.py --minutes {arguments.minutes:g} --rate {arguments.rate:g}"
        about = {
            "command": f"{command} --seed {arguments.seed} --parts {' '.join(arguments.parts)}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        arguments.out.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
