"""The map of the KV memory tells what is there: shared blocks with their counts, owners, ages; and agrees with the
StepRecords that the metrics are made of."""

import json
from collections import Counter

import pytest

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.memory_map import MAX_HOLDERS
from octavo.executor.local import LocalExecutor
from octavo.messages import AddRequest, AskMemory, FinishRequest
from octavo.models.spec import ModelFiles
from octavo.sampling_params import SamplingParams
from tests.tiny_llama import TINY

SETTINGS = {"runtime": "reference", "load_format": "dummy", "admission_headroom": 0.0, "max_num_batched_tokens": 512}
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=60)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return ModelFiles("tiny", "hf", folder)


def make_core(files, clock, **settings):
    config = EngineConfig(model="tiny", **{**SETTINGS, "num_gpu_blocks_override": 24, **settings})
    executor = LocalExecutor(config, files)
    return EngineCore(config, executor, executor.start(), clock=clock)


def ask(core):
    """The map of an engine, and the records of the step that brought it."""
    core.handle(AskMemory())
    assert core.has_work
    outputs = core.step()
    assert outputs.memory is not None
    assert core.step().memory is None, "a map is told once"
    return outputs.memory


def blocks_of(holder):
    runs = zip(holder.blocks[::2], holder.blocks[1::2], strict=True)
    return [block for first, length in runs for block in range(first, first + length)]


def check(core, memory):
    """Every character against the pool, every count against the tables."""
    pool, counts = core.scheduler.kv.pool, Counter(memory.states)
    assert len(memory.states) == len(memory.ages) == pool.num_blocks
    assert (counts["."], counts["c"]) == (pool.num_free, pool.num_cached)
    held = Counter(block for holder in memory.holders for block in blocks_of(holder))
    assert {block: str(count) for block, count in held.items()} == {
        block: state for block, state in enumerate(memory.states) if state not in ".c"
    }


@pytest.mark.parametrize("depth", [1, 2])
def test_a_shared_prefix_is_seen_with_its_count_and_freed(files, depth):
    core = make_core(files, Clock())
    core._depth = depth
    assert set(ask(core).states) == {"."}
    shared = list(range(3, 36))  # two full blocks, and one token
    for name in ("a", "b"):
        core.handle(AddRequest(name, [*shared, ord(name) - 60], GREEDY, 60, seed=0))
    record = None
    while record is None:
        record = next(iter(core.step().records), None)
    core.handle(AskMemory())
    memory = core.step().memory
    assert memory.states[:4] == "2211"
    assert {holder.request_id: len(blocks_of(holder)) for holder in memory.holders} == {"a": 3, "b": 3}
    told = [record.num_used_blocks, record.num_cached_blocks, record.num_free_blocks]
    assert told == [24 - memory.states.count("."), 0, memory.states.count(".")]
    core.handle(FinishRequest("a", 1))
    alone = ask(core)
    assert Counter(alone.states)["2"] == 0
    assert alone.states[:2] == "11"
    check(core, alone)
    while core.has_work:
        core.step()
    last = ask(core)
    assert set(last.states) == {".", "c"}
    assert last.holders == []
    check(core, last)


def test_a_preempted_request_waits_and_holds_nothing(files):
    core = make_core(files, Clock(), num_gpu_blocks_override=10, max_model_len=128, enable_prefix_caching=False)
    for number in range(3):
        core.handle(AddRequest(str(number), [number + 3] * 40, GREEDY, 60, seed=0))
    num_preempted = 0
    while not num_preempted:
        num_preempted = sum(record.num_preempted for record in core.step().records)
    memory = ask(core)
    states = {holder.request_id: (holder.status, holder.blocks == []) for holder in memory.holders}
    assert Counter(states.values()) == {
        ("running", False): core.scheduler.num_running,
        ("preempted", True): num_preempted,
    }
    assert core.scheduler.num_waiting == num_preempted
    assert [holder.num_preemptions for holder in memory.holders][-1] == 1, "who holds least comes last"
    check(core, memory)


def test_ages_double_with_each_character(files):
    clock = Clock()
    core = make_core(files, clock)
    core.handle(AddRequest("a", [7] * 20, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), 1, seed=0))
    while core.has_work:
        core.step()
    for seconds, age in ((0, "0"), (1, "1"), (3, "2"), (4, "3"), (3600, "<")):
        clock.now = 100.0 + seconds
        memory = ask(core)
        assert memory.ages[memory.states.index("c")] == age


def test_blocks_of_windows_and_forks_are_counted_in_all_groups(files):
    core = make_core(files, Clock(), num_gpu_blocks_override=60)
    first = AddRequest("0", [9] * 40, GREEDY, 60, seed=0)
    core.handle(first)
    for number in range(1, 12):
        core.handle(AddRequest(str(number), [9] * 40, GREEDY, 60, seed=number, fork_of="0"))
    for _ in range(3):
        core.step()
    memory = ask(core)
    assert memory.states[:2] == "++", "more than nine hold the prompt's full blocks"
    assert len(memory.holders) == 12 < MAX_HOLDERS
