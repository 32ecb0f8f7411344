"""What tools/gpu_check.py says of a card is only worth something if it can say no."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

VOCAB = 12


@pytest.fixture
def gpu_check(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "tools"), *sys.path])
    monkeypatch.setenv("OUT", str(tmp_path))
    import gpu_check

    monkeypatch.setattr(gpu_check, "RESULTS", [])
    return gpu_check


class NextIsOneMore:
    """A runtime whose likeliest token is the last one plus 1; with `unsure`, hardly."""

    def __init__(self, unsure=False):
        self._graphs, self.unsure = "graphs", unsure

    def execute(self, inputs):
        assert self._graphs is None, "checked by the graphs that are to be checked"
        self._next = (inputs.token_ids[inputs.logits_indices] + 1) % VOCAB

    def sample(self, sampling):
        pass

    def _logits_on_device(self):
        logits = torch.full((len(self._next), VOCAB), 0.99 if self.unsure else 0.0)
        logits[torch.arange(len(self._next)), torch.from_numpy(self._next).long()] = 1.0
        return logits


def check(gpu_check, runtime, answer):
    from gpu_serving import check_tokens

    config = SimpleNamespace(kv_cache_dtype="auto", max_num_seqs=3, block_size=16)
    llm = SimpleNamespace(_executor=SimpleNamespace(worker=SimpleNamespace(runtime=runtime)), config=config)
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)])]
    check_tokens(llm, "fake", SimpleNamespace(requests=[([1, 2, 3], len(answer))]), outputs, gpu_check.result)


def test_right_tokens_pass_and_wrong_ones_do_not(gpu_check):
    runtime = NextIsOneMore()
    check(gpu_check, runtime, [4, 5, 6, 7, 8])
    assert gpu_check.RESULTS[-1]["agree"] == 1
    with pytest.raises(AssertionError, match="3 of 5"):
        check(gpu_check, runtime, [4, 5, 9, 10, 0])
    assert runtime._graphs == "graphs", "they are back, whatever came out"
    with pytest.raises(AssertionError, match="shows nothing"):
        check(gpu_check, NextIsOneMore(unsure=True), [4, 5, 6])


def test_a_failure_is_a_result_and_ends_with_status_1(gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "model"])
    monkeypatch.setattr(gpu_check, "stage_model", lambda _: np.zeros(2)[3])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code
    assert "IndexError" in json.loads((tmp_path / "gpu_check.json").read_text())["results"][0]["failed"]
    gpu_check.RESULTS.clear()
    monkeypatch.setattr(gpu_check, "stage_model", lambda _: gpu_check.result("fine", ok=True))
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert not ended.value.code


def test_a_sanitizer_that_found_something_or_did_not_end_is_heard(gpu_check):
    from gpu_sanitizer import read

    passed, race = (
        "..\n3 passed, 1 skipped in 2.1s\n",
        "========= RACECHECK SUMMARY: 6 hazards displayed (5 errors, 1 warnings)",
    )
    assert read(f"{passed}{race}\n") == ({"passed": 3, "skipped": 1}, 5, 1)
    assert read(f"{passed}========= ERROR SUMMARY: 0 errors\n") == ({"passed": 3, "skipped": 1}, 0, 0)
    assert read("..========= Error: Race reported (0 errors)") == ({}, None, 0)


def test_settings_are_literals_or_words(gpu_check):
    text = "kv_cache_dtype=fp8,fuse_ops=False,max_num_seqs=8,model=__import__('os')"
    expected = {"kv_cache_dtype": "fp8", "fuse_ops": False, "max_num_seqs": 8, "model": "__import__('os')"}
    assert gpu_check.engine_settings(text) == expected
