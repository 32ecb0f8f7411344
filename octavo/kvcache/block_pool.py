"""The blocks of the KV cache: who is free, who is shared, which prefix each full one holds. Every operation is O(1)
a block.

A touched block is in exactly one of three places:

    used     reference count > 0: in the table of that many Requests (hashed or not)
    cached   reference count 0, but hashed: its prefix can be hit, until it is evicted
    free     reference count 0, unhashed: nothing worth keeping

Blocks that were never touched are free too, and cost no resident memory until then.
"""

from array import array
from collections.abc import Iterable

from octavo.kvcache.eviction import Eviction, LruEviction
from octavo.kvcache.host import HostTier

_SIGNS = bytes.maketrans(bytes(range(12)), b".123456789+c")


class BlockPool:
    """`num_blocks` blocks with ids from 0, reference counts, and a map from digest to block.

    A block is taken from the free ones first (the last freed: its memory is warm), then from the never touched, and
    only then by evicting a cached one (`eviction` says which; the least recently used by default): memory costs less
    than computing a prefix again. What is evicted is offered to `host`.
    """

    def __init__(self, num_blocks: int, eviction: Eviction | None = None, host: HostTier | None = None) -> None:
        self.num_blocks = num_blocks
        self.num_available = num_blocks  # free or cached: what allocate() can hand out
        self.num_evictions = 0  # cached prefixes lost so far
        self.now = 0  # seconds, as the scheduler sets it
        self.touched = array("q", bytes(8 * num_blocks))  # by block id: when it was last handed out, hit or given back
        self._ref_counts: list[int] = []  # by block id; grows as blocks are first touched
        self._digests: list[bytes | None] = []  # by block id
        self._holders: dict[bytes, int] = {}  # digest -> block id
        self._free: list[int] = []
        self._uses: list[int] = []  # by block id: how often its prefix was hit since it was computed
        self._host = host
        self._cached: Eviction = eviction if eviction is not None else LruEviction()

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing: freed unhashed, or never touched."""
        return len(self._free) + self.num_blocks - len(self._ref_counts)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses, but whose prefix can still be hit."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks in the table of at least one Request."""
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Takes `count` (<= num_available) unhashed blocks, each with one reference."""
        refs, free = self._ref_counts, self._free
        self.num_available -= count
        blocks: list[int] = []
        while free and len(blocks) < count:
            blocks.append(free.pop())
        while len(refs) < self.num_blocks and len(blocks) < count:
            blocks.append(len(refs))
            refs.append(0)
            self._digests.append(None)
            self._uses.append(0)
        if len(blocks) < count:
            blocks += self._evict(count - len(blocks))
        now, touched = self.now, self.touched
        for block in blocks:
            refs[block] = 1
            touched[block] = now
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """Adds one reference to each: they were hit."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
                self.num_available -= 1
            self._ref_counts[block] += 1
            self._uses[block] += 1
            self.touched[block] = self.now

    def free(self, blocks: list[int]) -> None:
        """Gives up one reference to each block of a table, the last first, so that tails are evicted before heads."""
        refs, digests = self._ref_counts, self._digests
        cached: list[int] = []
        for block in reversed(blocks):
            refs[block] = count = refs[block] - 1
            if not count:
                self.num_available += 1
                self.touched[block] = self.now
                if digests[block] is None:
                    self._free.append(block)
                else:
                    cached.append(block)
        self._cached.add(cached, self._uses)

    def holder(self, digest: bytes) -> int | None:
        """The block that holds the prefix with this digest."""
        return self._holders.get(digest)

    def hash(self, blocks: list[int], digests: list[bytes]) -> list[tuple[int, bytes]]:
        """Makes used blocks findable, each under its digest, and returns (block, digest) of those that now are. Whose
        prefix another block holds already stays unhashed."""
        holders, hashed = self._holders, []
        for block, digest in zip(blocks, digests, strict=True):
            if digest not in holders:
                holders[digest] = block
                self._digests[block] = digest
                self._uses[block] = 0
                hashed.append((block, digest))
        return hashed

    def unhash(self, block: int) -> None:
        """Forgets what a hashed block holds, because its KV was never (fully) written."""
        digest = self._digests[block]
        assert digest is not None, f"block {block} is not hashed"
        del self._holders[digest]
        self._digests[block] = None
        if self._ref_counts[block] == 0:
            del self._cached[block]
            self._free.append(block)

    def digest(self, block: int) -> bytes | None:
        """The digest under which a touched block can be found; None when it is unhashed."""
        return self._digests[block]

    def is_private(self, block: int) -> bool:
        """Whether a used block is in one table only and can be hit by nobody: its owner may write anywhere in it."""
        return self._ref_counts[block] == 1 and self._digests[block] is None

    def ref_count(self, block: int) -> int:
        """How many tables a block is in."""
        return self._ref_counts[block] if block < len(self._ref_counts) else 0

    def states(self) -> str:
        """A character a block, as messages.MemoryMap has them."""
        pairs = zip(self._ref_counts, self._digests, strict=True)
        codes = bytes([(refs if refs < 10 else 10) if refs else 11 * (digest is not None) for refs, digest in pairs])
        return codes.translate(_SIGNS).decode().ljust(self.num_blocks, ".")

    def _evict(self, count: int) -> list[int]:
        digests, holders = self._digests, self._holders
        blocks = self._cached.take(count)
        for block in blocks:
            digest = digests[block]
            assert digest is not None, f"cached block {block} is not hashed"
            del holders[digest]
            digests[block] = None
            if self._host is not None:
                self._host.save(block, digest)
        self.num_evictions += count
        return blocks
