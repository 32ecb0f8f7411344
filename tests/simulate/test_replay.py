"""Recordings: replayed bit for bit, a flipped decision found, no token in the file, bounded, kept when it matters."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_simulate import COST, MACHINE, MACHINES, WORKLOAD, known_core

from octavo.cli.app import run
from octavo.config import EngineConfig
from octavo.engine.calibrate import prepare
from octavo.engine.record import start_recording
from octavo.errors import ConfigError
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import AddRequest
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.scheduler.budget import Limits
from octavo.scheduler.recorder import RecordingScheduler, Ring
from octavo.simulate.outcome import Outcome
from octavo.simulate.real import run_real
from octavo.simulate.replay import Replay
from octavo.simulate.simulator import Machine, simulate
from octavo.step import ModelRunnerOutput, SchedulerOutput


def recorded(folder: Path, machine: Machine | None = None, **settings: object) -> tuple[Path, Outcome]:
    """A run that preempts, chunks and hits, with its recording."""
    config = EngineConfig(
        max_num_seqs=12, max_num_batched_tokens=128, admission_headroom=0.0, record=str(folder), **settings
    )  # type: ignore[arg-type]
    machine = machine or replace(MACHINE, num_blocks=44 * 16 // config.block_size)
    core, executor = known_core(config, machine)
    if machine.num_host_blocks:  # its costs are known
        core.record = str(start_recording(core, serving=False))
    else:
        prepare(core)
    longest = min(44 * 16, machine.longest(config) + 1)
    trace = [a for a in replace(WORKLOAD, rate=30.0).generate() if a.num_prompt + a.num_output < longest]
    outcome = run_real(trace, core, clock=executor.clock, wait=executor.wait)
    assert core.record is not None
    core.close()
    return Path(core.record), outcome


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "slo"])
def test_a_recording_replays_to_the_same_decisions(tmp_path, policy: str) -> None:
    path, outcome = recorded(tmp_path, scheduling_policy=policy)
    for happened in ("num_preempted", "num_chunked", "prefix_hits"):
        assert outcome.total(happened) > 0
    replay = Replay(path)
    assert replay.run() is None
    assert len(replay.steps) == len(outcome.records)
    assert not replay.scheduler.has_unfinished
    assert [seconds for _, seconds in replay.steps] == pytest.approx([r.execute_seconds for r in outcome.records])
    assert [a.num_output for a in replay.trace()] == [len(seen.times) for seen in outcome.seen]


@pytest.mark.parametrize("machine", MACHINES, ids=["host", "windows", "both"])
def test_windows_and_host_memory_are_replayed_and_simulated(tmp_path, capfd, machine: Machine) -> None:
    path, outcome = recorded(tmp_path, machine)
    happened = ["num_preempted", "num_evicted_blocks"]
    happened += ["num_saved_blocks", "num_loaded_blocks"] if machine.num_host_blocks else []
    replay = Replay(path)
    assert replay.run() is None
    again = simulate(
        replay.trace(), replace(machine, cost=COST), EngineConfig(max_num_seqs=12, max_num_batched_tokens=128)
    )
    for name in happened:
        assert outcome.total(name) > 0
    assert again.seconds == pytest.approx(outcome.seconds, rel=0.05)
    figures = what_if(path, "num_host_blocks=0" if machine.num_host_blocks else "num_blocks=500", capfd)
    assert figures["requests/s"][0] == pytest.approx(len(outcome.seen) / outcome.seconds, rel=0.05)
    assert figures["requests/s"][0] != figures["requests/s"][1]


def test_what_a_copy_takes_is_told_or_asked_for(tmp_path, capfd) -> None:
    path, _ = recorded(tmp_path)
    known = json.loads(path.read_text().splitlines()[0])["settings"]
    assert (known["kv_windows"], known["num_host_blocks"]) == ([0], 0)
    free, dear = (what_if(path, f"num_host_blocks=200,host_copy_seconds={cost}", capfd) for cost in ("1e-6", "9.0"))
    assert free["requests/s"][1] > dear["requests/s"][1]


def test_a_fork_of_a_fork_has_the_prompt_of_the_first(tmp_path) -> None:
    """`b` was forked from `a`, so nobody told the digests of its prompt; `c` is told to be like `b`, and hits them."""
    scheduler = RecordingScheduler(KVCacheManager(64, 4), Limits(4, 64, 64))
    scheduler.record(Ring(tmp_path / "r", 1 << 20), {"block_size": 4})

    def add(name: str, fork_of: str | None = None) -> None:
        params = SamplingParams(ignore_eos=True, max_tokens=4)
        scheduler.add(Request(name, list(range(9)), params, frozenset(), 4, scheduler._now, fork_of=fork_of))

    def step() -> SchedulerOutput:
        output = scheduler.schedule()
        tokens = [[5] if row.samples else [] for row in output.scheduled]
        scheduler.update(output, ModelRunnerOutput(tokens, [None] * len(tokens)))
        return output

    add("a")
    add("b", fork_of="a")
    assert [row.fork_of for row in step().scheduled] == [-1, 0]
    add("c", fork_of="b")
    assert [(new.request_id, new.num_computed_tokens) for new in step().new_rows] == [("c", 8)]
    scheduler.close()
    assert Replay(tmp_path / "r").run() is None


def test_a_choice_that_changed_before_the_ring_turned_is_replayed(tmp_path) -> None:
    config = EngineConfig(max_num_seqs=12, max_num_batched_tokens=128, record_bytes=1 << 16, record=str(tmp_path))
    core, executor = known_core(config, MACHINES[0])
    core.record = str(start_recording(core, serving=False))
    assert core.copies is not None
    ring, host = core.scheduler._ring, core.scheduler.kv.host  # type: ignore[union-attr]
    core.copies.learn = lambda work, seconds: host.saves != ring.is_full  # type: ignore[method-assign, union-attr]
    outcome = run_real(replace(WORKLOAD, rate=30.0).generate(), core, clock=executor.clock, wait=executor.wait)
    core.close()
    assert Path(core.record + ".1").exists()
    assert outcome.total("num_saved_blocks") > 0
    assert Replay(Path(core.record)).run() is None


def test_a_ring_stays_bounded_and_replays_from_its_older_half(tmp_path) -> None:
    path, outcome = recorded(tmp_path, record_bytes=1 << 16)
    older = path.with_name(path.name + ".1")
    assert older.exists()
    assert path.stat().st_size + older.stat().st_size < 3 << 16  # a state may come on top
    replay = Replay(path)
    assert replay.run() is None
    assert 0 < len(replay.steps) < len(outcome.records)


def test_a_ring_that_is_small_beside_its_states_still_covers_many_steps(tmp_path) -> None:
    core, executor = known_core(EngineConfig(max_num_seqs=12), replace(MACHINE, num_blocks=44))
    scheduler = core.scheduler
    assert isinstance(scheduler, RecordingScheduler)
    scheduler.record(Ring(tmp_path / "r", 4_000), {"block_size": 16})
    trace = [a for a in replace(WORKLOAD, rate=30.0).generate() if a.num_prompt + a.num_output < 44 * 16]
    outcome = run_real(trace, core, clock=executor.clock, wait=executor.wait)
    scheduler.close()
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    states = [len(line) for line in lines if '"e":"state"' in line]
    assert min(states) > 2_000, "the states are no larger than a half"
    replay = Replay(tmp_path / "r")
    assert replay.run() is None
    assert 20 < len(replay.steps) < len(outcome.records)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sum(sizes) < 6 * max(states)


def test_every_flipped_decision_is_the_first_divergence(tmp_path) -> None:
    path, _ = recorded(tmp_path)
    lines = path.read_text().splitlines()
    steps = [(place, json.loads(line)) for place, line in enumerate(lines)]
    flips = {
        "crc": lambda e: e["crc"] + 1,
        "rows": lambda e: [[*e["rows"][0][:2], e["rows"][0][2] + 1, *e["rows"][0][3:]], *e["rows"][1:]],
        "new": lambda e: [[e["new"][0][0], e["new"][0][1], e["new"][0][2] + 16, *e["new"][0][3:]], *e["new"][1:]],
        "pre": lambda e: [[e["pre"][0][1], e["pre"][0][0]]],
    }
    for what, flip in flips.items():
        place, event = [(p, e) for p, e in steps if e["e"] == "step" and e.get(what)][-1]
        broken = tmp_path / f"{what}.jsonl"
        broken.write_text("\n".join([*lines[:place], json.dumps({**event, what: flip(event)}), *lines[place + 1 :]]))
        found = Replay(broken).run()
        assert found is not None
        assert (found.step, found.line, found.what) == (event["n"], place + 1, what)
        assert found.recorded != found.replayed


def test_no_token_is_in_the_file_and_equal_prompts_cannot_be_compared_across_engines(tmp_path) -> None:
    digests = []
    for name in "ab":
        core, _ = known_core(EngineConfig(record=str(tmp_path / name)))
        prepare(core)
        prompt = [987_654] * 40
        core.handle(AddRequest("r", prompt, SamplingParams(ignore_eos=True, max_tokens=3), 3, seed=0))
        while core.has_work:
            core.step()
        core.close()
        text = Path(core.record or "").read_text()
        assert not re.search(r"(987654\D+){3}", text), "once may be a digest's digits"
        digests.append([event["h"] for event in map(json.loads, text.splitlines()) if "h" in event])
    assert digests[0]
    assert digests[0] != digests[1]


def test_what_is_told_of_a_request_is_all_that_decides(tmp_path) -> None:
    config = EngineConfig(scheduling_policy="priority", max_num_seqs=1, record=str(tmp_path))
    core, _ = known_core(config)
    prepare(core)
    for name, priority, prompt in (("late", 0, [5]), ("first", -1, [6]), ("empty", 0, []), ("last", 1, [7])):
        message = AddRequest(name, prompt, SamplingParams(ignore_eos=True, max_tokens=3), 3, seed=0, priority=priority)
        core.handle(message)
    ends = []
    while core.has_work:
        ends += [delta.request_id for delta in core.step().deltas if delta.finish_reason]
    core.close()
    assert ends == ["empty", "first", "late", "last"]
    replay = Replay(Path(core.record or ""))
    assert replay.run() is None
    assert {r.request_id: r.priority for r in replay.requests.values()} == {"late": 0, "first": -1, "last": 1}


def test_a_recording_that_was_cut_off_replays_up_to_there(tmp_path) -> None:
    path, outcome = recorded(tmp_path)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    replay = Replay(path)
    assert replay.run() is None
    assert 0 < len(replay.steps) < len(outcome.records)
    with pytest.raises(ConfigError, match="no recording"):
        Replay(_written(tmp_path / "x", '{"e": "add"}\n'))
    with pytest.raises(ConfigError, match="line 1"):
        Replay(_written(tmp_path / "y", "text\nmore\n"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_auto_records_behind_a_server_only_and_leaves_nothing_when_it_ends_well(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path))
    core, _ = known_core(EngineConfig())
    prepare(core)
    assert core.record is None
    core, _ = known_core(EngineConfig())
    prepare(core, serving=True)
    path = Path(core.record or "")
    assert path.parent == tmp_path / "records"
    assert path.exists()  # and so it stays if the process dies
    core.close()
    assert not path.exists()
    monkeypatch.setenv("OCTAVO_CACHE", "/dev/null/nowhere")
    core, _ = known_core(EngineConfig())
    prepare(core, serving=True)
    assert core.record is None  # a warning, and a server all the same
    core, _ = known_core(EngineConfig(record="/dev/null/nowhere"))
    with pytest.raises(ConfigError, match="cannot record to"):
        prepare(core)
    core, _ = known_core(EngineConfig(record="off"))
    prepare(core, serving=True)
    assert core.record is None


def test_an_engine_with_the_number_of_one_that_died_does_not_overwrite_its_recording(tmp_path) -> None:
    paths = []
    for _ in range(2):  # in one process, as in a container, where every first process has the same number
        core, _ = known_core(EngineConfig(record=str(tmp_path)))
        prepare(core)
        paths.append(core.record)
        core.close()
    assert sorted(map(str, tmp_path.iterdir())) == paths


def test_a_full_disk_ends_the_recording_and_not_the_engine(tmp_path, monkeypatch, caplog) -> None:
    core, _ = known_core(EngineConfig(record=str(tmp_path)))
    prepare(core)
    core.handle(AddRequest("r", [5, 6, 7], SamplingParams(ignore_eos=True, max_tokens=3), 3, seed=0))
    core.step()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo.scheduler.recorder.os.write", full)
    while core.has_work:
        core.step()
    core.close()
    assert caplog.text.count("No space left") == 1
    replay = Replay(Path(core.record or ""))
    assert replay.run() is None
    assert len(replay.steps) == 0  # the result of the first step was still to be written


@pytest.mark.parametrize(
    "event",
    [
        {"e": "done", "t": 1.1e-7, "n": 3},
        {"e": "done", "t": 5, "n": 3, "tokens": [[0, 2]]},
        {"e": "step", "t": 123456.789012345, "n": 7, "rows": [], "crc": 4294967295},
        {"e": "step", "t": 1.5, "n": 7, "rows": [[0, 1, 2, True, -1, []]], "crc": 0},
        {"e": "step", "t": 1.5, "n": 7, "rows": [], "crc": 0, "new": [[0, 1, 2]]},
        {"e": "abort", "r": 1},
    ],
)
def test_the_usual_lines_are_what_an_encoder_writes(tmp_path, event) -> None:
    ring = Ring(tmp_path / "r", 1 << 16)
    ring.write(event)
    ring.close()
    assert (tmp_path / "r").read_text() == json.dumps(event, separators=(",", ":")) + "\n"


def test_a_disk_that_fails_leaves_no_file_open(tmp_path, monkeypatch) -> None:
    ring = Ring(tmp_path / "r", 1 << 16)
    number = ring._file
    ring.write({"e": "x"})

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo.scheduler.recorder.os.write", full)
    ring.turn()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    ring.close()


def two_in_flight(path: Path) -> None:
    """Three steps of 10 s, each launched while the one before it runs; then nothing to do, then one of 5 s."""
    now = 0.0
    limits = Limits(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=32, max_run_ahead=1)
    scheduler = RecordingScheduler(KVCacheManager(8, 4), limits, clock=lambda: now)
    scheduler.record(Ring(path, 1 << 20), {"block_size": 4})

    def add(name: str, max_tokens: int) -> None:
        params = SamplingParams(ignore_eos=True, max_tokens=max_tokens)
        scheduler.add(Request(name, [5, 6], params, frozenset(), max_tokens, arrival_time=now))

    def schedule(at: float) -> SchedulerOutput:
        nonlocal now
        now = at
        return scheduler.schedule()

    def take(output: SchedulerOutput, at: float) -> None:
        nonlocal now
        now = at
        scheduler.update(output, ModelRunnerOutput([[7]] * len(output.scheduled), [None] * len(output.scheduled)))

    add("a", 3)
    first, second = schedule(0.0), schedule(1.0)
    take(first, 10.0)
    third = schedule(11.0)
    take(second, 20.0)
    assert not schedule(21.0).scheduled
    take(third, 30.0)
    assert not schedule(99.0).scheduled
    add("b", 1)
    take(schedule(100.0), 105.0)
    scheduler.close()


def test_a_step_that_ran_behind_another_is_priced_from_where_that_ended(tmp_path) -> None:
    two_in_flight(tmp_path / "r")
    replay = Replay(tmp_path / "r")
    assert replay.run() is None
    assert [(work.num_tokens, seconds) for work, seconds in replay.steps] == [(2, 10.0), (1, 10.0), (1, 10.0), (2, 5.0)]


def test_a_look_at_a_step_waits_until_it_is_decided_and_names_the_steps_there_are(tmp_path, capfd) -> None:
    path = tmp_path / "r"
    two_in_flight(path)
    assert run(["replay", str(path), "--until", "3"]) == 0
    captured = capfd.readouterr()
    assert "Before step 4" in captured.err
    [row] = captured.out.splitlines()[1:]
    assert row.split() == ["b", "running", "0", "2", "0", "2", "1", "0"]
    assert run(["replay", str(path), "--until", "4"]) == 2
    assert "the steps from 0 to 3" in capfd.readouterr().err


def what_if(path: Path, changes: str, capfd: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """The figures that --what-if shows: as it was, and under the changes."""
    assert run(["replay", str(path), "--what-if", changes]) == 0
    rows = capfd.readouterr().out.splitlines()[1:]
    return {row[:24].strip(): [float(value.replace(",", "")) for value in row[24:].split()] for row in rows}


def test_larger_blocks_share_what_they_would_have_shared_in_a_pool_of_the_same_bytes(tmp_path, capfd) -> None:
    path, _ = recorded(tmp_path / "16")
    _, larger = recorded(tmp_path / "32", block_size=32)
    hits = 100 * larger.total("prefix_hits") / larger.total("prefix_queries")
    figures = what_if(path, "block_size=32", capfd)
    assert figures["cache hits %"][1] == pytest.approx(hits, rel=0.03)
    assert figures["cache hits %"][1] != figures["cache hits %"][0]
    assert figures["preemptions"][1] == pytest.approx(larger.total("num_preempted"), rel=0.2)


@pytest.mark.parametrize(
    ("changes", "settings", "why"),
    [
        ("block_size=8", {}, "a multiple of 16"),
        ("block_size=24", {}, "a multiple of 16"),
        ("num_host_blocks=50", {}, "give host_copy_seconds"),
        ("enable_prefix_caching=true", {"enable_prefix_caching": False}, "without a prefix cache"),
    ],
)
def test_what_a_recording_cannot_tell_is_refused(tmp_path, capfd, changes: str, settings: dict, why: str) -> None:
    path, _ = recorded(tmp_path, **settings)
    assert run(["replay", str(path), "--what-if", changes]) == 2
    assert why in capfd.readouterr().err


def test_the_verb_says_what_it_found(tmp_path, capfd) -> None:
    path, outcome = recorded(tmp_path)
    assert run(["replay", str(path)]) == 0
    assert f"{len(outcome.records)} steps" in capfd.readouterr().err
    assert run(["replay", str(path), "--until", "40"]) == 0
    captured = capfd.readouterr()
    assert "Before step 41" in captured.err
    assert "running" in captured.out
    assert run(["replay", str(path), "--what-if", "max_num_seqs=2,scheduling_policy=slo"]) == 0
    head, first, *_ = capfd.readouterr().out.splitlines()
    assert head.split() == ["as", "it", "was", "what", "if"]
    as_it_was, what_if = map(float, first.split()[1:])
    assert what_if < as_it_was
    for wrong in ("colour=red", "max_num_seqs", "max_num_seqs=many", "scheduling_policy=best"):
        assert run(["replay", str(path), "--what-if", wrong]) == 2
    broken = path.read_text().replace('"crc":', '"crc":1', 1)
    assert run(["replay", str(_written(tmp_path / "b.jsonl", broken))]) == 1
    assert "step 0 (line" in capfd.readouterr().err


def test_the_simulated_recording_is_the_recorded_run(tmp_path) -> None:
    """What --what-if compares with: with the costs known, simulating the recorded requests gives the run itself."""
    path, outcome = recorded(tmp_path)
    replay = Replay(path)
    replay.run()
    machine = replace(MACHINE, num_blocks=44, cost=replay.cost())
    again = simulate(replay.trace(), machine, EngineConfig(max_num_seqs=12, max_num_batched_tokens=128))
    assert again.seconds == pytest.approx(outcome.seconds, rel=0.05)
