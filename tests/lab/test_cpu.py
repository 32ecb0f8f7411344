"""The CPU bench without a model: interleaving, budgets, failures, merging; a real engine split on a tiny model."""

import asyncio
import io
import json
import sys
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lab import cpu, figures, overheads, report
from lab.engines import Batch, Engine, EngineError, Launch, PipeEngine, Timed
from lab.figures import Figure, Part
from lab.nodes import CONTEXT, step_inputs
from lab.workloads import Work, w1, w2, w4
from octavo.messages import StepRecord


class FakeEngine(Engine):
    def __init__(self, name, calls):
        super().__init__(name, Launch([]))
        self.calls = calls

    def _open(self):
        pass

    def _run(self, load):
        return Batch(2.0, [Timed(0.0, 0.5, 1.5, work.num_out) for work in load.works])

    def pause(self):
        self.calls.append((self.name, "pause"))

    def resume(self):
        self.calls.append((self.name, "resume"))

    def stop(self):
        self.calls.append((self.name, "stop"))

    def peak_memory(self):
        return 7.0


def bench_of(*names):
    calls = []
    engines = [FakeEngine(name, calls) for name in names]
    return cpu.Bench("smollm2", engines, range(10_000), Console(file=io.StringIO())), calls


def one_value(engine, repetition, _):
    yield "figure", "tok/s", float(repetition)


def test_repetitions_are_interleaved_and_the_warm_up_does_not_count():
    bench, calls = bench_of("a", "b")
    bench.measure([Part("W1", "", one_value, 2)], {})
    assert [name for name, what in calls if what == "resume"] == ["a", "b"] * 3
    assert bench.figures["a"]["figure"].values == [0.0, 1.0]


def test_an_engine_that_fails_is_reported_and_the_others_go_on():
    bench, _ = bench_of("a", "b")

    def fails_on_a(engine, repetition, text):
        if engine.name == "a":
            raise EngineError("it broke")
        yield from one_value(engine, repetition, text)

    bench.measure([Part("W1", "", fails_on_a, 2)], {})
    bench.end()
    assert bench.failed == {"a": "it broke"}
    assert bench.figures["b"]["figure"].values == [0.0, 1.0]


def test_memory_is_that_of_w2():
    bench, _ = bench_of("a", "b")

    def w2_of_b(engine, repetition, text):
        if engine.name == "b":
            yield "W2 output", "tok/s", 1.0

    bench.measure([Part("W2", "", w2_of_b, 1)], {})
    assert bench.figures["b"][cpu.MEMORY].values == [7.0]
    assert cpu.MEMORY not in bench.figures["a"]


def test_a_slow_engine_gets_no_further_repetitions(monkeypatch):
    bench, _ = bench_of("a")
    monkeypatch.setattr(cpu, "SECONDS_PER_PART", 0.0)
    bench.measure([Part("W2", "", one_value, 3, warm_up=False)], {})
    assert "figure" not in bench.figures["a"]
    monkeypatch.setattr(cpu, "SECONDS_PER_PART", 1e-9)
    bench.measure([Part("W2", "", one_value, 3, warm_up=False)], {})
    assert bench.figures["a"]["figure"].values == [0.0]


def test_parts_for_ours_or_for_some_configurations_leave_the_rest_alone():
    bench, calls = bench_of("a", "b")
    bench.measure([Part("long", "", one_value, 1, ours=True)], {})
    assert calls == []  # neither is ours
    bench.measure([Part("W1", "", one_value, 1), Part("W2", "", one_value, 1)], {"a": ("W2",)})
    assert [name for name, what in calls if what == "resume"] == ["b", "b", "a", "b", "a", "b"]


def test_pieces_of_a_run_are_merged_per_figure(tmp_path):
    path = tmp_path / "cpu.json"
    bench, _ = bench_of("gguf", "llama.cpp")
    bench.figures["gguf"] = {"W1 decode": Figure("tok/s", [1.0, 3.0]), "W3 prompt": Figure("tok/s", [9.0])}
    path.write_text(json.dumps(cpu.merge(path, bench, "first")))
    again, _ = bench_of("gguf")
    again.figures["gguf"] = {"W1 decode": Figure("tok/s", [2.0])}
    again.failed["vllm"] = "no such package"
    saved = cpu.merge(path, again, "second")
    assert saved["engines"]["gguf"]["figures"]["W1 decode"]["values"] == [2.0]
    assert saved["engines"]["gguf"]["figures"]["W3 prompt"]["command"] == "first"
    assert list(saved["engines"]) == ["gguf", "llama.cpp", "vllm"]
    out = io.StringIO()
    cpu.show(saved, Console(file=out, width=200))
    assert "no such package" in out.getvalue()
    assert "W3 prompt" in out.getvalue()


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"machine": "another", "engines": {"gguf": {"figures": {}}}}))
    bench, _ = bench_of("bf16")
    assert list(cpu.merge(path, bench, "now")["engines"]) == ["bf16"]


def test_figures_show_median_and_range():
    assert str(Figure("tok/s", [100.0, 120.0, 110.0])) == "110 (100-120)"
    assert str(Figure("s", [2.514])) == "2.51"


def test_workloads_are_the_same_for_everyone_and_fresh_each_time():
    assert w1(0) == w1(0) != w1(1)
    assert [len(work.prompt) for work in w2(0)] == [len(work.prompt) for work in w2(5)]
    prefixes = {tuple(work.prompt[:512]) for work in w4(0)}
    assert len(prefixes) == 1
    text = list(range(5000))
    prompt = w1(3, text)[0].prompt
    assert prompt == list(range(prompt[0], prompt[0] + 128))


