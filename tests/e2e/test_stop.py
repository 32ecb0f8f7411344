"""Ctrl-C with a request running: its client is told, the exit is clean."""

from __future__ import annotations

import threading

import openai
import pytest
from serving import serving

pytestmark = pytest.mark.model


def test_ctrl_c_ends_running_requests_with_an_error() -> None:
    with serving("smollm2", "--max-model-len", "1024") as server:
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as client:
            stream = client.completions.create(
                model="smollm2", prompt="Hello", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            statuses: list[int] = []
            stopping = threading.Thread(target=lambda: statuses.append(server.stop()))
            stopping.start()
            with pytest.raises(openai.APIError, match="the engine was shut down"):
                for _ in stream:
                    pass
            stopping.join()
        assert statuses == [0]
        assert "Traceback" not in "".join(server.lines)
        assert server.lines[-1].strip() == "Stopped."
