"""Faults that are not the engine's own: the others are unharmed, or told clearly; nobody is lost in silence."""

import ast
import asyncio
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from serving import ROOT, Server, engine_of
from test_restart import Streams, sampling, undisturbed, with_engine
from tiny_text import FLAGS, write_tiny_text

from octavo import SamplingParams
from octavo.errors import StepError
from tools.wire import Wire, request

GUILTY = 666  # the seed of a request whose sampling fails
SAMPLING = f"""
import octavo.runtime.reference.sampler as sampler
choose = sampler._choose
def broken(logits, sampling, row, noise):
    if sampling.seeds[row] == {GUILTY} and sampling.positions[row] > 8:
        raise FloatingPointError("a fault in sampling")
    return choose(logits, sampling, row, noise)
sampler._choose = broken
"""
FULL_BYTES = 60_000
FULL = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({FULL_BYTES}, resource.RLIM_INFINITY))
"""
JUMPS = """
import random, time
real = time.time
time.time = lambda: real() + random.choice([-1e9, -86400, -1, 0, 3600, 1e9])
"""


@pytest.fixture
def inject(tmp_path, monkeypatch):
    """Has every process that starts run this first."""
    folder = tmp_path / "injected"

    def write(source):
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n{source}")
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")

    yield write
    assert (folder / "ran").exists(), "no process took the fault"


async def six(engine):
    """Six streams side by side; their ends."""
    streams = Streams(engine, num=6)
    return streams, await streams.run()


def test_an_exception_in_one_requests_sampling_ends_it_alone(folder, inject):
    inject(SAMPLING)
    guilty = SamplingParams(temperature=1.0, seed=GUILTY, max_tokens=40, ignore_eos=True)

    async def use(engine):
        running = asyncio.create_task(six(engine))
        await asyncio.sleep(0.05)
        got = []

        async def read():
            async for output in engine.generate([5, 6], guilty, "guilty"):
                got.append(output)

        with pytest.raises(StepError, match="a fault in sampling"):
            await read()
        streams, ends = await running
        return streams.tokens, ends, engine.progress().num_restarts

    tokens, ends, num_restarts = with_engine(folder, use)
    assert ends == ["length"] * 6
    assert num_restarts == 0
    assert tokens == undisturbed(folder)[:6]


def test_a_full_disk_ends_the_recording_and_nothing_else(folder, tmp_path, inject, capfd):
    inject(FULL)

    async def use(engine):
        streams, ends = await six(engine)
        for number in range(200):
            async for _ in engine.generate([7] * 40, SamplingParams(max_tokens=1), f"more{number}"):
                pass
        return streams.tokens, ends, engine.progress().num_restarts

    tokens, ends, num_restarts = with_engine(folder, use, record=str(tmp_path / "records"))
    assert (ends, num_restarts) == (["length"] * 6, 0)
    assert tokens == undisturbed(folder)[:6]
    [recording] = (tmp_path / "records").iterdir()
    assert recording.stat().st_size == FULL_BYTES, "it ran into the limit"
    assert f"recording to {recording} ends" in capfd.readouterr().err


def test_the_clock_on_the_wall_may_jump(folder, inject, monkeypatch):
    """Deadlines, limits, the watchdog: all of them go by the monotonic clock."""
    inject(JUMPS)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + random.choice([-1e9, -86400, -1, 0, 3600, 1e9]))  # the front's

    async def use(engine):
        kept = Streams(engine, num=6)

        async def one(number):
            async for output in engine.generate([5, 6, 7 + number], sampling(number), f"r{number}", timeout=100.0):
                kept.tokens[number] += output.outputs[0].token_ids
            return output.outputs[0].finish_reason

        ends = await asyncio.gather(*map(one, range(6)))
        return kept.tokens, ends, engine.progress()

    tokens, ends, progress = with_engine(folder, use)
    assert ends == ["length"] * 6
    assert tokens == undisturbed(folder)[:6]
    assert (progress.num_restarts, progress.stage) == (0, "idle")
    assert 0 <= progress.last_step_age < 100


def test_only_dates_that_people_read_come_from_the_clock_on_the_wall():
    found = set()
    for path in (ROOT / "octavo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"):
                found.add(path.relative_to(ROOT / "octavo").as_posix())
    answers = {"server/generation.py", "server/front.py", "server/embeddings.py"}  # "created"
    files = {"engine/record.py", "engine/black_box.py", "cli/bench/results.py"}  # names of files
    assert found <= answers | files | {"text/chat.py"}, "strftime_now of templates aside"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_text(tmp_path_factory.mktemp("text"))


BODY = {"prompt": "Once upon", "max_tokens": 30, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def test_slow_and_half_open_clients_harm_nobody(tiny):
    """Heads without an end, bodies without an end, streams that nobody reads, and a reset in the middle of each."""
    server = Server([tiny, *FLAGS])
    address = ("127.0.0.1", int(server.root.rpartition(":")[2]))
    stream = json.dumps({"prompt": "a", "max_tokens": 200, "n": 4, "ignore_eos": True, "stream": True}).encode()
    whole = request("POST", "/v1/completions", stream)
    opened = []

    async def ask(count):
        replies = []
        for _ in range(count):
            wire = Wire(server.url)
            replies.append(await asyncio.wait_for(wire.post("/v1/completions", BODY), 30))
            wire.close()
        return [reply.json()["choices"][0]["token_ids"] for reply in replies]

    async def load():
        wire = Wire(server.url)
        try:
            return (await wire.get("/load")).json()["server_load"]
        finally:
            wire.close()

    try:
        [alone] = asyncio.run(ask(1))
        for number in range(30):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(address)
            connection.sendall((b"GET / HTTP/1.1\r\nX: ", whole[:-20], whole)[number % 3])
            opened.append(connection)
        assert asyncio.run(ask(10)) == [alone] * 10
        for number, connection in enumerate(opened):
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            connection.close()
        while asyncio.run(load()):
            time.sleep(0.05)
        assert asyncio.run(ask(3)) == [alone] * 3
    finally:
        assert server.stop() == 0
    assert not any("Traceback" in line for line in server.lines)


def test_a_disk_that_fills_up_costs_no_request(tiny, tmp_path):
    """From when the server is ready no file may grow: not its log, not a recording, not a black box. Then its engine is
    killed: a stream goes on, and the server ends well."""
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    command = [sys.executable, "-m", "octavo", "serve", tiny, *FLAGS, "--port", "0", "--record", str(tmp_path)]
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        while "Ready in" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        [url] = re.findall(r"Ready in .*(http://\S+)/v1", log.read_text())
        engine = engine_of(process.pid)
        for pid in (process.pid, engine):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
        size = log.stat().st_size

        async def use():
            wire = Wire(url)
            body = {**BODY, "max_tokens": 200}
            alone = (await wire.post("/v1/completions", body)).json()["choices"][0]["token_ids"]
            asked = asyncio.create_task(wire.post("/v1/completions", body))
            await asyncio.sleep(0.02)
            os.kill(engine, signal.SIGKILL)
            again = (await asyncio.wait_for(asked, 60)).json()["choices"][0]["token_ids"]
            probe = Wire(url)
            while (progress := (await probe.get("/health/progress")).json()["progress"])["num_restarts"] == 0:
                await asyncio.sleep(0.05)
            for one in (wire, probe):
                one.close()
            return alone, again, progress["num_restarts"]

        alone, again, num_restarts = asyncio.run(use())
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert (again, num_restarts) == (alone, 1)
    assert log.stat().st_size == size
