"""What must hold of the KV cache after every operation, whoever does the operations."""

from __future__ import annotations

from collections import Counter

from octavo.kvcache.manager import GONE, KVCacheManager


def check_kv(kv: KVCacheManager, live: set[str]) -> None:
    """Tables belong to the living; each block is in one place; free + used + cached = total; reference counts equal
    the tables. Host blocks likewise are free or hold one prefix."""
    pool, tables = kv.pool, kv._tables
    assert set(tables) == live
    refs: Counter[int] = Counter()
    for table in tables.values():
        for ids, gone in zip(table.block_ids, table.num_gone, strict=True):
            assert ids[:gone] == [GONE] * gone
        held = [block for ids, gone in zip(table.block_ids, table.num_gone, strict=True) for block in ids[gone:]]
        assert GONE not in held
        assert len({*held, *table.borrowed}) == len(held) + len(table.borrowed), "a block twice in one Request's tables"
        refs.update(held + table.borrowed)
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
    host = kv.host
    places = [*host._free, *host._blocks.values()]
    assert sorted(places) == list(range(pool.num_blocks, pool.num_blocks + host.num_blocks)), (
        "a host block in two places"
    )
