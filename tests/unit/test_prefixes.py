"""When a Request's blocks are hashed, and from when on others can hit them."""

from __future__ import annotations

import pytest
from fake import make_request, naive
from test_scheduler import Engine, prompt


@pytest.mark.parametrize("stops", [False, True])
def test_what_is_generated_can_be_hit_once_it_is_given_back_and_as_far_as_it_was_computed(stops: bool) -> None:
    engine = Engine()
    # a recording does not know of tokens that would have stopped it later: they must change nothing
    stop_ids = frozenset(naive(prompt(6), 8)[0] if stops else ())
    engine.add(make_request("a", prompt(6), 8, stop_ids=stop_ids, min_tokens=8))
    for _ in range(7):  # 6 prompt tokens and 7 generated: the KV of 12 is there
        engine.step()
    assert len(engine.kv.pool._holders) == 1, "the prompt's full block"
    engine.scheduler.abort("a")
    assert engine.kv.pool.num_cached == 3
    tokens = prompt(6) + engine.tokens["a"]
    engine.add(make_request("b", tokens))
    engine.step()
    assert engine.outputs[-1].new_rows[0].num_computed_tokens == 12


def test_blocks_are_hashed_once_when_the_request_arrives_and_a_held_fork_takes_its_parents() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(9)), make_request("b", prompt(9), fork_of="a"))
    assert [len(engine.kv.known_digests(name)) for name in "ab"] == [2, 0]
    engine.step()
    assert [len(engine.kv.known_digests(name)) for name in "ab"] == [2, 2]
