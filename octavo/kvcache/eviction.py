"""Which idle block loses its prefix first, when the pool has nothing else to give. Every operation is O(1)."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

STALE = 64  # void places of a queue, beside as many as count
MAX_USES = 15  # uses above this count as so many: bounds how long a block survives without one


class Eviction(Protocol):
    """The blocks that nobody uses, but whose prefix can be hit, in the order in which they go."""

    def add(self, blocks: list[int], num_uses: Sequence[int]) -> None:
        """Blocks became idle, in this order; the prefix of block b was hit num_uses[b] times since it was computed."""
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
    """Least recently used first.

    A queue whose middle is never searched: what was hit keeps its place there, void, until it comes up or void places
    are the larger part. That costs a fifth of an OrderedDict, which is scattered over memory.
    """

    def __init__(self) -> None:
        self._queue: deque[int] = deque()
        self._void: dict[int, int] = {}  # block -> how many of its places are void: the first ones
        self._num_void = 0

    def add(self, blocks: list[int], num_uses: Sequence[int]) -> None:
        self._queue.extend(blocks)

    def __delitem__(self, block: int) -> None:
        self._void[block] = self._void.get(block, 0) + 1
        self._num_void += 1
        if self._num_void > len(self) + STALE:
            self._queue = deque(self)
            self._void.clear()
            self._num_void = 0

    def take(self, count: int) -> list[int]:
        blocks: list[int] = []
        while len(blocks) < count:
            block = self._queue.popleft()
            if not (self._void and self._leave_void(block)):
                blocks.append(block)
        return blocks

    def _leave_void(self, block: int) -> bool:
        """Whether the place of a block that came up is void; it is gone then."""
        num_void = self._void.pop(block, 0)
        if num_void > 1:
            self._void[block] = num_void - 1
        self._num_void -= num_void > 0
        return num_void > 0

    def __iter__(self) -> Iterator[int]:
        void = dict(self._void)
        for block in self._queue:
            void[block] = void.get(block, 0) - 1
            if void[block] < 0:
                yield block

    def __len__(self) -> int:
        return len(self._queue) - self._num_void


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

    def add(self, blocks: list[int], num_uses: Sequence[int]) -> None:
        for block in blocks:
            rank = self._floor + min(num_uses[block], MAX_USES)
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
