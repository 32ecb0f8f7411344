"""Which idle block loses its prefix first, when the pool has nothing else to give. Every operation is O(1)."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

END = -1  # no block, but where the circle of blocks begins and ends
MAX_USES = 15  # uses above this count as so many: bounds how long a block survives without one


class LruEviction:
    """Least recently used first: a circle of blocks through END, linked by block id, which a block leaves anywhere in
    O(1). An OrderedDict does so too, but lies scattered over memory: it takes twice as long."""

    def __init__(self) -> None:
        self._before = [END]  # by block id; the last place is that of END, so that [END] finds it
        self._behind = [END]
        self._length = 0

    def add(self, blocks: list[int], num_uses: Sequence[int]) -> None:
        """Blocks became idle, in this order; the prefix of block b was hit num_uses[b] times since it was computed."""
        missing = max(blocks, default=END) + 2 - len(self._before)
        self._before[END:END] = self._behind[END:END] = [END] * missing
        before, behind = self._before, self._behind
        last = before[END]
        for block in blocks:
            before[block], behind[last] = last, block
            last = block
        before[END], behind[last] = last, END
        self._length += len(blocks)

    def __delitem__(self, block: int) -> None:
        """A block was hit, or forgotten."""
        before, behind = self._before[block], self._behind[block]
        self._behind[before], self._before[behind] = behind, before
        self._length -= 1

    def take(self, count: int) -> list[int]:
        """Takes the blocks that go first. There are so many."""
        blocks, block = [], self._behind[END]
        for _ in range(count):
            blocks.append(block)
            block = self._behind[block]
        self._behind[END], self._before[block] = block, END
        self._length -= count
        return blocks

    def __iter__(self) -> Iterator[int]:
        block = self._behind[END]
        while block != END:
            yield block
            block = self._behind[block]

    def __len__(self) -> int:
        return self._length


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


Eviction = LruEviction | LfuEviction  # the blocks that nobody uses, but whose prefix can be hit
EVICTIONS: dict[str, type[Eviction]] = {"lru": LruEviction, "lfu": LfuEviction}
