"""The door of the queue: how many may wait, how long a newcomer would, and who has waited too long."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from octavo.errors import QueueFullError
from octavo.request import Request

RECENT = 64  # admissions that the predicted wait is made from
LEAST_WAIT = 1.0  # seconds; also what is said before anything is known


class Door:
    """Bounds on the waiting queue (0: none), the deadlines of all live Requests, and the pace of admissions."""

    def __init__(self, max_num_reqs: int = 0, max_num_tokens: int = 0) -> None:
        self._max_num_reqs = max_num_reqs
        self._max_num_tokens = max_num_tokens
        self._num_tokens = 0  # prompt tokens of those never admitted yet
        self._admissions: deque[float] = deque(maxlen=RECENT)
        self._deadlines: list[tuple[float, str]] = []  # a heap; what has ended leaves lazily

    def enter(self, request: Request, num_waiting: int, now: float) -> None:
        """Lets a Request in. Raises QueueFullError, with the predicted wait, when the queue is full."""
        num_tokens = self._num_tokens + request.num_prompt_tokens
        full_reqs = self._max_num_reqs and num_waiting >= self._max_num_reqs
        full_tokens = self._max_num_tokens and num_waiting and num_tokens > self._max_num_tokens
        if (full_reqs or full_tokens) and not request.retry_alone:  # that one was let in before
            limit = f"{self._max_num_reqs} requests (max_num_queued_reqs)"
            if not full_reqs:
                limit = f"{self._max_num_tokens} prompt tokens (max_num_queued_tokens)"
            wait = self.predicted_wait(num_waiting, now)
            raise QueueFullError(
                f"the queue is full: {num_waiting} requests with {self._num_tokens} prompt tokens wait, the limit is "
                f"{limit}; a new one would wait about {wait:.0f} s: try again then",
                retry_after=wait,
            )
        self._num_tokens = num_tokens
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def admitted(self, request: Request, now: float) -> None:
        """A Request runs for the first time."""
        self._num_tokens -= request.num_prompt_tokens
        self._admissions.append(now)

    def left(self, request: Request) -> None:
        """A Request has ended."""
        if request.first_scheduled_time is None:
            self._num_tokens -= request.num_prompt_tokens

    def predicted_wait(self, num_waiting: int, now: float) -> float:
        """Seconds until as many as wait now are admitted, at the pace of the last RECENT admissions."""
        if len(self._admissions) < 2:
            return LEAST_WAIT
        pace = (now - self._admissions[0]) / len(self._admissions)
        return max(LEAST_WAIT, num_waiting * pace)

    def expired(self, now: float) -> Iterator[tuple[float, str]]:
        """(deadline, request id) of those that have passed; the Request may have ended since."""
        while self._deadlines and self._deadlines[0][0] <= now:
            yield heapq.heappop(self._deadlines)
