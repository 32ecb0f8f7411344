"""kill -9 on the engine process of a real server: a client that streams sees a pause, and the same text."""

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request

import pytest
from gate import Gate
from serving import serving

from octavo.simulate.replay import Replay

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.model

PROMPTS = ["Paper is made of", "The sea is", "Once upon a time", "A prime number"]
MAX_TOKENS = 60


def progress(url):
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health/progress") as answer:
        return json.load(answer)["progress"]


async def stream(client, prompt, begun):
    pieces = []
    options = {"model": "smollm2", "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    async for chunk in await client.completions.create(prompt=prompt, extra_body={"ignore_eos": True}, **options):
        pieces.append(chunk.choices[0].text)
        begun.add(prompt)
    return "".join(pieces), chunk.choices[0].finish_reason


async def four(url, gate=None, kill=None):
    """The four answers; `kill` is called when all have begun, at the gate."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        begun = set()
        if gate is not None:
            gate.hold_at(0)
        answers = [asyncio.create_task(stream(client, prompt, begun)) for prompt in PROMPTS]
        if gate is not None:
            while (await asyncio.to_thread(progress, url))["num_unfinished"] < len(PROMPTS):
                await asyncio.sleep(0.01)
            gate.hold_at(len(PROMPTS) * 25)
            while len(begun) < len(PROMPTS):
                await asyncio.sleep(0.01)
            assert not any(answer.done() for answer in answers)
            kill()
            gate.open()
        return await asyncio.gather(*answers)


def test_streams_go_on_after_kill_nine(tmp_path, monkeypatch):
    gate = Gate(tmp_path, monkeypatch)
    with serving("smollm2", "--max-model-len", "512", "--record", str(tmp_path)) as server:
        undisturbed = asyncio.run(four(server.url))
        first = server.engine_pid()
        disturbed = asyncio.run(four(server.url, gate, lambda: os.kill(first, signal.SIGKILL)))
        assert disturbed == undisturbed
        assert [reason for _, reason in disturbed] == ["length"] * len(PROMPTS)
        assert server.engine_pid() != first
        recording = Replay(next(tmp_path.glob(f"engine-*-{first}.jsonl")))  # of a process that could not say goodbye
        assert recording.run() is None
        assert len(recording.steps) > MAX_TOKENS
        assert recording.scheduler.num_running == len(PROMPTS)
        with urllib.request.urlopen(f"{server.root}/health/progress") as answer:
            progress = json.load(answer)["progress"]
        assert (progress["stage"], progress["num_restarts"]) == ("idle", 1)
