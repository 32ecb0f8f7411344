"""The memory plan: what fits is computed, what does not is refused with the numbers."""

import pytest

from octavo.errors import MemoryPlanError
from octavo.worker.memory import MIB, Appetite, MemoryPlan, first_that_fits, free_memory, plan_memory


def plan(**changes):
    settings = {
        "free_bytes": 1000 * MIB,
        "weight_bytes": 200 * MIB,
        "arena_bytes": 0,
        "block_bytes": MIB,
        "appetite": Appetite(16),
        "kv_dtype": "bfloat16",
        "max_num_seqs": 4,
        "max_model_len": 160,
        "len_is_fixed": False,
        "kv_cache_memory_bytes": None,
        "num_blocks_override": None,
    }
    given = {**settings, **changes}
    asked = MemoryPlan(**{name: given.pop(name) for name in MemoryPlan.__slots__ if name in given})
    return plan_memory(asked, **given)


def test_pool_is_no_larger_than_useful():
    assert plan().num_blocks == 40  # 4 requests x 10 blocks


def test_pool_is_cut_to_a_share_of_what_the_weights_leave():
    assert plan(max_num_seqs=1000).num_blocks == 320  # 40 % of 800 MiB


def test_a_default_length_is_cut_to_what_fits():
    assert plan(max_model_len=100_000).max_model_len == 320 * 16


def test_a_fixed_length_that_does_not_fit_is_refused_with_the_one_that_would():
    with pytest.raises(MemoryPlanError, match=r"largest --max-model-len that fits is 5,120"):
        plan(max_model_len=100_000, len_is_fixed=True)


def test_the_length_named_in_the_refusal_does_fit():
    assert plan(max_model_len=5120, len_is_fixed=True).max_model_len == 5120


def test_weights_that_do_not_fit_are_refused_with_both_numbers():
    with pytest.raises(MemoryPlanError, match=r"1,200 MiB.*1,000 MiB"):
        plan(weight_bytes=1200 * MIB)


def test_kv_bytes_are_a_bound():
    assert plan(kv_cache_memory_bytes=25 * MIB + 5).num_blocks == 25
    with pytest.raises(MemoryPlanError, match="at most 800 MiB"):
        plan(kv_cache_memory_bytes=801 * MIB)


def test_no_block_at_all_is_refused():
    with pytest.raises(MemoryPlanError):
        plan(kv_cache_memory_bytes=1)


def test_what_fits_in_no_way_is_said_once(caplog):
    with pytest.raises(MemoryPlanError, match=r"the pool has 0 \(0.0 MiB; --kv-cache-memory-bytes\): give it more"):
        fitting(kv_cache_memory_bytes=1)
    assert not caplog.records


def test_override_counts_blocks():
    assert plan(num_blocks_override=7).num_blocks == 7


def test_free_memory_is_plausible():
    assert 64 * MIB < free_memory() < 1 << 50


def test_describe_names_every_part():
    text = plan().describe()
    for part in ("weights", "activations", "KV cache", "4 requests of 160 tokens"):
        assert part in text


def test_on_a_device_the_pool_is_what_a_rehearsal_leaves():
    planned = plan(on_device=True)
    assert planned.num_blocks == 800
    measured = planned.measured(650 * MIB)
    assert (measured.num_blocks, measured.arena_bytes) == (650, 150 * MIB)
    assert plan(on_device=True, num_blocks_override=40).measured(650 * MIB).num_blocks == 40


def test_a_rehearsal_that_leaves_less_than_a_request_needs_is_refused():
    with pytest.raises(MemoryPlanError, match=r"9 MiB are left for KV.* 160 tokens"):
        plan(on_device=True).measured(9 * MIB)


def fitting(**changes):
    """What weights of 450 or 200 MiB are kept as, of 1000 MiB."""
    sizes = {"int8": 450 * MIB, "quantized": 200 * MIB, **changes.pop("sizes", {})}
    way, found = first_that_fits(list(sizes), lambda way: plan(weight_bytes=sizes[way], **changes))
    assert found.weight_bytes == sizes[way]
    return way


def test_the_first_way_of_keeping_weights_is_taken_while_it_takes_half_of_the_memory():
    assert fitting() == "int8"
    assert fitting(sizes={"int8": 500 * MIB}) == "int8"
    assert fitting(sizes={"int8": 501 * MIB}) == "quantized"
    assert fitting(sizes={"int8": 1200 * MIB}) == "quantized"


def test_what_else_was_asked_for_comes_before_faster_weights():
    assert fitting(kv_cache_memory_bytes=550 * MIB) == "int8"
    assert fitting(kv_cache_memory_bytes=551 * MIB) == "quantized"
    assert fitting(max_model_len=220 * 16, len_is_fixed=True) == "int8"  # 40 % of what is left
    assert fitting(max_model_len=221 * 16, len_is_fixed=True) == "quantized"


def test_the_last_way_is_refused_like_any_other():
    with pytest.raises(MemoryPlanError, match=r"2,000 MiB.*1,000 MiB"):
        fitting(sizes={"int8": 4000 * MIB, "quantized": 2000 * MIB})
