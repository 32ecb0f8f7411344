"""No tenant can hit another's blocks, or tell from its own work that they are there."""

from __future__ import annotations

import pytest
from fake import make_request, naive
from test_scheduler import Engine, prompt

from octavo.kvcache.block_hash import BlockHasher

SALTS = ["tenant-a", "tenant-b", "", None, "tenant-a\x00", "TENANT-A"]


def work_of(engine: Engine, name: str, salt: str | None) -> list[tuple[int, int, int]]:
    """What a tenant can see and time of its request: tokens computed, tokens hit, requests, step by step."""
    before = len(engine.records)
    engine.add(make_request(name, prompt(17), 6, cache_salt=salt))
    engine.drain()
    return [(r.num_tokens, r.prefix_hits, r.num_running) for r in engine.records[before:]]


@pytest.mark.parametrize("salt", SALTS[1:])
def test_a_request_does_the_same_work_whatever_another_tenant_has_cached(salt: str | None) -> None:
    alone, after = Engine(), Engine()
    work_of(after, "other", "tenant-a")
    assert after.kv.pool.num_cached == 5, "the other tenant's prefix is there"
    assert work_of(after, "own", salt) == work_of(alone, "own", salt)
    assert after.ends["own"].num_cached_tokens == 0
    assert after.tokens["own"] == naive(prompt(17), 6)[0]
    assert work_of(after, "again", salt)[0] == (1, 16, 1), "its own it does hit"


def test_a_running_tenant_is_not_shared_either() -> None:
    engine = Engine()
    engine.add(*(make_request(str(i), prompt(17), 4, cache_salt=salt) for i, salt in enumerate(SALTS)))
    assert engine.step() == {"0": 17, "1": 17, "2": 17, "3": 13}, "each computes its own, as far as the budget goes"
    engine.drain()
    assert engine.total("prefix_hits") == engine.total("num_forked") == 0
    assert not any(end.num_cached_tokens for end in engine.ends.values())


def test_digests_of_two_engines_say_nothing_about_each_other() -> None:
    chains = set()
    for key in (b"engine 1", b"engine 2"):
        hasher = BlockHasher(4, key)
        chains |= {hasher.chain(hasher.root(salt), [1, 2, 3, 4])[0] for salt in SALTS}
    assert len(chains) == 2 * len(SALTS)
