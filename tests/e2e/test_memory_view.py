"""GET /memory and `octavo top` on a real engine process behind the real server."""

import asyncio
import json
import os
import signal

import pytest
from tiny_engine import with_engine

from octavo import SamplingParams
from octavo.cli.client import Server, fetch_json
from octavo.cli.top import _watch
from octavo.errors import EngineLoadingError, EngineStoppedError, ServerError
from octavo.server.app import create_app
from octavo.server.keys import KeyEntry, Keyring
from octavo.server.loop import run_server
from tests.tiny_llama import TINY

ADMIN, USER = "admin-0123456789", "user-0123456789a"


def test_what_is_held_and_shared_is_seen_until_it_is_cached(tmp_path, capsys):
    config = {**TINY, "max_position_embeddings": 32768}  # answers that do not end while they are looked at
    (tmp_path / "config.json").write_text(json.dumps(config))

    async def use(engine):
        keyring = Keyring([KeyEntry(ADMIN, admin=True), KeyEntry(USER)])
        app = create_app(engine, served_model_names=["tiny"], keyring=keyring)
        port = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(run_server(app, port=0, ready=port.set_result, drain_seconds=0))
        url = f"http://127.0.0.1:{await port}"
        admin = Server.parse(url, api_key=ADMIN)
        params = SamplingParams(max_tokens=30_000, ignore_eos=True, temperature=0.0)
        streams = [engine.generate([*range(3, 36), last], params, str(last)) for last in (40, 41)]
        for stream in streams:
            await anext(stream)
        asked = [fetch_json(admin, "GET", "/memory") for _ in range(8)]
        first, *others = await asyncio.gather(*asked)
        assert all(other["states"] == first["states"] for other in others), "one map for all who ask together"
        await _watch(admin, 0.05, once=True)
        running = capsys.readouterr().out
        for stream in streams:
            await stream.aclose()
        await asyncio.sleep(0.3)  # behind MAP_SECONDS
        last = await fetch_json(admin, "GET", "/memory")
        for key, said in ((USER, "403: /memory needs an administrator's key"), (None, "401: no valid API key")):
            with pytest.raises(ServerError, match=said):
                await _watch(Server.parse(url, api_key=key), 0.05, once=True)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return first, running, last

    first, running, last = with_engine(tmp_path, use, num_gpu_blocks_override=4000)
    assert first["states"].startswith("22")
    assert sorted(holder["request_id"] for holder in first["holders"]) == ["40", "41"]
    assert first["metrics"]["num_requests_running"] == 2
    assert first["metrics"]["prefix_cache_hits_total"] == 32
    held = sum(state not in ".c" for state in first["states"])
    assert abs(held - 4000 * first["metrics"]["kv_cache_usage_perc"]) <= 40, "a few steps may lie between"
    assert "running 2   waiting 0, 0 preempted" in running
    assert "▓ shared 2 " in running
    assert set(last["states"]) == {".", "c"}
    assert last["holders"] == []
    assert last["metrics"]["kv_cache_usage_perc"] == last["metrics"]["num_requests_running"] == 0
    assert last["metrics"]["generation_tokens_total"] >= 2


def test_who_waits_for_a_map_is_told_that_the_engine_is_gone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    async def ask_in_vain(engine):
        engine._process.channel.send = lambda message: None
        asked = [asyncio.create_task(engine.memory()) for _ in range(2)]
        await asyncio.sleep(0)
        return asked

    async def use(engine):
        asked = await ask_in_vain(engine)
        os.kill(engine._process.pid, signal.SIGKILL)
        told = await asyncio.gather(*asked, return_exceptions=True)
        while engine.restarting:
            await asyncio.sleep(0.01)
        assert (await engine.memory())["holders"] == []
        await asyncio.sleep(0.3)  # behind MAP_SECONDS
        asked = await ask_in_vain(engine)
        await engine.shutdown()
        return told + await asyncio.gather(*asked, return_exceptions=True)

    told = with_engine(tmp_path, use, num_gpu_blocks_override=8, record="off")
    assert [type(error) for error in told] == [EngineLoadingError] * 2 + [EngineStoppedError] * 2
