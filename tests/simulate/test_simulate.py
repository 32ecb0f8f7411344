"""The simulator against an engine core whose executor has known costs (exact), its traces, and its figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from octavo.cli.app import run
from octavo.cli.files import write_json
from octavo.config import EngineConfig
from octavo.engine.calibrate import LONGEST, NUM_NEW, timed_steps
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.executor.local import StepResult
from octavo.messages import AddRequest, StepRecord
from octavo.sampling_params import SamplingParams
from octavo.scheduler.copying import CopyChoice
from octavo.scheduler.cost import CostModel, StepWork
from octavo.simulate.costs import Costs
from octavo.simulate.outcome import Outcome, Seen, max_min_shares, percentile
from octavo.simulate.real import run_real
from octavo.simulate.simulator import Machine, capacity, simulate
from octavo.simulate.trace import Arrival, Workload, clipped, read_trace
from octavo.simulate.validate import compare
from octavo.step import ModelRunnerOutput, SchedulerOutput

COST = CostModel(fixed=0.004, per_token=1e-4, per_row=3e-4, per_position=2e-6, per_pair=1e-8, per_copy=2e-4)
MACHINE = Machine(COST, num_blocks=160, max_model_len=2048)
WORKLOAD = Workload(num_requests=80, rate=12.0, prompt_median=100, output_median=30, shared_prefix=40, num_tenants=4)


class KnownCosts:
    """An executor without a model: a step takes what its cost says, on a clock that only it moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cost = COST
        self._output: SchedulerOutput

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += max(seconds, 1e-9)  # a rest that is lost in rounding must not be waited for for ever

    def execute(self, output: SchedulerOutput) -> None:
        self._output = output

    def sample(self, masks: object = None) -> StepResult:
        rows = self._output.scheduled
        ends = [row.start + row.num_tokens for row in rows]
        long = [(row.num_tokens, end) for row, end in zip(rows, ends, strict=True) if row.num_tokens > 1]
        pairs = sum(n * (end - n + end + 1) // 2 for n, end in long)
        sampled = sum(row.samples for row in rows)
        num_copied = len(self._output.copy_blocks)
        self.now += self.cost.seconds(StepWork(self._output.num_tokens, sampled, sum(ends), pairs, num_copied))
        output = ModelRunnerOutput([[0] if row.samples else [] for row in rows], [None] * len(rows))
        return lambda: output

    def close(self) -> None:
        pass


def known_core(config: EngineConfig, machine: Machine = MACHINE) -> tuple[EngineCore, KnownCosts]:
    executor = KnownCosts()
    spec = SimpleNamespace(eos_token_ids=(), max_model_len=MACHINE.max_model_len, vocab_size=1 << 20)
    plan = SimpleNamespace(num_blocks=machine.num_blocks, num_host_blocks=machine.num_host_blocks)
    plan.num_tokens = machine.num_blocks * config.block_size
    info = SimpleNamespace(spec=spec, plan=plan, kv_windows=machine.kv_windows, max_depth=1, timings={})
    info.host_copy_seconds = COST.per_copy if machine.num_host_blocks else 0.0
    core = EngineCore(config, executor, info, clock=executor.clock)  # type: ignore[arg-type]
    if machine.num_host_blocks:
        core.copies = CopyChoice(COST, config.block_size, len(machine.kv_windows))
        core.scheduler.kv.host.saves = core.copies.saves
    return core, executor


HOSTED = replace(MACHINE, num_blocks=60, num_host_blocks=80)
WINDOWED = replace(MACHINE, num_blocks=160, kv_windows=(0, 48, 48))
MACHINES = [HOSTED, WINDOWED, replace(WINDOWED, num_blocks=120, num_host_blocks=200)]


@pytest.mark.parametrize("machine", MACHINES, ids=["host", "windows", "both"])
def test_a_simulation_with_windows_and_host_memory_is_exact(machine: Machine) -> None:
    config = EngineConfig(max_num_seqs=12, max_num_batched_tokens=128, admission_headroom=0.0)
    trace, _ = clipped(replace(WORKLOAD, rate=30.0).generate(), machine.longest(config))
    assert machine.kv_windows == (0,) or machine.longest(config) < machine.num_blocks * 16
    core, executor = known_core(config, machine)
    measured = run_real(trace, core, clock=executor.clock, wait=executor.wait)
    simulated = simulate(trace, machine, config)
    for ours, theirs in zip(simulated.seen, measured.seen, strict=True):
        assert ours.times == pytest.approx(theirs.times, abs=1e-9)
    happened = ["num_preempted", "num_evicted_blocks"]
    happened += ["num_saved_blocks", "num_loaded_blocks"] if machine.num_host_blocks else []
    assert all(simulated.total(name) == measured.total(name) > 0 for name in happened)


def test_copy_or_compute_follows_what_they_cost() -> None:
    """Copies are cheap, then dear, then cheap again; the engine notices, and in the end everything is as it was."""
    config = EngineConfig(max_num_seqs=12, max_num_batched_tokens=128, admission_headroom=0.0)
    trace, _ = clipped(replace(WORKLOAD, num_requests=900, rate=30.0).generate(), HOSTED.longest(config))
    core, executor = known_core(config, HOSTED)
    saved: list[int] = []
    for number, per_copy in enumerate((COST.per_copy, 0.01, COST.per_copy)):
        executor.cost = replace(COST, per_copy=per_copy)
        part = [replace(a, time=a.time - trace[300 * number].time) for a in trace[300 * number : 300 * number + 300]]
        outcome = run_real(part, core, salt=str(number), clock=executor.clock, wait=executor.wait)
        saved.append(outcome.total("num_saved_blocks"))
        assert outcome.total("num_evicted_blocks") > 500
    assert core.scheduler.kv.host.saves
    assert saved[1] < saved[0] / 5 < saved[2]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair", "slo"])
@pytest.mark.parametrize("burst_size", [1, 8])
def test_a_simulation_is_exact_where_the_costs_are_known(policy: str, burst_size: int) -> None:
    config = EngineConfig(scheduling_policy=policy, max_num_seqs=8, max_num_batched_tokens=128)  # type: ignore[arg-type]
    trace = replace(WORKLOAD, burst_size=burst_size, num_priorities=3).generate()
    core, executor = known_core(config)
    if policy == "slo":
        core.scheduler.policy.cost = COST  # type: ignore[attr-defined]
    measured = run_real(trace, core, clock=executor.clock, wait=executor.wait)
    simulated = simulate(trace, MACHINE, config)
    assert all(seen.finished for seen in simulated.seen)
    assert len(simulated.records) == len(measured.records)
    for ours, theirs in zip(simulated.seen, measured.seen, strict=True):
        assert ours.times == pytest.approx(theirs.times, abs=1e-9)
    assert [row.error for row in compare(simulated, measured)] == pytest.approx([0.0] * 5, abs=1e-9)
    for happened in ("num_chunked", "prefix_hits"):
        assert simulated.total(happened) == measured.total(happened) > 0


def test_a_calibration_is_not_held_up_at_the_door_and_the_door_is_there_again() -> None:
    core, _ = known_core(EngineConfig(max_num_seqs=32, max_num_queued_reqs=1))
    timed = timed_steps(core, seconds=0.2)
    assert max(work.num_sampled for work, _ in timed) == 32
    longest = min(LONGEST, MACHINE.max_model_len - NUM_NEW)
    assert max(work.num_kv_read for work, _ in timed if work.num_pairs) >= longest / 2, "no prompt as long as they come"
    for name in "abc":
        core.handle(AddRequest(name, [5, 6], SamplingParams(ignore_eos=True, max_tokens=2), 2, seed=0))
    refusals = [delta for delta in core.step().deltas if delta.error_kind]
    assert [(delta.request_id, delta.retry_after) for delta in refusals] == [("b", 1.0), ("c", 1.0)]  # no pace is known


def test_a_small_pool_preempts_and_everybody_still_ends() -> None:
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=256)
    trace, _ = clipped(replace(WORKLOAD, rate=100.0).generate(), 30 * 16)
    outcome = simulate(trace, replace(MACHINE, num_blocks=30), config)
    assert outcome.total("num_preempted") > 0
    assert [len(seen.times) for seen in outcome.seen] == [arrival.num_output for arrival in trace]


