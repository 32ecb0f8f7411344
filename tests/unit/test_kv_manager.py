"""KV cache manager: lookup, allocation, hashing, and what a Request leaves behind."""

from __future__ import annotations

import pytest
from fake import make_request

from octavo.errors import ConfigError
from octavo.kvcache.manager import GONE, KVCacheManager
from octavo.request import Request


def manager(num_blocks: int = 16, block_size: int = 4, **kwargs: bool) -> KVCacheManager:
    return KVCacheManager(num_blocks, block_size, hash_key=b"key", **kwargs)


def computed(kv: KVCacheManager, request: Request) -> Request:
    """A Request whose known tokens all have their KV."""
    kv.add(request)
    assert kv.try_allocate(request, request.num_tokens, kv.lookup(request)) is not None
    kv.hash_full(request, request.num_tokens)
    return request


def hits(kv: KVCacheManager, prompt: list[int], **kwargs: object) -> int:
    """How many blocks a new Request with this prompt finds."""
    request = make_request("probe", prompt, **kwargs)  # type: ignore[arg-type]
    kv.add(request)
    found = len(kv.lookup(request)[0])
    kv.forget(request)
    return found


@pytest.mark.parametrize(("length", "expected"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (13, 3)])
def test_a_hit_is_whole_blocks_and_never_covers_the_last_token(length: int, expected: int) -> None:
    kv = manager()
    computed(kv, make_request("a", list(range(16))))
    assert hits(kv, list(range(length))) == expected


def test_a_hit_ends_at_the_first_difference() -> None:
    kv = manager()
    computed(kv, make_request("a", list(range(16))))
    assert hits(kv, [*range(8), 99, *range(9, 17)]) == 2
    assert hits(kv, [99, *range(1, 17)]) == 0
    assert hits(kv, list(range(4, 16))) == 0  # known blocks, but not after this prefix


def test_salts_do_not_share() -> None:
    kv = manager()
    computed(kv, make_request("a", list(range(9)), cache_salt="tenant"))
    assert hits(kv, list(range(9)), cache_salt="tenant") == 2
    assert hits(kv, list(range(9))) == 0
    assert hits(kv, list(range(9)), cache_salt="other") == 0


def test_hits_are_shared_blocks() -> None:
    kv = manager()
    one, other = make_request("a", list(range(10))), make_request("b", list(range(10)))
    computed(kv, one)
    computed(kv, other)
    [first], [second] = kv.block_ids(one), kv.block_ids(other)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert [kv.pool.ref_count(block) for block in first] == [2, 2, 1]


def test_without_prefix_caching_nothing_is_hashed_or_found() -> None:
    kv = manager(enable_prefix_caching=False)
    computed(kv, make_request("a", list(range(16))))
    assert hits(kv, list(range(16))) == 0
    assert kv.pool.num_cached == 0


def test_try_allocate_changes_nothing_when_the_pool_cannot_give_enough() -> None:
    kv = manager(num_blocks=3)
    request = make_request("a", list(range(16)))
    kv.add(request)
    assert kv.try_allocate(request, 13) is None
    assert (kv.block_ids(request), kv.pool.num_free) == (([],), 3)
    assert kv.try_allocate(request, 12) == ([0, 1, 2],)
    assert kv.try_allocate(request, 12) == ()


def test_idle_hits_are_not_counted_as_blocks_to_hand_out() -> None:
    kv = manager(num_blocks=3)
    kv.forget(computed(kv, make_request("a", list(range(8)))))
    assert (kv.pool.num_cached, kv.pool.num_free) == (2, 1)
    request = make_request("b", list(range(16)))
    kv.add(request)
    found = kv.lookup(request)
    assert len(found[0]) == 2
    assert kv.try_allocate(request, 16, found) is None
    assert kv.pool.num_cached == 2
    assert kv.try_allocate(request, 12, found) is not None
    assert kv.pool.num_used == 3


