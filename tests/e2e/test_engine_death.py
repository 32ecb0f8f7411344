"""The engine process dies: every request gets an error that says so, health says so, nothing hangs."""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
from serving import serving

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.model


def wait_for_ill_health(root):
    """Status and message of the first /health that is not 200, within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{root}/health").close()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)["error"]["message"]
        time.sleep(0.05)
    return 200, "still well"


def test_kill_nine_is_told_to_everybody():
    with serving("smollm2", "--max-model-len", "1024") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30)
        stream = client.completions.create(
            model="smollm2", prompt="Hello", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        killer = threading.Timer(0.2, os.kill, (server.engine_pid(), signal.SIGKILL))
        killer.start()
        with pytest.raises(openai.APIError, match="signal 9"):
            for _ in stream:
                pass
        status, message = wait_for_ill_health(server.root)
        assert status == 503
        assert "signal 9" in message
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="smollm2", prompt="Hello", max_tokens=4)
        assert caught.value.status_code == 503
        assert caught.value.code == "engine_dead"
        client.close()
