"""A black box is bounded, keeps to itself what was said, and never costs more than a warning."""

from __future__ import annotations

import json
from types import SimpleNamespace

from octavo.config import EngineConfig
from octavo.engine.black_box import MAX_LEFT, MAX_REQUESTS, MAX_STEPS, write_black_box
from octavo.engine.watchdog import Progress
from octavo.errors import ConfigError
from octavo.messages import EngineReady, StepRecord

READY = EngineReady(8, 16, 128, 64, {}, 1, 1, "reference", "float32", "float32", {}, "", record="engine-1.jsonl")
# Ids that no time stamp prints by accident: "7777" once was in one.
PROMPT, ANSWER = [10**30 + 7] * 9, [10**30 + 8] * 3
PROGRESS = Progress("stalled", 5000, 7.5, 3.0, 0.1, 5.0, 1)


def running(count: int):
    group = SimpleNamespace(metrics=SimpleNamespace(arrival_time=0.0), prompt="secret", prompt_token_ids=PROMPT)
    for number in range(count):
        output = SimpleNamespace(token_ids=ANSWER, text="secret")
        request = SimpleNamespace(max_tokens=5)
        yield SimpleNamespace(request_id=f"r{number:0200}", parent=group, output=output, request=request, alone=False)


def write(config: EngineConfig, pid: int, count: int = 1) -> str:
    steps = [StepRecord(step, 1e9 + step / 3) for step in range(MAX_STEPS)]
    kwargs = {"config": config, "ready": READY, "progress": PROGRESS, "steps": steps}
    return write_black_box("a test", pid=pid, running=running(count), **kwargs)


def test_without_a_place_for_it_there_is_none(monkeypatch, caplog) -> None:
    def no_home(*_: object) -> None:
        raise ConfigError("this user has no home folder")

    monkeypatch.setattr("octavo.engine.black_box.cache_folder", no_home)
    assert write(EngineConfig(model="m"), 1) == ""
    assert "no black box was written: this user has no home folder" in caplog.text


def test_it_is_bounded_and_says_nothing_of_what_was_said(tmp_path) -> None:
    told = write(EngineConfig(model="m", record=str(tmp_path)), 1, count=5000)
    [path] = tmp_path.iterdir()
    assert told == f"; black box: {path}"
    text = path.read_text()
    assert len(text) < 1 << 20
    assert not any(word in text for word in ("secret", str(PROMPT[0]), str(ANSWER[0])))
    box = json.loads(text)
    assert (len(box["requests"]), len(box["steps"])) == (MAX_REQUESTS, MAX_STEPS)
    assert (box["reason"], box["recording"], box["progress"]["last_step_age"]) == ("a test", "engine-1.jsonl", 7.5)


def test_the_cache_keeps_the_newest(tmp_path) -> None:
    config = EngineConfig(model="m", download_dir=str(tmp_path))
    for pid in range(MAX_LEFT + 3):
        assert write(config, pid)
    assert len(list((tmp_path / "records").iterdir())) == MAX_LEFT


def test_off_writes_nothing_and_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog) -> None:
    assert write(EngineConfig(model="m", record="off", download_dir=str(tmp_path)), 1) == ""
    assert not list(tmp_path.iterdir())
    assert not caplog.text
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert write(EngineConfig(model="m", record=str(blocked / "folder")), 1) == ""
    assert "no black box was written" in caplog.text
