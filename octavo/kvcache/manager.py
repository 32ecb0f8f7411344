"""Where each Request's KV lives: block tables over one pool, and the prefixes found in it."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from octavo.errors import ConfigError
from octavo.kvcache.block_hash import BlockHasher
from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.eviction import Eviction
from octavo.kvcache.host import HostTier
from octavo.request import Request
from octavo.step import Blocks, most_blocks

GONE = -1  # in a table: a block that no token to come sees; it was given back
Hits = Blocks  # per KV group, the blocks of a known prefix; GONE where nothing will be read


@dataclass(slots=True)
class _Table:
    """One Request's blocks. The digests outlive a preemption: each full block is hashed once."""

    root: bytes
    block_ids: Blocks  # position p lies in [p // block_size]
    num_gone: list[int]  # per KV group: leading blocks that are GONE
    digests: list[bytes] = field(default_factory=list)  # of the leading full blocks, as far as needed yet
    num_loaded: int = 0  # blocks that came from the host when it was last admitted
    num_hashed: int = 0  # leading blocks that were offered to the pool under their digest
    # per KV group, the block behind block_ids, whose first positions are shared, so it is copied on write; or nothing
    borrowed: list[int] = field(default_factory=list)


class KVCacheManager:
    """Block tables of all Requests. A Request needs add() before anything else and forget() in the end.

    Layers whose tokens see equally far back are a KV group, or several of one size (Program.with_kv_groups). Each group
    has a table of its own over the one pool. A group with a window gives back what no token to come sees, and to hit a
    prefix it needs only what the next token sees.

    Args:
        num_blocks: size of the pool.
        block_size: token positions per block.
        windows: per KV group, how many positions a token sees, itself included; 0 for all.
        step_tokens: most tokens of a Request in a step. What a window needs is allocated no further ahead.
        enable_prefix_caching: off, no block is ever hashed or hit.
        hash_key: secret key of the prefix hash; random when None.
        eviction: which cached prefix goes first; the least recently used by default.
        num_host_blocks: blocks in host memory, with ids from num_blocks on, that keep evicted prefixes.

    Raises:
        ConfigError: an empty pool.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: tuple[int, ...] = (0,),
        step_tokens: int = 1 << 30,
        enable_prefix_caching: bool = True,
        hash_key: bytes | None = None,
        eviction: Eviction | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"the KV pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.host = HostTier(num_host_blocks, num_blocks)
        self.pool = BlockPool(num_blocks, eviction, self.host if num_host_blocks else None)
        self._windows = windows
        self._has_windows = any(windows)
        self._is_plain = windows == (0,)
        self._step_tokens = step_tokens
        # that a running Request needs for a step, at most; what it knows has its blocks, but for what windows will see
        self.step_blocks = sum(-(-step_tokens // block_size) + 1 if window else 1 for window in windows)
        self._hasher = BlockHasher(block_size, hash_key if hash_key is not None else secrets.token_bytes(32))
        self.on_digest: Callable[[Request, int, bytes], None] | None = None  # told each block's digest, once known
        self._tables: dict[str, _Table] = {}

    def add(self, request: Request) -> None:
        """Begins an empty table."""
        root = self._hasher.root(request.cache_salt)
        self._tables[request.request_id] = _Table(root, tuple([] for _ in self._windows), [0] * len(self._windows))

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a Request of so many tokens holds at most."""
        return most_blocks(num_tokens, self.block_size, self._windows, self._step_tokens)

    def block_ids(self, request: Request) -> Blocks:
        """The Request's table (a copy), per KV group. In the place of a block that is gone stands one that is not: a
        kernel may touch it, though it counts nowhere."""
        table = self._tables[request.request_id]
        if self._is_plain:
            return (list(table.block_ids[0]),)
        return tuple(
            [*[ids[gone] if gone < len(ids) else 0] * gone, *ids[gone:]]
            for ids, gone in zip(table.block_ids, table.num_gone, strict=True)
        )

    def num_loaded_tokens(self, request: Request) -> int:
        """Tokens whose KV came from the host when the Request was last admitted."""
        return self._tables[request.request_id].num_loaded * self.block_size // len(self._windows)

    def lookup(self, request: Request) -> Hits:
        """The cached blocks, of pool and host, of the longest known prefix, per KV group. It never covers the last
        token, whose logits are needed, nor anything where those of the prompt are."""
        if not self.enable_prefix_caching or request.reads_prompt:
            return tuple([] for _ in self._windows)
        num_blocks = (request.num_tokens - 1) // self.block_size
        digests = self._digests(request, num_blocks)
        found: list[list[int]] = []
        for group, window in enumerate(self._windows):
            blocks: list[int] = []
            for key in _keys(digests[:num_blocks], group):
                block = self.pool.holder(key)
                if block is None and self.host.num_blocks:
                    block = self.host.find(key)
                if block is None and not window:
                    num_blocks = len(blocks)
                    break
                blocks.append(GONE if block is None else block)
            found.append(blocks)
        if self._has_windows:
            num_blocks = self._longest_seen(found, num_blocks)
            for blocks, window in zip(found, self._windows, strict=True):
                gone = self._first_seen(num_blocks * self.block_size, window)
                blocks[:gone] = [GONE] * gone
        return tuple(blocks[:num_blocks] for blocks in found)

    def try_allocate(self, request: Request, num_tokens: int, hits: Hits = (), spare: int = 0) -> Blocks | None:
        """Makes the tables long enough for positions 0 to `num_tokens` (those of windows for the next step only),
        beginning with `hits` when they are empty.

        Returns the blocks added after the hits, per KV group, or () for none; None, with nothing taken, when the pool
        cannot give them and keep `spare` more. A borrowed block becomes a copy of it, which take_copies() tells; who
        borrows it last keeps it as it is.
        """
        table, pool = self._tables[request.request_id], self.pool
        if self._is_plain and not (hits and hits[0]) and not table.borrowed:  # what most calls are, made short
            [ids] = table.block_ids
            num_new = -(-num_tokens // self.block_size) - len(ids)
            if num_new <= 0:
                return ()
            if num_new + spare > pool.num_available:
                return None
            new = pool.allocate(num_new)
            ids += new
            request.num_slots = len(ids) * self.block_size
            return (new,)
        num_hits = len(hits[0]) if hits else 0
        start = request.num_computed_tokens + num_hits * self.block_size
        if self._has_windows:
            self._give_back(table, start)
        missing = []
        for ids, window in zip(table.block_ids, self._windows, strict=True):
            end = min(num_tokens, start + self._step_tokens) if window else num_tokens
            missing.append(max(0, -(-end // self.block_size) - len(ids) - num_hits))
        num_new = sum(missing)
        if not num_new and not num_hits:
            return ()
        keeps = [pool.is_private(block) for block in table.borrowed]
        num_new -= sum(keeps)
        # an idle hit cannot be handed out; one of the host takes a block, and is no block of the pool
        num_taken = sum(1 for blocks in hits for block in blocks if block != GONE and not pool.ref_count(block))
        if num_new + spare > pool.num_available - num_taken:
            return None
        if num_hits:
            self._take_hits(table, hits)
        added = self._take_borrowed(table, keeps)
        for ids, new, count in zip(table.block_ids, added, missing, strict=True):
            new += pool.allocate(count - len(new))
            ids += new
        request.num_slots = min(map(len, table.block_ids)) * self.block_size
        return added

    def _take_hits(self, table: _Table, hits: Hits) -> None:
        """Begins an empty table with the blocks of a known prefix; those on the host get a block to be copied to."""
        pool, host = self.pool, self.host
        on_host: list[tuple[list[int], int, bytes]] = []  # whose ids, at which index, under which key
        table.num_hashed = len(hits[0])
        for group, (ids, blocks) in enumerate(zip(table.block_ids, hits, strict=True)):
            table.num_gone[group] = gone = self._first_seen(len(blocks) * self.block_size, self._windows[group])
            ids += blocks
            pool.touch([block for block in blocks[gone:] if block < pool.num_blocks])
            keys = _keys(table.digests, group)
            on_host += [(ids, at, keys[at]) for at in range(gone, len(blocks)) if blocks[at] >= pool.num_blocks]
        table.num_loaded = len(on_host)
        sources = host.hold([key for _, _, key in on_host])
        for (ids, index, key), source in zip(on_host, sources, strict=True):
            ids[index : index + 1] = blocks = pool.allocate(1)
            host.load(source, blocks[0], key)
            pool.hash(blocks, [key])

    def _take_borrowed(self, table: _Table, keeps: list[bool]) -> Blocks:
        """Blocks for what was borrowed, per KV group: itself, or a new one that it is to be copied to."""
        added: Blocks = tuple([] for _ in table.block_ids)
        for blocks, borrowed, keep in zip(added, table.borrowed, keeps, strict=False):
            if keep:
                blocks.append(borrowed)
            else:
                blocks += self.pool.allocate(1)
                self.host.copies.append((borrowed, blocks[0]))
                self.pool.free([borrowed])
        table.borrowed = []
        return added

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Gives `child`, whose table is empty, the KV of the parent's first `num_tokens` positions; they are equal.

        Full blocks are shared. One that is full in part is borrowed: the parent goes on writing behind those positions.
        """
        source, table = self._tables[parent.request_id], self._tables[child.request_id]
        num_full = num_tokens // self.block_size
        table.block_ids = tuple(ids[:num_full] for ids in source.block_ids)
        table.num_gone = list(source.num_gone)
        table.digests = source.digests[:num_full]
        table.num_hashed = min(source.num_hashed, num_full)
        for ids, gone in zip(table.block_ids, table.num_gone, strict=True):
            self.pool.touch(ids[gone:])
        if num_tokens % self.block_size:
            is_owner = num_full < len(source.block_ids[0])
            table.borrowed = [ids[num_full] for ids in source.block_ids] if is_owner else list(source.borrowed)
            assert table.borrowed, f"{parent.request_id} does not hold {num_tokens} positions"
            self.pool.touch(table.borrowed)
        child.num_slots = num_tokens  # what it borrows is full for it

    def take_copies(self) -> list[tuple[int, int]]:
        """Block copies (from, to) to make, in this order, before anything else is written, since the last call."""
        copies, self.host.copies = self.host.copies, []
        return copies

    def hash_full(self, request: Request, num_tokens: int) -> list[tuple[int, bytes]]:
        """Makes the full blocks among the first `num_tokens` positions findable; their ids must be final.

        Returns what became findable, for unhash(): (block, key).
        """
        table, last = self._tables[request.request_id], num_tokens // self.block_size
        first = table.num_hashed
        if first >= last or not self.enable_prefix_caching:
            return []
        table.num_hashed = last
        digests, hashed = self._digests(request, last), []
        for group, (ids, gone) in enumerate(zip(table.block_ids, table.num_gone, strict=True)):
            start = max(first, gone)
            hashed += self.pool.hash(ids[start:last], _keys(digests[start:last], group))
        return hashed

    def known_digests(self, request_id: str) -> list[bytes]:
        """Digests of a live Request's leading full blocks, as far as they were needed yet."""
        return self._tables[request_id].digests

    def digest_all(self, request: Request) -> None:
        """Hashes the full blocks of a Request ahead of its turn: when it arrives, its tokens are still in the caches of
        the processor."""
        if self.enable_prefix_caching:
            self._digests(request, request.num_tokens // self.block_size)

    def unhash(self, hashed: list[tuple[int, bytes]]) -> None:
        """Takes hash_full() back, where the block was not evicted meanwhile: the step that fills it failed."""
        for block, key in hashed:
            self.host.drop(key)
            if block < self.pool.num_blocks and self.pool.digest(block) == key:
                self.pool.unhash(block)

    def held(self, request: Request) -> list[int]:
        """The blocks that a Request has references to, of all KV groups: heads before tails."""
        table = self._tables[request.request_id]
        if len(table.block_ids) == 1:
            return table.block_ids[0][table.num_gone[0] :] + table.borrowed
        levels = zip_longest(*table.block_ids, fillvalue=GONE)
        return [block for level in levels for block in level if block != GONE] + table.borrowed

    def free(self, request: Request) -> None:
        """Gives the Request's blocks back; what is hashed can still be hit, also by itself when it resumes."""
        table = self._tables[request.request_id]
        self.pool.free(self.held(request))
        table.block_ids, table.num_gone = tuple([] for _ in self._windows), [0] * len(self._windows)
        table.borrowed = []
        table.num_hashed = table.num_loaded = request.num_slots = 0

    def forget(self, request: Request) -> None:
        """Gives the blocks back and drops the table: the Request has ended."""
        table = self._tables[request.request_id]
        if table.borrowed or any(table.block_ids):
            self.free(request)
        del self._tables[request.request_id]

    def _first_seen(self, position: int, window: int) -> int:
        """The first block that the token at this position sees."""
        return max(0, position - window + 1) // self.block_size if window else 0

    def _give_back(self, table: _Table, start: int) -> None:
        """Frees what no token from position `start` on sees."""
        for group, window in enumerate(self._windows):
            ids, gone = table.block_ids[group], table.num_gone[group]
            end = min(self._first_seen(start, window), len(ids))
            if end > gone:
                self.pool.free(ids[gone:end])
                ids[gone:end] = [GONE] * (end - gone)
                table.num_gone[group] = end

    def _longest_seen(self, found: list[list[int]], num_blocks: int) -> int:
        """The longest prefix, of at most so many blocks, of which each group has all that the next token sees."""
        runs: list[tuple[list[int], int]] = []  # how many known blocks in a row end in front of each, and the window
        for blocks, window in zip(found, self._windows, strict=True):
            if window:
                run = [0]
                for block in blocks:
                    run.append(0 if block == GONE else run[-1] + 1)
                runs.append((run, window))
        while any(
            run[num_blocks] < num_blocks - self._first_seen(num_blocks * self.block_size, window)
            for run, window in runs
        ):
            num_blocks -= 1
        return num_blocks

    def _digests(self, request: Request, num_blocks: int) -> list[bytes]:
        """Digests of the Request's leading full blocks, at least so many; each is computed once."""
        table = self._tables[request.request_id]
        digests, num_known = table.digests, len(table.digests)
        if num_known < num_blocks:
            parent = digests[-1] if digests else table.root
            tokens = request.token_ids[num_known * self.block_size : num_blocks * self.block_size]
            digests += self._hasher.chain(parent, tokens)
            if self.on_digest is not None:
                for index in range(num_known, num_blocks):
                    self.on_digest(request, index, digests[index])
        return digests


def _keys(digests: list[bytes], group: int) -> list[bytes]:
    """Under which the blocks of a KV group are found; of the first group, by the digests themselves."""
    return [digest + bytes((group,)) for digest in digests] if group else digests