def test_a_preempted_request_finds_its_own_blocks_and_hashes_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = manager()
    request = computed(kv, make_request("a", list(range(10))))
    [before] = kv.block_ids(request)
    calls = 0
    chain = kv._hasher.chain

    def counted(*args: object) -> list[bytes]:
        nonlocal calls
        calls += 1
        return chain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kv._hasher, "chain", counted)
    kv.free(request)
    assert kv.pool.num_used == 0
    assert kv.lookup(request) == (before[:2],)
    assert calls == 0


def test_unhash_spares_a_block_that_means_something_else_by_now() -> None:
    kv = manager(num_blocks=2)
    request = make_request("a", list(range(8)))
    kv.add(request)
    kv.try_allocate(request, 8)
    hashed = kv.hash_full(request, 8)
    assert len(hashed) == 2
    kv.forget(request)
    computed(kv, make_request("b", [99] * 8))  # evicts both
    kv.unhash(hashed)
    assert hits(kv, [99] * 9) == 2


def test_a_block_is_offered_once() -> None:
    kv = manager()
    request = make_request("a", list(range(10)))
    kv.add(request)
    kv.try_allocate(request, 10)
    assert len(kv.hash_full(request, 7)) == 1
    assert len(kv.hash_full(request, 10)) == 1
    assert kv.hash_full(request, 10) == []


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one block"):
        KVCacheManager(0, 16)


def windowed(num_blocks: int = 64, windows: tuple[int, ...] = (0, 6)) -> KVCacheManager:
    return KVCacheManager(num_blocks, 4, windows, 8, hash_key=b"key")


def decoded(kv: KVCacheManager, request: Request) -> Request:
    """A Request that was computed in chunks of 8 tokens."""
    kv.add(request)
    while request.num_computed_tokens < request.num_tokens:
        end = min(request.num_computed_tokens + 8, request.num_tokens)
        assert kv.try_allocate(request, end) is not None
        request.num_computed_tokens = end
        kv.hash_full(request, end)
    return request


def test_a_window_gives_back_what_no_token_to_come_sees() -> None:
    kv = windowed()
    request = decoded(kv, make_request("a", list(range(40))))
    kv.try_allocate(request, 41)  # position 40 sees 35 and later: block 8 and on
    whole, window = kv._tables["a"].block_ids
    assert GONE not in whole
    assert window[:8] == [GONE] * 8
    assert GONE not in window[8:]
    assert len(whole) == len(window) == 11
    assert kv.pool.num_used == 11 + 3
    assert kv.most_blocks(41) == 11 + 5


def test_a_window_hit_needs_the_windows_blocks_and_no_others() -> None:
    kv = windowed()
    kv.forget(decoded(kv, make_request("a", list(range(40)))))
    probe = make_request("b", list(range(40)))
    kv.add(probe)
    whole, window = kv.lookup(probe)
    assert (len(whole), window[:7]) == (9, [GONE] * 7)  # position 36 sees 31 and later
    for block in kv._tables["b"].digests[:7]:
        kv.pool.unhash(kv.pool.holder(block + b"\1"))  # the window's first blocks are needed by nobody
    assert [len(blocks) for blocks in kv.lookup(probe)] == [9, 9]
    kv.pool.unhash(window[8])
    assert [len(blocks) for blocks in kv.lookup(probe)] == [0, 0]  # all that ends earlier misses one of the first


def test_where_a_block_is_gone_the_table_names_one_that_is_there() -> None:
    kv = windowed()
    request = decoded(kv, make_request("a", list(range(40))))
    _, window = kv.block_ids(request)
    held = kv._tables["a"].block_ids[1]
    first = next(block for block in held if block != GONE)
    assert set(window[: held.index(first) + 1]) == {first}


def test_a_fork_shares_what_its_parent_still_holds() -> None:
    kv = windowed()
    parent, child = decoded(kv, make_request("a", list(range(30)))), make_request("b", list(range(30)))
    kv.add(child)
    used = kv.pool.num_used
    kv.fork(parent, child, 30)
    assert kv.pool.num_used == used
    child.num_computed_tokens = 30
    assert kv.try_allocate(child, 31) is not None
    assert kv.pool.num_used == used + 2  # the last block of each group is copied
    assert len(kv.take_copies()) == 2
    kv.forget(parent)
    kv.forget(child)
    assert kv.pool.num_used == 0
