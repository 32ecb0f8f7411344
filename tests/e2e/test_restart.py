"""The engine process dies in the middle of streams: they go on, with the tokens they would have had anyway."""

import asyncio
import functools
import json
import os
import signal
from pathlib import Path

import pytest
import tiny_engine
from gate import Gate

from octavo import RequestOutputKind, SamplingParams
from octavo.engine import watchdog
from octavo.engine.child import EngineProcess
from octavo.errors import EngineDeadError, EngineLoadingError, StepError
from octavo.simulate.replay import Replay

NUM_STREAMS = 16
MAX_TOKENS = 80
POISON = [77, 78, 77, 78]
# every process that starts with this on its path kills itself at these tokens, or at the tenth position of "late"
CRASHES = f"""
import ctypes
from octavo.worker.steady import Batches
build = Batches.next
def crash(batches, scheduled):
    built = build(batches, scheduled)
    late = any(row.request_id == "late" and row.start >= 10 for row in scheduled)
    if late or {str(POISON)[1:-1]!r} in str(built.inputs.token_ids.tolist()):
        ctypes.string_at(0)  # reads what nobody may read
    return built
Batches.next = crash
"""


def with_engine(folder, use, **settings):
    settings = {"runtime": "reference", "max_num_seqs": NUM_STREAMS, **settings}
    return tiny_engine.with_engine(folder, use, seconds=120, **settings)


def black_boxes(folder):
    """The black boxes in a folder, oldest first; each is small and has no prompt in it."""
    paths = sorted(folder.glob("*.black-box.json"), key=lambda path: path.stat().st_mtime)
    assert all(path.stat().st_size < 1 << 20 for path in paths)
    return [(path, json.loads(path.read_text())) for path in paths]


def sampling(number):
    """Greedy, or sampled from a seed with penalties: both must come out the same."""
    sampled = {"temperature": 0.9, "seed": number, "presence_penalty": 0.5} if number % 3 == 0 else {"temperature": 0.0}
    kind = RequestOutputKind.DELTA
    return SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0, output_kind=kind, **sampled)


class Streams:
    """Streams side by side; `tokens` grows as they go, `pieces` counts what arrived."""

    def __init__(self, engine, num=NUM_STREAMS):
        self.engine = engine
        self.tokens = [[] for _ in range(num)]
        self.logprobs = [0 for _ in range(num)]

    async def run(self):
        return await asyncio.gather(*map(self.one, range(len(self.tokens))), return_exceptions=True)

    async def one(self, number):
        prompt = [5, 6, 7 + number]
        async for output in self.engine.generate(prompt, sampling(number), f"r{number}"):
            self.tokens[number] += output.outputs[0].token_ids
            self.logprobs[number] += len(output.outputs[0].logprobs)
        return output.outputs[0].finish_reason

    async def reached(self, num_tokens):
        """Waits until so many tokens came over all streams."""
        while sum(map(len, self.tokens)) < num_tokens:
            await asyncio.sleep(0.001)

    def under_way(self):
        return sum(0 < len(tokens) < MAX_TOKENS for tokens in self.tokens)


@pytest.fixture
def gate(tmp_path, monkeypatch):
    return Gate(tmp_path, monkeypatch)


@functools.cache
def undisturbed(folder):
    async def use(engine):
        streams = Streams(engine)
        assert await streams.run() == ["length"] * NUM_STREAMS
        return streams.tokens

    return with_engine(folder, use)


def test_kill_nine_twice_is_a_pause(folder, tmp_path, monkeypatch, gate):
    monkeypatch.setattr(watchdog, "BACK_OFF", (0.0, 0.1))
    monkeypatch.setattr(watchdog, "MIN_SILENCE", 600.0)  # who waits at the gate is not stalled

    leaving, ends = [], []  # who leaves while the next process has no channel yet, and how that ended
    open_channel = EngineProcess.open

    async def open_while_one_leaves(process):
        if leaving:
            leaving[0].cancel()
            ends.extend(await asyncio.gather(leaving.pop(), return_exceptions=True))
        await open_channel(process)

    monkeypatch.setattr(EngineProcess, "open", open_while_one_leaves)

    async def use(engine):
        streams = Streams(engine)
        running = await gate.start(streams)
        leaving.append(asyncio.create_task(anext(engine.generate([8], sampling(1), "leaves"))))
        first = engine._process.pid
        under_way = []
        for length in (20, 50):
            await gate.catch(streams, length)
            under_way.append(streams.under_way())
            os.kill(engine._process.pid, signal.SIGKILL)
            while engine.restarting is None:
                await asyncio.sleep(0.001)
            with pytest.raises(EngineLoadingError, match="signal 9"):
                await anext(engine.generate([1], sampling(1), "meanwhile"))
            assert engine.progress().stage == "restarting"
        assert [type(end) for end in ends] == [asyncio.CancelledError]
        gate.open()
        assert await running == ["length"] * NUM_STREAMS
        assert engine._process.pid != first
        assert engine.progress().num_restarts == 2
        page = engine.metrics.render().decode()
        (restarts,) = [line for line in page.splitlines() if line.startswith("octavo:engine_restarts_total{")]
        assert restarts.endswith(" 2.0")
        return streams, under_way

    streams, under_way = with_engine(folder, use, record=str(tmp_path))
    boxes = [box for _, box in black_boxes(tmp_path)]
    assert [box["reason"] for box in boxes] == ["the engine process was killed by signal 9"] * 2
    assert len({box["recording"] for box in boxes}) == 2
    assert min(under_way) >= 4, "streams were cut in the middle"
    assert streams.tokens == undisturbed(folder)
    assert streams.logprobs == [MAX_TOKENS] * NUM_STREAMS


