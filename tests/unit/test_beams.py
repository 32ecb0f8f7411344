"""Beams under the scheduler: admitted, preempted, failed and ended together; the answers of a naive loop."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake import FakeExecutor, kv_of, likeliest, make_request, naive
from invariants import check_kv

from octavo.errors import ContextLengthError, InvalidValueError
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import StepRecord
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.scheduler.budget import Limits
from octavo.scheduler.recorder import RecordingScheduler, Ring
from octavo.scheduler.scheduler import Scheduler
from octavo.simulate.replay import Replay


def naive_beams(prompt: list[int], width: int, max_tokens: int, stop_ids: frozenset[int]) -> list[list[int]]:
    """Beam search with length penalty 1 over whole hypotheses: no blocks, no rows."""
    beams = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, max_tokens + 1):
        found = []
        for logprob, ids in beams:
            for token, more in likeliest(kv_of(prompt + ids)[-1], width + len(stop_ids)):
                found.append((logprob + more, [*ids, token]))
        found.sort(key=lambda beam: -beam[0])
        del found[max(2, 1 + len(stop_ids)) * width :]
        ends = [beam[1][-1] in stop_ids or length == max_tokens for beam in found]
        finished += [(p / length, ids) for (p, ids), end in zip(found[:width], ends, strict=False) if end]
        finished.sort(key=lambda beam: -beam[0])
        del finished[width:]
        beams = [beam for beam, end in zip(found, ends, strict=True) if not end][:width]
        if not beams or (len(finished) == width and beams[0][0] / length <= finished[-1][0]):
            break
    return [ids for _, ids in finished]


def beam_request(name: str, prompt: list[int], width: int, max_tokens: int, stop_ids: frozenset[int]) -> Request:
    request = make_request(name, prompt, max_tokens, stop_ids=stop_ids)
    request.params = SamplingParams(use_beam_search=True, n=width, max_tokens=max_tokens)
    return request


class Walk:
    """Beams and plain Requests over one small pool, with aborts and failing steps, checked after every step."""

    def __init__(self, seed: int, recording: Path | None = None, ring: int = 1 << 20) -> None:
        self.random = draw = random.Random(seed)
        self.block_size, self.rows = draw.randrange(1, 5), draw.randrange(3, 9)
        windows = draw.choice([(0,), (0,), (0, 3), (2,), (0, 4, 4)])
        num_blocks, num_host_blocks = draw.randrange(8, 40) * len(windows), draw.choice([0, 0, 3, 20])
        budget = self.rows + draw.randrange(12)
        self.kv = KVCacheManager(
            num_blocks, self.block_size, windows, budget, draw.random() < 0.6, b"key", num_host_blocks=num_host_blocks
        )
        self.scheduler = (RecordingScheduler if recording else Scheduler)(
            self.kv, Limits(self.rows, budget, 40, max_run_ahead=draw.randrange(2))
        )
        if recording is not None and isinstance(self.scheduler, RecordingScheduler):
            self.scheduler.record(Ring(recording, ring), {"block_size": self.block_size})
        self.executor = FakeExecutor(num_blocks, self.block_size, windows, num_host_blocks)
        self.depth = draw.randrange(1, 3)
        self.expected: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self.records: list[StepRecord] = []
        self.failed: set[str] = set()

    def add(self, name: str) -> None:
        draw = self.random
        prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
        width, max_tokens = draw.randrange(1, 4), draw.randrange(1, 9)
        stop_ids = frozenset(draw.sample(range(13), draw.randrange(3)))
        beams = width > 1
        request = beam_request(name, prompt, width, max_tokens, stop_ids)
        if not beams:
            request = make_request(name, prompt, max_tokens, stop_ids=stop_ids)
        try:
            self.scheduler.add(request)
        except (ContextLengthError, InvalidValueError):
            return
        answers = (
            naive_beams(prompt, width, max_tokens, stop_ids) if beams else [naive(prompt, max_tokens, 40, stop_ids)[0]]
        )
        for answer_id, tokens in zip(request.answer_ids, answers, strict=True):
            self.expected[answer_id], self.received[answer_id] = tokens, []

    def step(self) -> None:
        output = None
        if len(self.executor.results) < self.depth:
            output = self.scheduler.schedule()
            if output.scheduled:
                self.records.append(StepRecord(output.step, 0.0))
                self.scheduler.fill(self.records[-1], output)
                self.executor.fail_next = self.random.random() < 0.03
                self.executor.execute(output)
        if self.executor.results and (len(self.executor.results) == self.depth or not (output and output.scheduled)):
            done, result = self.executor.results.popleft()
            deltas = self.scheduler.fail(done, "boom") if result is None else self.scheduler.update(done, result)
            for delta in deltas:
                self.received[delta.request_id] += delta.token_ids
                if delta.finish_reason == "error":
                    self.failed.add(delta.request_id)
        beams = {name for name in self.kv._tables if "/" in name}
        check_kv(self.kv, set(self.scheduler._requests) | beams)

    def run(self) -> None:
        for number in range(12):
            self.add(f"r{number}")
            for _ in range(self.random.randrange(4)):
                self.step()
            if self.random.random() < 0.15 and self.scheduler._requests:
                name = self.random.choice(list(self.scheduler._requests))
                for delta in self.scheduler.abort(name):
                    self.failed.add(delta.request_id)
        for _ in range(3000):
            if not self.scheduler.has_unfinished and not self.executor.results:
                break
            self.step()
        assert not self.scheduler.has_unfinished, "livelock"
        assert self.kv.pool.num_used == 0
        assert sorted(self.scheduler._rows.free) == list(range(self.rows))
        for answer_id, tokens in self.expected.items():
            if answer_id not in self.failed:
                assert self.received[answer_id] == tokens, answer_id


def test_random_walks_give_the_naive_answers() -> None:
    events = ("num_forked", "num_copied_blocks", "num_preempted", "num_chunked", "prefix_hits", "num_loaded_blocks")
    totals = dict.fromkeys(events, 0)
    for seed in range(150):
        walk = Walk(seed)
        walk.run()
        for name in totals:
            totals[name] += sum(getattr(record, name) for record in walk.records)
    assert all(totals.values()), totals


@pytest.mark.parametrize("ring", [1 << 20, 4_000])
def test_recorded_walks_replay_to_the_same_decisions_and_tell_no_log_probability(tmp_path, ring: int) -> None:
    num_rounds = num_forked = num_preempted = num_steps = 0
    for seed in range(60):
        walk = Walk(seed, tmp_path / f"{seed}", ring)
        walk.run()
        walk.scheduler.close()
        replay = Replay(tmp_path / f"{seed}")
        assert replay.run() is None
        num_steps += len(replay.steps)
        events = [json.loads(line) for line in (tmp_path / f"{seed}").read_text().splitlines()]
        rounds = [told for event in events for told in event.get("beams", ())]
        num_rounds += len(rounds)
        num_forked += sum(len(parents) - len(set(parents)) for parents, _ in rounds if parents)
        num_preempted += sum(len(event.get("pre", ())) for event in events)
        assert not any(value < 0 for event in events for value in floats(event)), "log probabilities are negative"
    assert num_rounds > 200
    assert num_forked > 100
    assert num_preempted > 0
    assert num_steps > 1_000


def floats(value: object) -> Iterator[float]:
    """All of them, however deep."""
    if isinstance(value, float):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from floats(inner)


def test_a_flipped_round_of_beams_is_the_first_divergence(tmp_path) -> None:
    path = tmp_path / "r"
    walk = Walk(3, path)
    walk.random.random = lambda: 1.0  # type: ignore[method-assign]
    walk.scheduler.add(beam_request("b", [1, 2, 3], 3, 8, frozenset()))
    walk.expected["b"], walk.received = [], {"b#0": [], "b#1": [], "b#2": []}
    while walk.scheduler.has_unfinished:
        walk.step()
    walk.scheduler.close()
    lines = path.read_text().splitlines()
    rounds = [(place, event) for place, event in enumerate(map(json.loads, lines)) if event.get("beams", [[0]])[0][0]]
    place, event = next((p, e) for p, e in rounds if len(e["beams"][0][0]) == 3 and len(set(e["beams"][0][0])) == 2)
    [[parents, number]] = event["beams"]
    for flipped, what in (
        ([[[parents[0], parents[0], parents[0]], number]], None),
        ([[[3, 0, 0], number]], "beams"),
        ([[None, number]], None),
        ([], "beams"),
        ([[parents, number], [parents, number]], "beams"),
    ):
        broken = tmp_path / "broken"
        broken.write_text("\n".join([*lines[:place], json.dumps({**event, "beams": flipped}), *lines[place + 1 :]]))
        found = Replay(broken).run()
        assert found is not None
        assert place < found.line <= place + 2
        assert what in (None, found.what)


def test_a_beam_that_always_fails_ends_the_whole_search_and_nobody_else() -> None:
    walk = Walk(1)
    walk.kv = KVCacheManager(64, 4, hash_key=b"key")
    walk.scheduler = Scheduler(walk.kv, Limits(8, 32, 40))
    walk.executor, walk.depth = FakeExecutor(64, 4), 1
    walk.scheduler.add(beam_request("b", [1, 2, 3], 3, 8, frozenset()))
    walk.scheduler.add(make_request("p", [1, 2], 8))
    for name in ("b#0", "b#1", "b#2", "p"):
        walk.received[name] = []
    walk.random.random = lambda: 1.0  # type: ignore[method-assign]
    walk.step()
    walk.executor.guilty.add("b/1")
    while walk.scheduler.has_unfinished:
        walk.step()
    assert walk.failed == {"b#0", "b#1", "b#2"}
    assert walk.received["p"] == naive([1, 2], 8)[0]
    assert walk.kv.pool.num_used == 0


@pytest.mark.parametrize(("width", "error"), [(9, InvalidValueError), (8, ContextLengthError)])
def test_beams_that_could_not_end_are_refused_at_the_door(width: int, error: type[Exception]) -> None:
    scheduler = Scheduler(KVCacheManager(20, 4), Limits(8, 32, 64))
    with pytest.raises(error, match=f"{width} beams"):
        scheduler.add(beam_request("b", [1] * 5, width, 8, frozenset()))
