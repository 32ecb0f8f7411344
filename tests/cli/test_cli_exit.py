"""Exit statuses and what is said: one line, never a traceback unless asked for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from octavo import __version__
from octavo.cli import app, main
from octavo.cli.app import run
from octavo.cli.files import write_json
from octavo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["serve", "--dtype", "int3"], 2, "--dtype must be one of"),
        (["serve", "--max-model-len", "4x"], 2, "'4x' is not a size"),
        (["serve", "--port", "99999"], 2, "--port"),
        (["serve", "--tensor-parallel-size", "2"], 2, "--tensor-parallel-size=2 is not built"),
        (["serve", "-q", "awq"], 2, "--quantization='awq' is not built"),
        (["serve", "--enable-lora"], 2, "--enable-lora"),
        (["serve", "--metrics-compat", "tgi"], 2, "one of octavo, vllm"),
        (["serve", "--disable-fusions", "norm,fast"], 2, "--disable-fusions must be one of norm, residual, activation"),
        (["serve", "--log-level", "loud"], 2, "--log-level must be one of"),
        (["serve", "--chat-template", "/no/such/file"], 2, "No such file"),
        (["run-batch", "-i", __file__, "-o", "/no/such/folder/out"], 2, "-o /no/such/folder/out: No such file"),
        (["complete", "x", "--model", "no-such-model"], 2, "no model 'no-such-model'"),
        (["program", "smolm2"], 2, "did you mean smollm2?"),
        (["serv"], 2, "serv"),
        (["complete", "x", "--url", "ftp://x"], 2, "is not the address of a server"),
        (["complete", "x", "--url", "http://127.0.0.1:9", "--dtype", "float32"], 2, "--dtype shapes an engine"),
        (["complete", "x", "--url", "http://127.0.0.1:9"], 1, "no server answers at http://127.0.0.1:9"),
    ],
)
def test_errors_are_one_line_and_a_status(
    args: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", "/no/such/model", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_ctrl_c_is_said_and_has_the_shells_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("octavo.cli.complete.find_model", interrupted)
    assert run(["complete", "x"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["complete", "x", "--url", "http://127.0.0.1:9", "--log-level", "debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "\nerror: no server answers" in error
    assert run(["complete", "x", "--url", "http://127.0.0.1:9"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_program_prints_nodes_of_a_bare_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 32}
    config |= {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(["program", str(tmp_path), "--load-format", "dummy", "--num-tokens", "7", "--context", "1k"]) == 0
    captured = capsys.readouterr()
    assert "llama, native runtime, float32 weights" in captured.err
    qkv = next(line for line in captured.out.splitlines() if line.startswith("layers.0.qkv"))
    assert "7x64" in qkv
    assert f"{64 * 32 * 4 / 1024:.1f} KiB" in qkv, "bytes of the stacked float32 weight"
    assert "1000 positions attended" in captured.out
    assert run(["program", str(tmp_path), "--max-model-len", "999"]) == 2
    assert "--max-model-len 999 is more than the model's 128 positions" in capsys.readouterr().err


def test_bare_octavo_and_bench_show_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage: octavo VERB" in capsys.readouterr().out
    assert run(["bench"]) == 0
    assert "Usage: octavo bench VERB" in capsys.readouterr().out


def test_help_and_version_load_nothing_heavy() -> None:
    code = """
import sys
from octavo.cli import app, main
from octavo.cli.app import run
from octavo.cli.files import write_json
from octavo.errors import ConfigError
assert run(["--version"]) == 0 and run(["--help"]) == 0 and run(["serve", "--help"]) == 0
heavy = {"numpy", "fastapi", "uvicorn", "tokenizers", "huggingface_hub", "prometheus_client", "msgspec"}
loaded = heavy & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"octavo {__version__}\n")


def test_python_dash_m_octavo_is_octavo() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "serve", "--dtype", "x"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --dtype must be one of")


def test_a_name_that_no_host_can_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    host = "a" * 70  # a label has at most 63
    assert run(["serve", "--host", host]) == 2
    assert f"error: cannot listen on {host}" in capsys.readouterr().err
    assert run(["complete", "x", "--url", f"http://{host}"]) == 1
    assert f"error: no server answers at http://{host}" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_names_the_file_and_the_next_step(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such.json", Path("/dev/full")):
        with pytest.raises(ConfigError, match=f"cannot write {path}: .*; name another file"):
            write_json(path, {"numbers": [1.0]})
    write_json(tmp_path / "result.json", {"numbers": [1.0]})
    assert json.loads((tmp_path / "result.json").read_text()) == {"numbers": [1.0]}


def test_a_ctrl_c_before_a_verb_runs_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
        main()
    assert (getattr(left.value, "code", None), capsys.readouterr().err) == (130, "Interrupted.\n")
