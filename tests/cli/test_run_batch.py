"""A batch file: answered line by line through the real application, whatever single lines are like."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
from pathlib import Path

import pytest

from octavo.cli import batch_file
from octavo.cli.batch_file import answer_all, answered
from octavo.cli.run_batch import _run
from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError
from octavo.server.app import create_app

sys.path.append(str(Path(__file__).parents[1] / "server"))
from fake_engine import FakeEngine

COMPLETION = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "ab", "max_tokens": 3}}
CHAT = {**COMPLETION, "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}


def run(folder: Path, lines: list[object], *, engine: FakeEngine | None = None, at_once: int = 3):
    """(went well, failed), the answers by custom_id, and what was told of each line."""
    source, target, told = folder / "in.jsonl", folder / "out.jsonl", []
    source.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    app = create_app(engine or FakeEngine(), served_model_names=["fake"])
    counts = asyncio.run(answer_all(app, source, target, at_once=at_once, done=told.append))
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    return counts, {answer["custom_id"]: answer for answer in answers}, told


def test_every_line_has_its_answer(tmp_path: Path) -> None:
    embedding = {**COMPLETION, "url": "/v1/embeddings", "body": {"input": "a", "normalize": False}}
    lines = [{"custom_id": f"c{n}", **COMPLETION} for n in range(10)]
    lines += [{"custom_id": "chat", **CHAT}, {"custom_id": "vector", **embedding}]
    engine = FakeEngine()
    counts, answers, told = run(tmp_path, lines, engine=engine)
    assert counts == (12, 0)
    assert told == [True] * 12
    response = answers["c3"]["response"]
    assert (response["status_code"], answers["c3"]["error"]) == (200, None)
    assert response["body"]["choices"][0]["text"] == "def"
    assert response["request_id"]
    assert answers["chat"]["response"]["body"]["choices"][0]["message"]["content"]
    assert answers["vector"]["response"]["body"]["data"][0]["embedding"] == [97, 2, 0]


def test_a_bad_line_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "MAX_LINE", 300)
    bad = {
        "priority": {"custom_id": "priority", **COMPLETION, "priority": 1},
        "url": {"custom_id": "url", **COMPLETION, "url": "/metrics"},
        "stream": {"custom_id": "stream", **COMPLETION, "body": {"prompt": "a", "stream": True}},
    }
    refused = {"custom_id": "refused", **COMPLETION, "body": {"prompt": "a", "temperature": -1}}
    lines = ["{no json", "[]", "", "x" * 1000, *bad.values(), refused, {"custom_id": "good", **COMPLETION}]
    counts, answers, _ = run(tmp_path, lines)
    assert counts == (1, 7)
    assert answers["good"]["response"]["status_code"] == 200
    assert answers["refused"]["response"]["status_code"] == 400
    assert answers["refused"]["response"]["body"]["error"]["param"] == "temperature"
    for name in bad:
        assert answers[name]["response"] is None
        assert name in answers[name]["error"]["message"]
    messages = [json.loads(line)["error"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum("not JSON" in one["message"] for one in messages if one) == 1
    assert [one["message"][:7] for one in messages if one and "300 bytes" in one["message"]] == ["line 4:"]


def test_it_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    lines = [{"custom_id": str(n), **COMPLETION} for n in range(6)]
    run(tmp_path, lines[:4])
    engine = FakeEngine()
    counts, answers, told = run(tmp_path, lines, engine=engine)
    assert counts == (2, 0)
    assert len(engine.seen) == 2
    assert len(told) == len(answers) == 6


@pytest.mark.parametrize("left", [1, 10, 60, -1])
def test_a_line_that_was_not_finished_is_answered_again(tmp_path: Path, left: int) -> None:
    lines = [{"custom_id": str(n), **COMPLETION} for n in range(4)]
    run(tmp_path, lines[:3], at_once=1)
    target = tmp_path / "out.jsonl"
    *whole, last = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole) + last[:left])
    counts, answers, _ = run(tmp_path, lines)
    assert counts == (2, 0), "the cut one and the new one"
    assert answers.keys() == {"0", "1", "2", "3"}
    assert target.read_bytes().splitlines(keepends=True)[:2] == whole


def test_no_more_run_at_once_than_allowed(tmp_path: Path) -> None:
    class Counting(FakeEngine):
        most = 0

        async def generate(self, *args, **options):
            async for output in super().generate(*args, **options):
                self.most = max(self.most, len(self.running))
                yield output

    engine = Counting(token_seconds=0.001)
    run(tmp_path, [{"custom_id": str(n), **COMPLETION} for n in range(12)], engine=engine, at_once=4)
    assert 2 <= engine.most <= 4


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(_: object) -> FakeEngine:
        return FakeEngine()

    async def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("octavo.engine.async_engine.AsyncEngine.start", start)
    monkeypatch.setattr(batch_file, "answer_all", full)
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(OctavoError, match=r"-o .*out.jsonl: No space left on device; .* goes on"):
        asyncio.run(_run(EngineConfig(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", 1))


def test_another_file_is_not_written_to(tmp_path: Path) -> None:
    for text in ("my diary\n", "my diary", '{"id": 5}', "[]\n{"):
        (tmp_path / "out.jsonl").write_text(text)
        with pytest.raises(ConfigError, match="something else"):
            answered(tmp_path / "out.jsonl")
