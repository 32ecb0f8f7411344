"""The ring of StepRecords: one per step, the newest kept. Written by the engine; everything shown is read from here."""

from collections import deque
from collections.abc import Iterator

from octavo.messages import StepRecord

CAPACITY = 4096


class StepLog:
    """A bounded ring of StepRecords, oldest first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._records: deque[StepRecord] = deque(maxlen=capacity)
        self.num_steps = 0

    def append(self, record: StepRecord) -> None:
        """Adds the newest record; the oldest falls out when the ring is full."""
        self._records.append(record)
        self.num_steps += 1

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def total(self, field: str) -> float:
        """The sum of one field over the records still in the ring."""
        return float(sum(getattr(record, field) for record in self._records))
