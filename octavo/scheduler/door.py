"""The door of the queue: how many may wait, how long a newcomer would, and who has waited too long."""

import heapq
from collections import deque
from collections.abc import Iterator

from octavo.errors import ContextLengthError, InvalidValueError, QueueFullError
from octavo.kvcache.manager import KVCacheManager
from octavo.request import Request
from octavo.scheduler.policies import STALE

RECENT = 64  # admissions that the predicted wait is made from
LEAST_WAIT = 1.0  # seconds; also what is said before anything is known


class Door:
    """Bounds on the waiting queue (0: none), the deadlines of all live Requests, and the pace of admissions."""

    def __init__(self, max_num_reqs: int = 0, max_num_tokens: int = 0) -> None:
        self._max_num_reqs = max_num_reqs
        self._max_num_tokens = max_num_tokens
        self._num_tokens = 0  # prompt tokens of those never admitted yet
        self._admissions: deque[float] = deque(maxlen=RECENT)
        self.deadlines: list[tuple[float, str]] = []  # a heap; what has ended leaves lazily
        self._deadline_of: dict[str, float] = {}  # of what has not

    def enter(self, request: Request, num_waiting: int, now: float) -> None:
        """Lets a Request in. Raises QueueFullError, with the predicted wait, when the queue is full."""
        if not request.retry_alone:  # that one was let in before
            self.check(num_waiting, self._num_tokens, request.num_prompt_tokens, now)
        self._num_tokens += request.num_prompt_tokens
        if request.deadline is not None:
            self._deadline_of[request.request_id] = request.deadline
            heapq.heappush(self.deadlines, (request.deadline, request.request_id))

    def check(self, num_waiting: int, num_tokens: int, num_new: int, now: float) -> None:
        """Raises QueueFullError, with the predicted wait, where so many Requests with so many prompt tokens wait that
        one of `num_new` more is too many."""
        full_reqs = self._max_num_reqs and num_waiting >= self._max_num_reqs
        full_tokens = self._max_num_tokens and num_waiting and num_tokens + num_new > self._max_num_tokens
        if full_reqs or full_tokens:
            limit = f"{self._max_num_reqs} requests (max_num_queued_reqs)"
            if not full_reqs:
                limit = f"{self._max_num_tokens} prompt tokens (max_num_queued_tokens)"
            wait = self.predicted_wait(num_waiting, now)
            raise QueueFullError(
                f"the queue is full: {num_waiting} requests with {num_tokens} prompt tokens wait, the limit is "
                f"{limit}; a new one would wait about {wait:.0f} s: try again then",
                retry_after=wait,
            )

    def admitted(self, request: Request, now: float) -> None:
        """A Request runs for the first time."""
        self._num_tokens -= request.num_prompt_tokens
        self._admissions.append(now)

    def left(self, request: Request) -> None:
        """A Request has ended."""
        if request.first_scheduled_time is None:
            self._num_tokens -= request.num_prompt_tokens
        self._deadline_of.pop(request.request_id, None)
        if len(self.deadlines) > 2 * len(self._deadline_of) + STALE:
            self.deadlines = [(deadline, request_id) for request_id, deadline in self._deadline_of.items()]
            heapq.heapify(self.deadlines)

    def predicted_wait(self, num_waiting: int, now: float) -> float:
        """Seconds until as many as wait now are admitted, at the pace of the last RECENT admissions."""
        if len(self._admissions) < 2:
            return LEAST_WAIT
        pace = (now - self._admissions[0]) / len(self._admissions)
        return max(LEAST_WAIT, num_waiting * pace)

    def expired(self, now: float) -> Iterator[str]:
        """Ids of the live Requests whose deadline has passed; each is to end before the next is asked for."""
        while self.deadlines and self.deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self.deadlines)
            if self._deadline_of.get(request_id) == deadline:  # else it has ended; a namesake may run
                yield request_id


def too_late(request: Request) -> str:
    """Why a Request ends whose deadline has passed."""
    allowed = (request.deadline or 0.0) - request.arrival_time
    return f"the request's timeout of {allowed:g} s has passed: allow more, or ask for fewer tokens"


def refuse_impossible(request: Request, kv: KVCacheManager, max_model_len: int, max_num_seqs: int) -> None:
    """Refuses what an empty pool could not finish, or no step begin: whatever is let in ends.

    Raises:
        InvalidValueError: an empty prompt, or more beams than rows.
        ContextLengthError: too long for the context, or for the whole KV pool.
    """
    num_prompt = request.num_prompt_tokens
    if num_prompt < 1:
        raise InvalidValueError("the prompt is empty: give at least one token", param="prompt")
    if num_prompt >= max_model_len:
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens; the context is {max_model_len} and at least one is for the "
            "answer: shorten the prompt",
            param="prompt",
        )
    width = request.params.beam_width
    if width > max_num_seqs:
        raise InvalidValueError(f"{width} beams were asked for; at most {max_num_seqs} fit (max_num_seqs)", param="n")
    longest = min(num_prompt + request.max_tokens, max_model_len) - 1  # the last token's KV is never needed
    needed, total = width * kv.most_blocks(longest), kv.pool.num_blocks
    if needed > total:
        beams = f", in {width} beams," if width > 1 else ""
        raise ContextLengthError(
            f"{num_prompt} prompt tokens and {request.max_tokens} to generate{beams} need {needed} KV blocks of "
            f"{kv.block_size}, but the whole pool has {total}: lower max_tokens, or give more KV memory",
            param="max_tokens",
        )
