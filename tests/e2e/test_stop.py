"""How a server ends: Ctrl-C with a request running, and a model it cannot start with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
from serving import serving

from octavo.engine.child import EngineProcess

pytestmark = pytest.mark.model


def test_ctrl_c_without_grace_ends_running_requests_with_an_error() -> None:
    with serving("smollm2", "--max-model-len", "1024", "--shutdown-timeout", "0") as server:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as client:
            stream = client.completions.create(
                model="smollm2", prompt="Hello", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            statuses: list[int] = []
            stopping = threading.Thread(target=lambda: statuses.append(server.stop()))
            stopping.start()
            with pytest.raises(openai.APIError, match="the engine was shut down") as ended:
                for _ in stream:
                    pass
            assert ended.value.code == "draining"
            stopping.join()
        assert statuses == [0]
        assert "Traceback" not in "".join(server.lines)
        assert server.lines[-1].strip() == "Stopped."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_a_running_request_end(number: signal.Signals) -> None:
    """Also where each process of the group gets it, from a terminal or from an init system."""
    with serving("smollm2", "--max-model-len", "1024", "--shutdown-timeout", "60") as server:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
            stream = client.completions.create(
                model="smollm2", prompt="Hello", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
            )
            first = next(iter(stream))
            statuses: list[int] = []
            os.kill(server.engine_pid(), number)
            stopping = threading.Thread(target=lambda: statuses.append(server.stop(number)))
            stopping.start()
            reasons = [first.choices[0].finish_reason, *(chunk.choices[0].finish_reason for chunk in stream)]
            stopping.join()
        assert reasons[-1] == "length"
        assert statuses == [0]
        assert "starting another" not in "".join(server.lines), "the engine was not replaced meanwhile"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_engine_process_hears_no_signal_from_its_first_moment(number: signal.Signals) -> None:
    """A terminal sends a Ctrl-C to it, too, while it still imports what it needs."""
    process = EngineProcess()
    os.kill(process.pid, number)
    process._socket.close()
    process._pipe.close()
    assert process._process.wait(60) == 0, "it went on, until it found that its front was gone"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "this process hears them"


def test_a_damaged_model_is_one_line_without_traceback(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    serve = [sys.executable, "-m", "octavo", "serve", str(damaged), "--port", "0"]
    done = subprocess.run(serve, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "damaged.gguf is truncated or corrupt" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