def test_a_bounded_queue_refuses_in_the_simulation_too() -> None:
    config = EngineConfig(max_num_seqs=1, max_num_queued_reqs=3)
    outcome = simulate(replace(WORKLOAD, rate=1000.0).generate(), MACHINE, config)
    figures = outcome.figures(ttft=1.0, itl=1.0)
    assert figures["refused"] > 0
    assert figures["refused"] + sum(seen.finished for seen in outcome.seen) == WORKLOAD.num_requests


def test_later_turns_hit_what_earlier_ones_said() -> None:
    talk = Workload(
        num_requests=12, turns=4, sigma=0.0, prompt_median=32, output_median=32, rate=0.01, think_time=900.0
    )
    trace = talk.generate()
    outcome = simulate(trace, MACHINE, EngineConfig())
    repeated = sum(arrival.num_prompt - 32 for arrival in trace)
    assert repeated > 0
    # all but the last token of each answer, whose KV was never needed: its block is computed again
    assert outcome.total("prefix_hits") == repeated - 16 * sum(len(a.prompt) > 1 for a in trace)


def test_capacity_is_load_one() -> None:
    rate = capacity(WORKLOAD.generate(), MACHINE, EngineConfig())
    calm = simulate(replace(WORKLOAD, rate=0.5 * rate).generate(), MACHINE, EngineConfig()).figures(ttft=1.0, itl=1.0)
    storm = simulate(replace(WORKLOAD, rate=2 * rate).generate(), MACHINE, EngineConfig()).figures(ttft=1.0, itl=1.0)
    assert calm["TTFT p99 ms"] < storm["TTFT p99 ms"]
    assert storm["requests/s"] == pytest.approx(rate, rel=0.25)


