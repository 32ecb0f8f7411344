"""What must hold of the KV cache after every operation, whoever does the operations."""

from __future__ import annotations

from collections import Counter

from octavo.kvcache.manager import KVCacheManager


def check_kv(kv: KVCacheManager, live: set[str]) -> None:
    """Tables belong to the living; each block is in one place; free + used + cached = total; reference counts equal
    the tables."""
    pool, tables = kv.pool, kv._tables
    assert set(tables) == live
    for table in tables.values():
        assert len(set(table.block_ids)) == len(table.block_ids), "a block twice in one table"
        assert table.borrowed not in table.block_ids
    refs = Counter(block for table in tables.values() for block in table.block_ids)
    refs.update(table.borrowed for table in tables.values() if table.borrowed is not None)
    assert {b: pool.ref_count(b) for b in range(pool.num_blocks) if pool.ref_count(b)} == dict(refs)
    free, cached = pool._free, pool._cached
    assert len(set(free)) == len(free)
    assert not set(free) & set(cached)
    assert not set(refs) & (set(free) | set(cached))
    never_touched = pool.num_blocks - len(pool._ref_counts)
    assert len(refs) + len(free) + len(cached) + never_touched == pool.num_blocks
    assert (pool.num_used, pool.num_cached, pool.num_free) == (len(refs), len(cached), len(free) + never_touched)
    assert all(pool.digest(block) is None for block in free)
    assert {b: d for d, b in pool._holders.items()} == {b: d for b, d in enumerate(pool._digests) if d is not None}
    assert set(cached) <= set(pool._holders.values())
