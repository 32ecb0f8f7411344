"""Which idle block loses its prefix first, when the pool has nothing else to give. Every operation is O(1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

MAX_USES = 15  # uses above this count as so many: bounds how long a block survives without one


class Eviction(Protocol):
    """The blocks that nobody uses, but whose prefix can be hit, in the order in which they go."""

    def add(self, block: int, num_uses: int) -> None:
        """A block became idle; its prefix was hit `num_uses` times since it was computed."""
        ...

    def __delitem__(self, block: int) -> None:
        """A block was hit, or forgotten."""
        ...

    def take(self, count: int) -> list[int]:
        """Takes the blocks that go first. There are so many."""
        ...

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...


class LruEviction:
    """Least recently used first."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, block: int, num_uses: int) -> None:
        self._blocks[block] = None

    def __delitem__(self, block: int) -> None:
        del self._blocks[block]

    def take(self, count: int) -> list[int]:
        return [self._blocks.popitem(last=False)[0] for _ in range(count)]

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


class LfuEviction:
    """Least often used first, with ageing: the rule of GDSF (Cherkasova, HPL-98-69R1) for items of one size and cost.

    A block's rank is its number of uses plus the rank at which the last block was evicted, so what was popular long ago
    goes in the end. Ranks never fall below that floor and stay within MAX_USES + 1 of it, so a bucket for each rank
    makes the next victim O(1) to find. In a bucket the least recently used goes first. Prompts that come once pass
    through the lowest buckets and leave shared prefixes alone.
    """

    def __init__(self) -> None:
        self._floor = 0
        self._rank_of: dict[int, int] = {}
        self._buckets: dict[int, OrderedDict[int, None]] = {}  # by rank; none is empty

    def add(self, block: int, num_uses: int) -> None:
        rank = self._floor + min(num_uses, MAX_USES)
        self._rank_of[block] = rank
        self._buckets.setdefault(rank, OrderedDict())[block] = None

    def __delitem__(self, block: int) -> None:
        rank = self._rank_of.pop(block)
        bucket = self._buckets[rank]
        del bucket[block]
        if not bucket:
            del self._buckets[rank]

    def take(self, count: int) -> list[int]:
        return [self._first() for _ in range(count)]

    def _first(self) -> int:
        while self._floor not in self._buckets:
            self._floor += 1
        block = next(iter(self._buckets[self._floor]))
        del self[block]
        return block

    def __iter__(self) -> Iterator[int]:
        return iter(self._rank_of)

    def __len__(self) -> int:
        return len(self._rank_of)


EVICTIONS: dict[str, Callable[[], Eviction]] = {"lru": LruEviction, "lfu": LfuEviction}