# ------------------------------------------------------------------------------------------------------------ traces


def test_traces_follow_from_their_seed_and_their_rate_changes_only_times() -> None:
    one, same, other = WORKLOAD.generate(), WORKLOAD.generate(), replace(WORKLOAD, seed=1).generate()
    assert one == same != other
    slower = replace(WORKLOAD, rate=6.0).generate()
    assert [a.prompt for a in slower] == [a.prompt for a in one]
    assert [a.time for a in slower] == pytest.approx([2 * a.time for a in one])
    assert WORKLOAD.num_requests / one[-1].time == pytest.approx(WORKLOAD.rate, rel=0.3)
    clumpy = replace(WORKLOAD, burst_size=10).generate()
    assert len({a.time for a in clumpy}) == 8


def test_prompts_share_exactly_what_their_segments_share() -> None:
    a, b = Arrival(0.0, ((1, 20), (2, 5)), 1), Arrival(0.0, ((1, 20), (3, 5)), 1)
    for vocab in (None, 1 << 20):
        x, y = a.token_ids(vocab), b.token_ids(vocab)
        assert x[:20] == y[:20]
        assert x[20] != y[20]
        assert len(x) == a.num_prompt == 25


def test_mooncake_and_burstgpt_files(tmp_path) -> None:
    mooncake = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 2000, "input_length": 1100, "output_length": 7, "hash_ids": [46, 47, 48]},
        {"timestamp": 1000, "input_length": 600, "output_length": 3, "hash_ids": [46, 99]},
    ]
    mooncake.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_trace(mooncake)
    assert (first.time, second.time, second.num_prompt, second.num_output) == (0.0, 1.0, 1100, 7)
    assert first.prompt[0] == second.prompt[0] == (47, 512)
    mooncake.write_text('{"timestamp": 0, "input_length": 0, "output_length": 0}')
    assert [(a.num_prompt, a.num_output) for a in read_trace(mooncake)] == [(1, 1)], "nothing is asked for nothing"
    burst = tmp_path / "BurstGPT_1.csv"
    burst.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,230,1317,Conversation log\n"
    )
    assert [(a.time, a.num_prompt, a.num_output) for a in read_trace(burst)] == [(0.0, 472, 18), (40.0, 1087, 230)]
    assert len(read_trace(burst, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.txt", "x", "Mooncake"),
        ("a.jsonl", "{}\n", "input_length"),
        ("a.jsonl", "not json\n", "Expecting"),
        ("a.csv", "Timestamp,Request tokens\n1,2\n", "Response tokens"),
        ("a.jsonl", "", "no requests"),
        ("a.jsonl", '{"timestamp": NaN, "input_length": 5, "output_length": 3}\n', "no number"),
        ("a.csv", "Timestamp,Request tokens,Response tokens\ninf,5,5\n", "no number"),
    ],
)
def test_a_file_that_is_no_trace_says_why(tmp_path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_trace(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "missing.csv")


@pytest.mark.parametrize(("name", "value"), [("rate", 0.0), ("sigma", -1.0), ("turns", 0), ("num_requests", 10**9)])
def test_an_impossible_workload_names_the_field(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Workload(**{name: value})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand() -> None:
    seen = [
        Seen(Arrival(0.0, ((1, 4),), 3, "a"), [0.5, 0.6, 0.7], True),
        Seen(Arrival(1.0, ((2, 4),), 2, "b"), [3.0, 4.0], True),
        Seen(Arrival(2.0, ((3, 4),), 2, "b"), [], False, True),
    ]
    records = [StepRecord(0, 0.0, num_tokens=8, num_recomputed_tokens=2, num_preempted=1)]
    figures = Outcome(seen, records).figures(ttft=1.0, itl=0.2)
    assert figures["requests/s"] == 0.5
    assert figures["output tokens/s"] == 5 / 4
    assert figures["goodput requests/s"] == 0.25
    assert figures["TTFT p50 ms"] == pytest.approx(1250.0)
    assert (figures["recomputed %"], figures["preemptions"], figures["refused"]) == (25.0, 1.0, 1.0)


def test_a_comparison_is_with_the_mean_of_runs_and_tells_how_they_differ() -> None:
    one, other = (Outcome([Seen(Arrival(0.0, ((1, 4),), 2), [ttft, ttft + 1.0], True)], []) for ttft in (1.0, 3.0))
    throughput, median, *_ = compare(one, one, other)
    assert (median.simulated, median.measured, median.error, median.spread) == (1000.0, 2000.0, -0.5, 0.5)
    assert throughput.measured == (2 / 2 + 2 / 4) / 2
    assert not median.within
    assert compare(other, other)[1].within


def test_runs_of_a_trace_share_nothing_with_the_runs_before(tmp_path) -> None:
    core, executor = known_core(EngineConfig())
    trace = WORKLOAD.generate()[:20]
    hits = []
    for salt in ("a", "b", "b"):
        outcome = run_real(trace, core, salt=salt, clock=executor.clock, wait=executor.wait)
        hits.append(outcome.total("prefix_hits"))
    assert 0 < hits[0] == hits[1] < hits[2]


def test_shares_and_percentiles() -> None:
    assert max_min_shares({"small": 1.0, "mid": 5.0, "big": 100.0}, 13.0) == {"small": 1.0, "mid": 5.0, "big": 7.0}
    assert [percentile([4.0, 1.0, 2.0, 3.0], p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile([], 99) == 0.0


# --------------------------------------------------------------------------------------------------------- the verb


@pytest.fixture
def costs_file(tmp_path):
    costs = Costs(
        model="tiny",
        runtime="known",
        dtype="float32",
        num_blocks=100,
        block_size=16,
        max_model_len=1024,
        seconds=COST,
        num_steps=9,
        typical_error=0.01,
    )
    path = tmp_path / "costs.json"
    write_json(path, asdict(costs))
    assert Costs.read(path) == costs
    return path


def test_the_verb_compares_policies_and_writes_json(costs_file, tmp_path, capfd) -> None:
    out = tmp_path / "out.json"
    flags = ["--costs", str(costs_file), "--output", str(out), "--num-requests", "40", "--load", "1.2", "--compare"]
    assert run(["simulate", *flags]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["fcfs", "priority", "fair", "slo"]
    assert len({len(line) for line in lines[1:]}) == 1
    figures = json.loads(out.read_text())["figures"]
    assert figures["fcfs"]["requests/s"] > 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["smollm2"], None),  # the default: nobody can tell that it was said
        (["other"], "MODEL"),
        (["--num-threads", "2"], "--num-threads"),
        (["--kv-cache-memory-bytes", "1GiB"], "--kv-cache-memory-bytes"),
        (["--calibrate", "--load", "1.2"], "--load"),
        (["--calibrate", "--output", "x.json"], "--output"),
        (["--validate", "--compare"], "--compare"),
        (["--validate", "--turns", "2"], "--turns"),
        (["--trace", "x.csv", "--load", "1.2"], "--load"),
        (["--trace", "x.csv", "--sigma", "0.1", "--turns", "3"], "--sigma, --turns"),
        (["--limit", "9"], "--limit"),
        (["--repeat", "9"], "--repeat"),
        (["--rate", "2", "--load", "1"], "--rate"),
        (["--think-time", "2"], "--think-time"),
        (["--tenant-skew", "2"], "--tenant-skew"),
        (["--priority-ageing", "2"], "--priority-ageing"),
        (["--priority-ageing", "2", "--compare"], None),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(costs_file, capfd, flags: list[str], named: str | None) -> None:
    status = run(["simulate", "--costs", str(costs_file), *flags])
    said = capfd.readouterr().err
    assert (status, f"{named} would change nothing" in said) == ((2, True) if named else (0, False))


def test_the_verb_validates_on_an_engine(tmp_path, monkeypatch, capfd) -> None:
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 97}
    model |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(model))
    monkeypatch.setattr("octavo.cli.simulate.CALIBRATION_SECONDS", 0.9)
    out, costs = tmp_path / "out.json", tmp_path / "costs.json"
    flags = ["--load-format", "dummy", "--runtime", "reference", "--max-num-seqs", "4", "--num-requests", "6"]
    flags += ["--validate", "--repeat", "2", "--rate", "50", "--prompt-median", "20", "--output-median", "4"]
    status = run(["simulate", str(tmp_path), *flags, "--costs", str(costs), "--output", str(out)])
    rows = json.loads(out.read_text())["figures"]
    assert [len(row["runs"]) for row in rows] == [2] * 5
    assert all(value > 0 for row in rows for value in (row["simulated"], *row["runs"]))
    assert status == (0 if all(abs(row["error"]) <= 0.15 for row in rows[:3]) else 1)
    assert Costs.read(costs).num_steps > 4
    assert "runs differ" in capfd.readouterr().err


def test_the_verb_evicts_as_it_is_told(costs_file, capfd) -> None:
    flags = ["--num-gpu-blocks-override", "64", "--num-requests", "60", "--shared-prefix", "64", "--num-tenants", "9"]
    said = []
    for policy in ("lru", "lfu"):
        assert run(["simulate", "--costs", str(costs_file), *flags, "--prefix-eviction-policy", policy]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] != said[1]


def test_a_costs_file_that_is_none_is_refused(costs_file, capfd) -> None:
    assert run(["simulate", "--costs", str(costs_file) + "x"]) == 2
    assert "--calibrate" in capfd.readouterr().err
    free = json.dumps(json.loads(costs_file.read_text()) | {"seconds": {}})
    for broken in ('{"format": "other"}', "[]", json.dumps({"seconds": {"fixed": -1}})):
        costs_file.write_text(broken)
        assert run(["simulate", "--costs", str(costs_file)]) == 2
    costs_file.write_text(free)
    assert run(["simulate", "--costs", str(costs_file), "--load", "1"]) == 2
    assert "takes no time" in capfd.readouterr().err
