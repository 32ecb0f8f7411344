from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from test_bench_datasets import Words
from tiny_server import TinyServer, completion, delta, event, usage

from octavo.cli.app import run
from octavo.cli.bench import serve as bench_serve

GAP = 0.02


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "load_tokenizer_of", lambda _: Words())


async def three_chunks(body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Four tokens in three chunks, GAP apart."""
    for text in ("a", "b", "cd"):
        await asyncio.sleep(GAP)
        yield completion(text)
    yield usage(prompt=11, output=4)
    yield event(b"[DONE]")


def bench(server: TinyServer, *flags: str) -> int:
    return run(["bench", "serve", "--base-url", server.url, "--random-input-len", "5", *flags])


def test_times_and_counts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TinyServer(three_chunks) as server:
        flags = ["--num-prompts", "6", "--random-output-len", "9", "--ignore-eos", "--goodput", "ttft:5000 e2el:5000"]
        where = ["--result-dir", str(tmp_path), "--result-filename", "r.json", "--save-detailed"]
        assert bench(server, *flags, *where, "--metric-percentiles", "50,99") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (6, 66, 24)
    assert [len(gaps) for gaps in result["itls"]] == [2] * 6
    assert result["mean_ttft_ms"] >= GAP * 1000
    # (E2EL - TTFT) / (4 tokens - 1): two gaps shared by three tokens, though there were three chunks
    assert result["mean_tpot_ms"] == pytest.approx(result["mean_itl_ms"] * 2 / 3, rel=1e-6)
    assert result["request_goodput"] == result["request_throughput"]
    assert {"p50_ttft_ms", "p99_e2el_ms", "date", "backend", "model_id", "request_rate"} <= set(result)
    assert result["generated_texts"] == ["abcd"] * 6
    printed = capsys.readouterr().out
    assert "Successful requests:                     6" in printed
    assert "Time to First Token" in printed
    _, body = server.asked[-1]
    assert body["model"] == "tiny", "the first model that the server lists"
    assert (len(body["prompt"]), body["max_tokens"], body["ignore_eos"], body["temperature"]) == (5, 9, True, 0.0)


def test_max_concurrency_is_kept() -> None:
    async def together(body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The first, which only asks whether the server works, ends at once; the others when three are under way."""
        while sum("completions" in path for path, _ in server.asked) > 1 and server.most_under_way < 3:
            await asyncio.sleep(0.001)
        async for chunk in three_chunks(body):
            yield chunk

    with TinyServer(together) as server:
        assert bench(server, "--num-prompts", "9", "--max-concurrency", "3") == 0
    assert server.most_under_way == 3


def test_request_rate_spreads_requests(tmp_path: Path) -> None:
    with TinyServer(three_chunks) as server:
        where = ["--save-result", "--result-dir", str(tmp_path)]
        assert bench(server, "--num-prompts", "10", "--request-rate", "50", "--burstiness", "inf", *where) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-50.0qps-tiny-")
    assert json.loads(path.read_text())["duration"] >= 10 / 50


def test_chat_backend_sends_text(tmp_path: Path) -> None:
    async def chat(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield delta("")
        yield delta("hello", "stop")
        yield event(b"[DONE]")

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "what is this"}')
    with TinyServer(chat) as server:
        dataset = ["--dataset-name", "custom", "--dataset-path", str(path), "--custom-output-len", "3"]
        assert bench(server, "--backend", "openai-chat", "--num-prompts", "2", *dataset) == 0
    request, body = server.asked[-1]
    assert request == "POST /v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "what is this"}]
    assert body["max_completion_tokens"] == 3


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    async def every_other(body: dict[str, Any]) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        if calls % 2:
            yield completion("a")
        else:
            yield event({"error": {"message": "the engine is gone"}})

    with TinyServer(every_other) as server:
        assert bench(server, "--num-prompts", "4", "--max-concurrency", "1") == 0
    captured = capsys.readouterr()
    assert "Successful requests:                     2" in captured.out
    assert "Failed requests:                         2" in captured.out
    assert "failed: the server ended the stream: the engine is gone" in captured.err


def test_a_server_that_refuses_ends_the_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with TinyServer(three_chunks, status=400) as server:
        assert bench(server, "--num-prompts", "50") == 1
    assert "the first test request failed" in capsys.readouterr().err
    assert len(server.asked) == 2, "the list of models, and one request"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "vllm2"], "--backend must be one of openai, openai-chat"),
        (["--request-rate", "0"], "must be above 0"),
        (["--ramp-up-strategy", "steep"], "one of linear, exponential"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["--ramp-up-strategy", "linear", "--request-rate", "2"], "leave --request-rate out"),
        (["--goodput", "itl:5"], "write ttft:200"),
        (["--goodput", "ttft:fast"], "write ttft:200"),
        (["--metric-percentiles", "99,101"], "from 0 to 100"),
        (["--percentile-metrics", "ttft,speed"], "not 'speed'"),
        (["--dataset-name", "sonnet"], "must be one of"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with TinyServer(three_chunks) as server:
        assert bench(server, *flags) == 2
    assert words in capsys.readouterr().err
