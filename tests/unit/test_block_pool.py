"""Block pool: order of reuse, reference counts, eviction, and digests."""

from __future__ import annotations

import pytest

from octavo.kvcache.block_hash import DIGEST_SIZE, BlockHasher
from octavo.kvcache.block_pool import BlockPool


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
    pool.hash(block, b"prefix")
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
        pool.hash(block, bytes([block]))
    pool.free(first)
    pool.free(second)
    pool.touch(first)  # a hit, so `second` is now the older
    pool.free(first)
    assert pool.allocate(4) == [second[1], second[0], first[1], first[0]]


def test_a_shared_block_is_used_until_its_last_reference_goes() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.hash(block, b"prefix")
    pool.touch([block])
    pool.free([block])
    assert (pool.ref_count(block), counts(pool)) == (1, (0, 0, 1))
    pool.free([block])
    assert (pool.ref_count(block), counts(pool)) == (0, (0, 1, 0))


def test_a_hit_takes_a_block_out_of_the_cached_ones() -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.hash(block, b"prefix")
    pool.free([block])
    pool.touch([block])
    assert counts(pool) == (0, 0, 1)
    assert pool.num_available == 0


def test_the_second_holder_of_a_prefix_stays_unhashed() -> None:
    pool = BlockPool(2)
    one, other = pool.allocate(2)
    assert pool.hash(one, b"prefix")
    assert not pool.hash(other, b"prefix")
    pool.free([other])
    assert counts(pool) == (1, 0, 1)
    assert pool.holder(b"prefix") == one


@pytest.mark.parametrize("used", [True, False])
def test_unhash_forgets_a_used_or_cached_block(used: bool) -> None:
    pool = BlockPool(1)
    [block] = pool.allocate(1)
    pool.hash(block, b"prefix")
    if not used:
        pool.free([block])
    pool.unhash(block)
    assert (pool.holder(b"prefix"), pool.digest(block)) == (None, None)
    assert counts(pool) == ((0, 0, 1) if used else (1, 0, 0))


def test_digests_depend_on_key_parent_tokens_and_extra_keys() -> None:
    hasher = BlockHasher(4, b"key")
    root = hasher.root(None, 0)
    digest = hasher.digest(root, [1, 2, 3, 4])
    assert len(digest) == DIGEST_SIZE
    assert digest == BlockHasher(4, b"key").digest(root, [1, 2, 3, 4])
    roots = {hasher.root(None, 0), hasher.root("", 0), hasher.root("a", 0), hasher.root("b", 0), hasher.root(None, 1)}
    assert len(roots) == 5
    others = {
        hasher.digest(digest, [1, 2, 3, 4]),
        hasher.digest(root, [1, 2, 3, 5]),
        hasher.digest(root, [1, 2, 4, 3]),
        BlockHasher(4, b"another key").digest(root, [1, 2, 3, 4]),
    }
    assert len(others | {digest}) == 5


def test_a_key_of_any_length_counts_in_full() -> None:
    long = b"k" * 500
    assert BlockHasher(1, long).root(None, 0) != BlockHasher(1, long + b"!").root(None, 0)