def test_a_library_behind_a_pipe(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, sys\n"
        "print('hello'); print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    timed = [[0, 1, 2, n if n < 9 else 1] for _, n in asked['works']]\n"
        "    print(json.dumps({'seconds': 2, 'timed': timed}), flush=True)\n"
    )
    engine = PipeEngine("peer", Launch([sys.executable, str(script)]))
    engine.start(tmp_path)
    try:
        engine.pause()
        engine.resume()
        assert engine.run([Work([1, 2], 3)], 1) == Batch(2, [Timed(0, 1, 2, 3)])
        assert engine.peak_memory() > 1
        with pytest.raises(EngineError, match="1 tokens came where 9 were asked for"):
            engine.run([Work([1, 2], 9)], 1)
        with pytest.raises(EngineError, match="not measured in process"):
            engine.run([Work([1, 2], 3)], 1, sampling={"temperature": 1.0})
    finally:
        engine.stop()


def test_an_engine_that_does_not_start_tells_its_last_words(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("import sys; sys.exit('no such model')")
    with pytest.raises(EngineError, match="no such model"):
        PipeEngine("peer", Launch([sys.executable, str(script)])).start(tmp_path)


def test_a_step_is_split_only_between_steady_neighbours():
    def step(number, running=2, prefill=0):
        return StepRecord(
            step=number, time=number * 1.0, schedule_seconds=0.1, execute_seconds=0.5, update_seconds=0.2,
            num_running=running, num_tokens=running + prefill, num_prefill_tokens=prefill, foreign_seconds=0.3,
        )  # fmt: skip

    records = [step(0, prefill=5), step(1), step(2), step(3, running=1), step(5), step(7)]
    assert overheads.split(records, 2) == pytest.approx(
        {"schedule": 0.1, "rows": 0.2, "update": 0.2, "publish": 0.2, "native": 0.3}
    )
    assert overheads.split([step(0), step(2)], 2) == {}


@pytest.mark.model
def test_the_split_of_a_real_engine_process_adds_up(monkeypatch):
    monkeypatch.setattr(overheads, "STEPS", 12)
    options = {"model": "smollm2", "max_model_len": 128, "max_num_seqs": 2}
    shares = asyncio.run(overheads.run(options, 2))
    assert set(shares) == {*overheads.SHARES, "native"}
    assert all(seconds > 0 for seconds in shares.values())


def test_steps_for_the_node_table_lie_in_blocks_of_their_own():
    import numpy as np

    inputs = step_inputs(np.random.default_rng(0), (3, CONTEXT, 1), vocab_size=1000, num_groups=2)
    assert inputs.positions.tolist() == [CONTEXT] * 3
    assert inputs.slots.shape == (2, 3)
    assert len(set(inputs.block_tables[0].ravel().tolist())) == inputs.block_tables[0].size
    prompt = step_inputs(np.random.default_rng(0), (1, 0, 32), vocab_size=1000, num_groups=1)
    assert prompt.slots[0].tolist() == list(range(32))
    assert prompt.logits_indices.tolist() == [31]


def test_the_parts_are_named_as_they_are_asked_for():
    named = ["W1", "W2", "W3", "W4", "W1text", "W2ways", "long", "arrivals", "front", "overheads"]
    assert [part.name for part in figures.PARTS.values()] == named
    assert list(figures.PARTS) == named


def test_the_report_has_every_engine_and_where_its_figures_came_from():
    def engine(note, **figures):
        made = {
            name: {"unit": "tok/s", "values": values, "date": "2026-01-02", "command": "python -m lab.cpu --x "}
            for name, values in figures.items()
        }
        return {"note": note, "failed": None, "figures": made}

    engines = {
        "gguf": engine("octavo serve", **{"W1 decode": [10.0, 30.0, 20.0], "front": [5.0]}),
        "Slow & co": engine("in process: no HTTP", **{"W1 decode": [2.0]}),
    }
    saved = {"engines": engines, "machine": "this one", "date": "2026-01-02"}
    saved["engines"]["Slow & co"]["failed"] = "out of breath"
    assert "| front, tok/s | 5.00 |" in report.ours(saved)
    beside = report.beside(saved)
    assert "| Octavo gguf | 20.0 (10.0-30.0) |" in beside
    assert "Slow & co (in process) failed: out of breath" in beside
    assert "`python -m lab.cpu --x`, 2026-01-02" in report.commands(saved)
    assert report.readme_numbers(saved)["rows"][1][:2] == ["Slow & co (in process)", "2.0"]
    image = ElementTree.fromstring(report.plot(saved))
    bars = [float(bar.get("width")) for bar in image.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars == [bars[0], pytest.approx(bars[0] / 10, abs=0.1)]


def test_processor_time_of_a_process_is_told_apart(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text("import json, sys, time\nwhile time.process_time() < 0.2: pass\nprint('{}', flush=True)\ninput()")
    engine = PipeEngine("peer", Launch([sys.executable, str(script)]))
    engine._log = tmp_path / "log"
    engine._open()
    try:
        whole, kernel = figures._busy_seconds(engine)
        assert 0.1 <= whole < 5
        assert 0 <= kernel < whole
    finally:
        engine.stop()
