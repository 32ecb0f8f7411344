"""Host memory as a second tier: what the pool gives up comes back by copy, and no token changes."""

import random

import pytest

import octavo.worker.worker as worker_module
from octavo.engine.calibrate import prepare
from octavo.errors import ConfigError, MemoryPlanError
from tests.engine.test_core import files, make_core, naive, prompts_with_shared_prefixes, run
from tests.engine.test_depth import LateRuntime

__all__ = ["files", "naive"]  # fixtures
SMALL = {"num_gpu_blocks_override": 12, "max_model_len": 192, "admission_headroom": 0.0}
GIB = 1 << 30
NUM_TOKENS = 50
PROMPTS = [random.Random(n).choices(range(3, 97), k=n) for n in (30, 45, 60, 20, 50, 35)]


def total(core, name):
    return sum(getattr(record, name) for record in core.log)


def blocks(core, number):
    return number * core.info.plan.block_bytes / GIB


@pytest.mark.parametrize("runtime", ["reference", "native"])
@pytest.mark.parametrize("budget", [512, 16])
def test_a_preempted_request_is_copied_back_and_not_computed(files, naive, runtime, budget):
    expected = [naive(p, NUM_TOKENS) for p in PROMPTS]
    settings = {**SMALL, "runtime": runtime, "num_threads": 1, "dtype": "float32", "max_num_batched_tokens": budget}
    settings["max_num_seqs"] = 16
    without = make_core(files, **settings)
    core = make_core(files, **settings, swap_space=0.01)
    assert run(without, PROMPTS, max_tokens=NUM_TOKENS) == expected
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == expected
    assert total(without, "num_saved_blocks") == total(without, "num_loaded_blocks") == 0
    assert total(without, "num_preempted") > 0
    assert total(core, "num_preempted") > 0
    assert total(core, "num_loaded_blocks") > 0
    assert total(core, "num_recomputed_tokens") < total(without, "num_recomputed_tokens") / 2
    without.close()
    core.close()


@pytest.mark.parametrize("depth", [2, 4])
def test_with_steps_in_flight_too(files, naive, depth, monkeypatch):
    monkeypatch.setattr(worker_module, "create", lambda *_, **__: LateRuntime(depth))
    core = make_core(files, **SMALL, swap_space=0.01)
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == [naive(p, NUM_TOKENS) for p in PROMPTS]
    assert total(core, "num_preempted") > 0
    assert total(core, "num_loaded_blocks") > 0


def test_an_evicted_prefix_is_found_in_host_memory(files, naive):
    core = make_core(files, **SMALL, swap_space=0.01)
    first, other = prompts_with_shared_prefixes()[0], list(range(3, 90)) + list(range(3, 80))
    assert run(core, [first], max_tokens=4) == [naive(first, 4)]
    run(core, [other], max_tokens=4)  # takes all but one block
    before = total(core, "host_hits")
    assert run(core, [first], max_tokens=4) == [naive(first, 4)]
    found = total(core, "host_hits") - before
    assert found >= len(first) // 16 * 16 - 32
    assert total(core, "prefix_hits") >= found
    assert total(core, "host_queries") > found


def test_a_tenant_does_not_find_another_ones_prefix_there(files):
    core = make_core(files, **SMALL, swap_space=0.01)
    first, other = prompts_with_shared_prefixes()[0], list(range(3, 90)) + list(range(3, 80))
    run(core, [first], max_tokens=4, cache_salt="a")
    run(core, [other], max_tokens=4, cache_salt="a")
    run(core, [first], max_tokens=4, cache_salt="b")
    assert total(core, "host_hits") == 0


def test_the_host_keeps_no_more_than_it_has_room_for(files, naive):
    probe = make_core(files, **SMALL)
    core = make_core(files, **SMALL, swap_space=blocks(probe, 3.5))
    assert core.info.plan.num_host_blocks == 3
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == [naive(p, NUM_TOKENS) for p in PROMPTS]
    assert total(core, "num_saved_blocks") > 3
    assert max(record.host_usage for record in core.log) == 1.0


@pytest.mark.parametrize(("copy_seconds", "saves"), [(0.0, True), (10.0, False)])
def test_what_costs_more_to_copy_than_to_compute_is_computed(files, naive, copy_seconds, saves):
    core = make_core(files, **SMALL, swap_space=0.01)
    assert core.info.host_copy_seconds >= 0
    core.info.host_copy_seconds = copy_seconds
    prepare(core)
    assert run(core, PROMPTS, max_tokens=NUM_TOKENS) == [naive(p, NUM_TOKENS) for p in PROMPTS]
    assert total(core, "num_preempted") > 0
    assert (total(core, "num_saved_blocks") > 0) == saves


def test_a_swap_space_that_does_not_fit_is_refused(files):
    with pytest.raises(MemoryPlanError, match=r"--swap-space asks for 61,440,000 MiB.*give at most"):
        make_core(files, **SMALL, swap_space=60_000.0)
    with pytest.raises(MemoryPlanError, match="holds no KV block"):
        make_core(files, **SMALL, swap_space=1e-9)
    with pytest.raises(ConfigError, match="swap_space must be a number from 0"):
        make_core(files, swap_space=-1.0)
    with pytest.raises(ConfigError, match="needs enable_prefix_caching"):
        make_core(files, swap_space=1.0, enable_prefix_caching=False)
