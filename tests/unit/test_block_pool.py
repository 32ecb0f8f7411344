"""Block pool: order of reuse, reference counts, eviction, and digests."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from octavo.kvcache.block_hash import DIGEST_SIZE, BlockHasher
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.eviction import EVICTIONS, LruEviction


def counts(pool: BlockPool) -> tuple[int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_used


def test_freed_blocks_are_reused_before_untouched_ones() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(3)
    assert blocks == [0, 1, 2]
    pool.free(blocks)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.allocate(1) == [3]
    assert counts(pool) == (4, 0, 4)


def test_untouched_blocks_are_used_before_a_prefix_is_evicted() -> None:
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    pool.hash([block], [b"prefix"])
    pool.free([block])
    assert counts(pool) == (2, 1, 0)
    assert pool.allocate(2) == [1, 2]
    assert (pool.holder(b"prefix"), pool.num_evictions) == (block, 0)
    assert pool.allocate(1) == [block]
    assert (pool.holder(b"prefix"), pool.num_evictions) == (None, 1)
    assert counts(pool) == (0, 0, 3)


def test_eviction_takes_the_least_recently_used_and_tails_first() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for block in first + second:
        pool.hash([block], [bytes([block])])
    pool.free(first)
    pool.free(second)
    pool.touch(first)  # a hit, so `second` is now the older
    pool.free(first)
    assert pool.allocate(4) == [second[1], second[0], first[1], first[0]]


def test_a_shared_block_is_used_until_its_last_reference_goes() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.hash([block], [b"prefix"])
    pool.touch([block])
    pool.free([block])
    assert (pool.ref_count(block), counts(pool)) == (1, (0, 0, 1))
    pool.free([block])
    assert (pool.ref_count(block), counts(pool)) == (0, (0, 1, 0))


def test_a_hit_takes_a_block_out_of_the_cached_ones() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.hash([block], [b"prefix"])
    pool.free([block])
    pool.touch([block])
    assert counts(pool) == (0, 0, 1)
    assert pool.num_available == 0


def test_the_second_holder_of_a_prefix_stays_unhashed() -> None:
    pool = BlockPool(2)
    one, other = pool.allocate(2)
    assert pool.hash([one], [b"prefix"])
    assert not pool.hash([other], [b"prefix"])
    pool.free([other])
    assert counts(pool) == (1, 0, 1)
    assert pool.holder(b"prefix") == one


@pytest.mark.parametrize("used", [True, False])
def test_unhash_forgets_a_used_or_cached_block(used: bool) -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.hash([block], [b"prefix"])
    if not used:
        pool.free([block])
    pool.unhash(block)
    assert (pool.holder(b"prefix"), pool.digest(block)) == (None, None)
    assert counts(pool) == ((0, 0, 1) if used else (1, 0, 0))


def test_digests_depend_on_key_parent_tokens_and_extra_keys() -> None:
    hasher = BlockHasher(4, b"key")
    root = hasher.root(None)
    [digest] = hasher.chain(root, [1, 2, 3, 4])
    assert len(digest) == DIGEST_SIZE
    assert [digest] == BlockHasher(4, b"key").chain(root, [1, 2, 3, 4])
    roots = {hasher.root(None), hasher.root(""), hasher.root("a"), hasher.root("b")}
    assert len(roots) == 4
    others = {
        *hasher.chain(digest, [1, 2, 3, 4]),
        *hasher.chain(root, [1, 2, 3, 5]),
        *hasher.chain(root, [1, 2, 4, 3]),
        *BlockHasher(4, b"another key").chain(root, [1, 2, 3, 4]),
    }
    assert len(others | {digest}) == 5


def test_a_chain_has_a_digest_for_each_full_block_however_it_is_cut() -> None:
    hasher, token_ids = BlockHasher(4, b"key"), list(range(11))
    root = hasher.root(None)
    first, second = hasher.chain(root, token_ids)
    assert [first] == hasher.chain(root, token_ids[:7])
    assert [second] == hasher.chain(first, token_ids[4:])
    assert hasher.chain(root, token_ids[:3]) == []


def test_a_key_of_any_length_counts_in_full() -> None:
    long = b"k" * 500
    assert BlockHasher(1, long).root(None) != BlockHasher(1, long + b"!").root(None)


def cached_pool(policy: str, num_blocks: int) -> BlockPool:
    """A pool whose blocks 0, 1, ... all hold a prefix (named by their number) that nobody uses."""
    pool = BlockPool(num_blocks, EVICTIONS[policy]())
    blocks = pool.allocate(num_blocks)
    for block in blocks:
        pool.hash([block], [bytes([block])])
        pool.free([block])
    return pool


def use(pool: BlockPool, block: int, times: int = 1) -> None:
    for _ in range(times):
        pool.touch([block])
        pool.free([block])


def test_lfu_keeps_what_is_hit_often_and_lru_what_was_hit_last() -> None:
    lru, lfu = cached_pool("lru", 4), cached_pool("lfu", 4)
    for pool in (lru, lfu):
        use(pool, 0, 3)
        use(pool, 1)
        use(pool, 2)
        use(pool, 3)
    assert [lru.allocate(1)[0] for _ in range(4)] == [0, 1, 2, 3]
    assert [lfu.allocate(1)[0] for _ in range(4)] == [1, 2, 3, 0]


def test_lfu_forgets_what_was_popular_long_ago() -> None:
    pool = cached_pool("lfu", 4)
    use(pool, 0, 6)
    for number in range(100, 164):  # prompts that come once
        [block] = pool.allocate(1)
        if block == 0:
            break
        pool.hash([block], [bytes([number])])
        use(pool, block)
        pool.free([block])
    assert 100 < number < 130, "neither at once nor never"


def test_lfu_starts_counting_anew_when_a_block_holds_something_else() -> None:
    pool = cached_pool("lfu", 2)
    use(pool, 0, 9)
    use(pool, 1, 1)
    pool.unhash(0)
    [block] = pool.allocate(1)
    assert block == 0
    pool.hash([0], [b"new"])
    pool.free([0])
    assert pool.allocate(1) == [0], "the old prefix's uses are not the new one's"


def test_lru_is_the_order_of_use() -> None:
    draw, lru, expected = random.Random(0), LruEviction(), OrderedDict[int, None]()
    taken = 0
    for _ in range(3000):
        blocks = draw.sample(range(40), draw.randint(0, 3))
        if expected and draw.random() < 0.3:
            count = draw.randint(1, len(expected))
            assert lru.take(count) == [expected.popitem(last=False)[0] for _ in range(count)]
            taken += count
        for block in blocks:
            if block in expected:
                del lru[block], expected[block]  # hit
        if draw.random() < 0.7:
            lru.add(blocks, [])
            expected.update(dict.fromkeys(blocks))
        assert (list(lru), len(lru)) == (list(expected), len(expected))
    assert taken > 500


@pytest.mark.parametrize("policy", EVICTIONS)
def test_evictions_keep_every_block_in_one_place(policy: str) -> None:
    draw, pool = random.Random(1), BlockPool(12, EVICTIONS[policy]())
    used: list[int] = []
    for number in range(3000):
        if pool.num_available and draw.random() < 0.5:
            [block] = pool.allocate(1)
            pool.hash([block], [number.to_bytes(4)])
            used.append(block)
        elif pool.num_cached and draw.random() < 0.5:
            block = draw.choice(list(pool._cached))
            pool.touch([block])
            used.append(block)
        elif used:
            pool.free([used.pop(draw.randrange(len(used)))])
        assert sorted([*set(used), *pool._cached, *pool._free]) == list(range(len(pool._ref_counts)))
        assert pool.num_used == len(set(used))
    assert pool.num_evictions > 100
