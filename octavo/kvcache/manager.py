"""Where each Request's KV lives: block tables over one pool, and the prefixes found in it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo.errors import ConfigError, UnsupportedError
from octavo.kvcache.block_hash import BlockHasher
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.eviction import Eviction
from octavo.request import Request


@dataclass(slots=True)
class _Table:
    """One Request's blocks. The digests outlive a preemption: each full block is hashed once."""

    root: bytes
    block_ids: list[int] = field(default_factory=list)  # position p lies in block_ids[p // block_size]
    digests: list[bytes] = field(default_factory=list)  # of the leading full blocks, as far as needed yet
    num_hashed: int = 0  # leading blocks of block_ids that were offered to the pool under their digest
    borrowed: int | None = None  # the block behind block_ids: its first positions are shared, so it is copied on write


class KVCacheManager:
    """Block tables of all Requests. A Request needs add() before anything else and forget() in the end.

    Args:
        num_blocks: size of the pool.
        block_size: token positions per block.
        num_groups: KV groups of the model; one table each.
        enable_prefix_caching: off, no block is ever hashed or hit.
        hash_key: secret key of the prefix hash; random when None.
        eviction: which cached prefix goes first; the least recently used by default.

    Raises:
        ConfigError: an empty pool.
        UnsupportedError: more than one KV group.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_groups: int = 1,
        enable_prefix_caching: bool = True,
        hash_key: bytes | None = None,
        eviction: Eviction | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"the KV pool needs at least one block of one token, not {num_blocks} of {block_size}")
        if num_groups != 1:
            raise UnsupportedError(f"the model has {num_groups} KV groups; tables for more than one are not built")
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks, eviction)
        self._hasher = BlockHasher(block_size, hash_key if hash_key is not None else secrets.token_bytes(32))
        self.on_digest: Callable[[Request, int, bytes], None] | None = None  # told each block's digest, once known
        self._tables: dict[str, _Table] = {}
        self._copies: list[tuple[int, int]] = []

    def add(self, request: Request) -> None:
        """Begins an empty table."""
        self._tables[request.request_id] = _Table(self._hasher.root(request.cache_salt, request.adapter_id))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many positions."""
        return -(-num_tokens // self.block_size)

    def block_ids(self, request: Request) -> tuple[list[int], ...]:
        """The Request's table (a copy), per KV group."""
        return (list(self._tables[request.request_id].block_ids),)

    def num_slots(self, request: Request) -> int:
        """Positions that the Request's blocks hold."""
        return len(self._tables[request.request_id].block_ids) * self.block_size

    def lookup(self, request: Request) -> list[int]:
        """The cached blocks of the longest known prefix. It never covers the last token: its logits are needed."""
        hits: list[int] = []
        if self.enable_prefix_caching:
            table = self._tables[request.request_id]
            for index in range((request.num_tokens - 1) // self.block_size):
                block = self.pool.holder(self._digest(request, table, index))
                if block is None:
                    break
                hits.append(block)
        return hits

    def try_allocate(
        self, request: Request, num_tokens: int, hits: Sequence[int] = (), spare: int = 0
    ) -> list[int] | None:
        """Makes the table long enough for positions 0 to `num_tokens`, beginning with `hits` when it is empty.

        Returns the blocks added after the hits; None, with nothing changed, when the pool cannot give them and keep
        `spare` more. A borrowed block becomes a copy of it, which take_copies() tells; who borrows it last keeps it as
        it is.
        """
        table = self._tables[request.request_id]
        missing = -(-num_tokens // self.block_size) - len(table.block_ids) - len(hits)
        if missing <= 0 and not hits:
            return []
        borrowed = table.borrowed
        keeps = borrowed is not None and self.pool.is_private(borrowed)
        num_idle_hits = sum(1 for block in hits if self.pool.ref_count(block) == 0)
        if missing - keeps + spare > self.pool.num_available - num_idle_hits:
            return None
        if hits:
            self.pool.touch(hits)
            table.block_ids.extend(hits)
            table.num_hashed = len(hits)
        blocks = self.pool.allocate(missing - keeps)
        if borrowed is not None:
            table.borrowed = None
            if keeps:
                blocks.insert(0, borrowed)
            else:
                self._copies.append((borrowed, blocks[0]))
                self.pool.free([borrowed])
        table.block_ids.extend(blocks)
        return blocks

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Gives `child`, whose table is empty, the KV of the parent's first `num_tokens` positions; they are equal.

        Full blocks are shared. One that is full in part is borrowed: the parent goes on writing behind those positions.
        """
        source, table = self._tables[parent.request_id], self._tables[child.request_id]
        num_full = num_tokens // self.block_size
        table.block_ids = source.block_ids[:num_full]
        table.digests = source.digests[:num_full]
        table.num_hashed = min(source.num_hashed, num_full)
        self.pool.touch(table.block_ids)
        if num_tokens % self.block_size:
            is_owner = num_full < len(source.block_ids)
            table.borrowed = source.block_ids[num_full] if is_owner else source.borrowed
            assert table.borrowed is not None, f"{parent.request_id} does not hold {num_tokens} positions"
            self.pool.touch([table.borrowed])

    def take_copies(self) -> list[tuple[int, int]]:
        """Block copies (from, to) to make before anything else is written, since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def hash_full(self, request: Request, num_tokens: int) -> list[tuple[int, bytes]]:
        """Makes the full blocks among the first `num_tokens` positions findable; their ids must be final.

        Returns what became findable, for unhash(): (block, digest).
        """
        hashed: list[tuple[int, bytes]] = []
        if self.enable_prefix_caching:
            table = self._tables[request.request_id]
            for index in range(table.num_hashed, num_tokens // self.block_size):
                block, digest = table.block_ids[index], self._digest(request, table, index)
                if self.pool.hash(block, digest):
                    hashed.append((block, digest))
                table.num_hashed = index + 1
        return hashed

    def known_digests(self, request_id: str) -> list[bytes]:
        """Digests of a live Request's leading full blocks, as far as they were needed yet."""
        return self._tables[request_id].digests

    def digest_all(self, request: Request) -> None:
        """Hashes the full blocks of a Request that will be hashed anyway, ahead of time."""
        if self.enable_prefix_caching and request.num_tokens >= self.block_size:
            self._digest(request, self._tables[request.request_id], request.num_tokens // self.block_size - 1)

    def unhash(self, hashed: list[tuple[int, bytes]]) -> None:
        """Takes hash_full() back, where the block was not evicted meanwhile: the step that fills it failed."""
        for block, digest in hashed:
            if self.pool.digest(block) == digest:
                self.pool.unhash(block)

    def free(self, request: Request) -> None:
        """Gives the Request's blocks back; what is hashed can still be hit, also by itself when it resumes."""
        table = self._tables[request.request_id]
        self.pool.free(table.block_ids if table.borrowed is None else [*table.block_ids, table.borrowed])
        table.block_ids, table.borrowed = [], None
        table.num_hashed = 0

    def forget(self, request: Request) -> None:
        """Gives the blocks back and drops the table: the Request has ended."""
        self.free(request)
        del self._tables[request.request_id]

    def _digest(self, request: Request, table: _Table, index: int) -> bytes:
        digests = table.digests
        while len(digests) <= index:
            start = len(digests) * self.block_size
            parent = digests[-1] if digests else table.root
            digests.append(self._hasher.digest(parent, request.token_ids[start : start + self.block_size]))
            if self.on_digest is not None:
                self.on_digest(request, len(digests) - 1, digests[-1])
        return digests[index]
