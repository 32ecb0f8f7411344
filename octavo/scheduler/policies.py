"""In which order waiting Requests are admitted."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from octavo.request import Request


class WaitingQueue(Protocol):
    """The waiting Requests, in the order of a policy. The scheduler admits the first or nobody: no overtaking."""

    def push(self, request: Request) -> None:
        """A new Request waits."""
        ...

    def put_back(self, request: Request) -> None:
        """A preempted Request waits again, before all that were not admitted yet."""
        ...

    def first(self) -> Request | None:
        """Whose turn it is; it stays in the queue."""
        ...

    def remove(self, request: Request) -> None:
        """It was admitted, or has ended."""
        ...

    def __len__(self) -> int: ...


class FcfsQueue:
    """First come, first served. Every operation is O(1)."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def push(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def put_back(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def first(self) -> Request | None:
        return next(iter(self._requests.values()), None)

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]

    def __len__(self) -> int:
        return len(self._requests)
