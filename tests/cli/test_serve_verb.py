"""`octavo serve` as a process: what it prints, that it answers, how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from octavo.cli.app import run
from octavo.cli.client import Server, fetch_json

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and what it said until it was ready."""
    command = [sys.executable, "-m", "octavo", "serve", str(model), "--load-format", "dummy", "--runtime", "reference"]
    process = subprocess.Popen([*command, "--port", "0", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    said = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if line.strip().startswith('"prompt": [1, 2, 3]'):
                break
        yield process, said
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


def children_of(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_says_what_it_does_answers_and_ends_cleanly(model: Path, stop: signal.Signals) -> None:
    with serving(model, "--served-model-name", "tiny", "--max-num-seqs", "3") as (process, said):
        found = re.search(r"Ready in ([\d.]+) s: (http://127\.0\.0\.1:\d+)/v1", said)
        assert found, said
        phases = re.findall(r"^  (\S.*?) +([\d.]+) s$", said, re.MULTILINE)
        total = dict(phases).pop("total")
        assert sum(float(s) for name, s in phases if name != "total") == pytest.approx(float(total), abs=0.01)
        assert float(found[1]) == pytest.approx(float(total), abs=0.01)
        assert "that holds" in said, "the memory plan"
        server = Server.parse(found[2])
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = asyncio.run(fetch_json(server, "POST", "/v1/completions", body))
        assert answer["usage"]["completion_tokens"] == 4
        engines = children_of(process.pid)
        assert len(engines) == 1, "one engine process"
        process.send_signal(stop)
        assert process.wait(60) == 0
        assert process.stderr is not None
        rest = process.stderr.read()
        assert rest.strip().splitlines()[-1] == "Stopped."
        assert "Traceback" not in rest
        assert not Path(f"/proc/{engines[0]}").exists(), "the engine has gone with it"


def test_what_does_not_fit_is_one_line_from_the_engine_process(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--load-format", "dummy", "--runtime", "reference", "--port", "0", "--num-gpu-blocks-override", "2"]
    assert run(["serve", str(model), *flags, "--max-model-len", "64"]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: one request of --max-model-len=64 tokens needs 4 KV blocks")
    assert "largest --max-model-len that fits is 32" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
