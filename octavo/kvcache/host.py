"""The second tier: blocks in host memory that keep what the pool gave up, so that it is copied back and not computed.

A host block is found by the same key as a block of the pool (the chained hash of all tokens up to its end, so tenants
stay apart), and has an id behind those of the pool: a copy to or from it is a pair of ids like any other. What is read
back stays here too, so giving it up again costs nothing. The least recently used goes first.

This is also how a preempted Request is swapped: its full blocks are cached prefixes from the moment it gives them up.
Those that somebody takes go to the host, the others stay where they are, and it finds both when it comes back.
"""

from collections import OrderedDict


class HostTier:
    """`num_blocks` host blocks with ids from `first` on."""

    def __init__(self, num_blocks: int, first: int) -> None:
        self.num_blocks = num_blocks
        self.saves = True  # whether copying a block out and back costs less than computing it (scheduler/cost.py)
        self.num_saved = self.num_loaded = 0  # blocks, since they were last told (scheduler/counts.py)
        self.copies: list[tuple[int, int]] = []  # planned: (from, to), in the order in which they must be made
        self.changed: list[tuple[int, bytes]] = []  # by these: which block holds what, once they are made
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # key -> host block, the least recently used first
        self._free = list(range(first + num_blocks - 1, first - 1, -1))

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: bytes) -> int | None:
        """The host block with this key."""
        return self._blocks.get(key)

    def save(self, block: int, key: bytes) -> None:
        """The pool is about to give a block away: plans a copy of it, unless it is here or not worth it."""
        all_are_read = not self._free and not self._blocks
        if all_are_read or not self.saves or key in self._blocks:
            return
        target = self._free.pop() if self._free else self._blocks.popitem(last=False)[1]
        self._blocks[key] = target
        self._plan(block, target, key)
        self.num_saved += 1

    def hold(self, keys: list[bytes]) -> list[int]:
        """Takes blocks out, so that nothing is saved over them; load() puts them back."""
        return [self._blocks.pop(key) for key in keys]

    def load(self, source: int, block: int, key: bytes) -> None:
        """Plans a copy back to a block of the pool."""
        self._blocks[key] = source
        self._plan(source, block, key)
        self.num_loaded += 1

    def drop(self, key: bytes) -> None:
        """Forgets a block, where it is here: what it was copied from, or the copy, may never have been written."""
        block = self._blocks.pop(key, None)
        if block is not None:
            self._free.append(block)

    def take_changed(self) -> list[tuple[int, bytes]]:
        """(block, key) of every copy planned since the last call, for KVCacheManager.unhash()."""
        changed, self.changed = self.changed, []
        return changed

    def _plan(self, source: int, target: int, key: bytes) -> None:
        self.copies.append((source, target))
        self.changed.append((target, key))