def test_a_stopped_engine_is_replaced(folder, tmp_path, monkeypatch, caplog, gate):
    monkeypatch.setattr(watchdog, "MIN_SILENCE", 1.5)
    monkeypatch.setattr(watchdog, "MIN_SLEEP", 1.0)
    monkeypatch.setattr(watchdog, "TIMES_EXPECTED", 1)  # a step that waited at the gate was long

    async def use(engine):
        streams = Streams(engine)
        running = await gate.start(streams)
        await gate.catch(streams, 30)
        stages = {engine.progress().stage}
        os.kill(engine._process.pid, signal.SIGSTOP)
        gate.open()
        while not engine.restarting:
            stages.add(engine.progress().stage)
            await asyncio.sleep(0.05)
        assert await running == ["length"] * NUM_STREAMS
        return streams.tokens, stages

    tokens, stages = with_engine(folder, use, record=str(tmp_path))
    [(path, box)] = black_boxes(tmp_path)
    assert f"made no step for {float(box['reason'].split()[6]):.1f} s: it is killed; black box: {path}" in caplog.text
    assert box["progress"]["stage"] == "stalled"
    assert box["progress"]["last_step_age"] > 0.5
    assert 0 < len(box["requests"]) == box["progress"]["num_unfinished"] <= NUM_STREAMS
    assert sum(request["output_tokens"] for request in box["requests"]) > 0
    assert {request["prompt_tokens"] for request in box["requests"]} == {3}
    assert [step["step"] for step in box["steps"]] == list(range(len(box["steps"])))[-256:]
    assert box["steps"][-1]["num_running"] > 0
    assert Replay(Path(box["recording"])).run() is None
    assert "working" in stages
    assert tokens == undisturbed(folder)


BEAMS = SamplingParams(n=3, use_beam_search=True, temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize(
    ("request_id", "prompt", "params"),
    [("poison", [5, *POISON], sampling(1)), ("poison", [5, *POISON], BEAMS), ("late", [5, 6], BEAMS)],
)
def test_a_request_that_kills_engines_ends_alone(folder, tmp_path, monkeypatch, request_id, prompt, params):
    """Its engine dies, so does the next one; then it is known by running alone, and the others end well."""
    monkeypatch.setattr(watchdog, "BACK_OFF", (0.0, 0.1))
    gate = Gate(tmp_path, monkeypatch, CRASHES)

    async def use(engine):
        streams = Streams(engine, num=6)
        running = await gate.start(streams)
        await gate.catch(streams, 20)
        asked = asyncio.create_task(anext(engine.generate(prompt, params, request_id)))
        while engine.progress().num_unfinished <= 6:
            await asyncio.sleep(0.001)
        gate.open()
        with pytest.raises(StepError, match="ran this request alone"):
            await asked
        ended = await running
        return ended, engine.progress().num_restarts

    ended, num_restarts = with_engine(folder, use, record=str(tmp_path))
    assert [box["requests"][-1]["ran_alone"] for _, box in black_boxes(tmp_path)] == [False, True]
    assert ended == ["length"] * 6
    assert num_restarts == 2


def test_too_many_deaths_are_told_to_everybody(folder, monkeypatch, gate):
    monkeypatch.setattr(watchdog, "MIN_SILENCE", 600.0)
    monkeypatch.setattr(watchdog, "BACK_OFF", (0.0,))
    monkeypatch.setattr(watchdog, "MAX_RESTARTS", 1)

    async def use(engine):
        streams = Streams(engine)
        running = await gate.start(streams)
        for length in (20, 50):
            await gate.catch(streams, length)
            os.kill(engine._process.pid, signal.SIGKILL)
        ended = await running
        with pytest.raises(EngineDeadError, match="restarts within 10 minutes"):
            await anext(engine.generate([1], sampling(1), "later"))
        return ended

    ended = with_engine(folder, use)
    assert any(isinstance(end, EngineDeadError) for end in ended)
    assert all(end == "length" or isinstance(end, EngineDeadError) for end in ended)
