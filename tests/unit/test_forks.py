"""One prefill for n answers: children sample from the parent's logits, share its blocks and copy on write."""

from __future__ import annotations

import pytest
from fake import make_request, naive
from invariants import check_kv
from test_scheduler import Engine, prompt

from octavo.request import Request


def family(length: int, n: int, max_tokens: int = 6, **kwargs: object) -> list[Request]:
    """A parent and its children, as the front makes them."""
    first = make_request("a", prompt(length), max_tokens, **kwargs)  # type: ignore[arg-type]
    names = "bcdefgh"[: n - 1]
    return [first, *(make_request(c, prompt(length), max_tokens, fork_of="a", **kwargs) for c in names)]  # type: ignore[arg-type]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_the_prompt_is_computed_once_and_its_blocks_are_shared(length: int, caching: bool) -> None:
    engine = Engine(enable_prefix_caching=caching)
    engine.add(*family(length, 3))
    assert engine.step() == {"a": length, "b": 0, "c": 0}
    assert (engine.records[0].num_tokens, engine.records[0].num_forked) == (length, 2)
    assert engine.kv.pool.num_used == -(-length // 4)
    check_kv(engine.kv, set("abc"))
    engine.step()
    partial = length % 4 != 0  # the parent writes on in its own block
    assert engine.records[1].num_copied_blocks == (2 if partial else 0)
    check_kv(engine.kv, set("abc"))
    engine.drain()
    assert engine.tokens == dict.fromkeys("abc", naive(prompt(length), 6)[0])
    assert engine.kv.pool.num_used == 0


def test_children_wait_for_a_prompt_in_chunks_and_are_forked_with_its_last() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(*family(19, 3))
    assert [engine.step() for _ in range(3)] == [{"a": 8}, {"a": 8}, {"a": 3, "b": 0, "c": 0}]
    engine.drain()
    assert engine.total("num_tokens") == 19 + 3 * 5  # the last token's KV is never needed
    assert engine.tokens == dict.fromkeys("abc", naive(prompt(19), 6)[0])


def test_children_that_find_no_row_wait_and_hit_the_cache() -> None:
    engine = Engine(max_num_seqs=2)
    engine.add(*family(10, 4, 3))
    assert engine.step() == {"a": 10, "b": 0}
    assert engine.records[0].num_waiting == 2
    engine.drain()
    assert engine.total("prefix_hits") == 16
    assert engine.tokens == dict.fromkeys("abcd", naive(prompt(10), 3)[0])


def test_the_last_borrower_keeps_the_block() -> None:
    engine = Engine()
    engine.add(*family(6, 2))
    engine.step()
    engine.scheduler.abort("a")
    engine.step()
    assert engine.records[1].num_copied_blocks == 0
    engine.drain()
    assert engine.tokens["b"] == naive(prompt(6), 6)[0]


@pytest.mark.parametrize("when", ["before", "in mid-prefill"])
def test_when_the_parent_ends_early_the_first_child_takes_its_place(when: str) -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(*family(19, 4))
    if when == "in mid-prefill":
        engine.step()
    engine.scheduler.abort("a")
    engine.scheduler.abort("c")
    check_kv(engine.kv, set("bd"))
    engine.drain()
    assert engine.total("num_forked") == 1
    assert engine.tokens == dict.fromkeys("bd", naive(prompt(19), 6)[0])


def test_other_salts_and_prompts_are_never_forked() -> None:
    engine = Engine()
    engine.add(
        make_request("a", prompt(9), cache_salt="one"),
        make_request("b", prompt(9), cache_salt="two", fork_of="a"),
        make_request("c", prompt(8), cache_salt="one", fork_of="a"),
    )
    engine.drain()
    assert engine.total("num_forked") == 0
    assert engine.records[0].num_tokens == 9 + 9 + 4  # `c` hits a block of `a`: that is the prefix cache's business


def test_a_failed_prefill_is_retried_for_all() -> None:
    engine = Engine()
    engine.add(*family(9, 3))
    engine.executor.fail_next = True
    engine.step()
    check_kv(engine.kv, set("abc"))
    assert engine.kv.pool.num_used == 0
    engine.drain()
    assert engine.tokens == dict.fromkeys("abc", naive(prompt(9), 6)[0])


def test_forks_under_pressure_are_preempted_like_anybody() -> None:
    engine = Engine(num_blocks=5, enable_prefix_caching=False)
    engine.add(*family(6, 4, 9))
    engine.drain()
    assert engine.total("num_preempted") > 0
    assert engine.tokens == dict.fromkeys("abcd", naive(prompt(6), 9)[0])
