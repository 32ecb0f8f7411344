"""Who is admitted next, who keeps its blocks when they run out, and how much of a step prompts may take.

A policy only orders. The scheduler keeps the two promises that no policy can break: the first of the queue is admitted
or nobody (no overtaking), and the oldest running Request is never preempted for another, so whatever fits alone ends.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable

from octavo.request import Request

NO_CAP = 1 << 30  # tokens
STALE = 64  # entries of a heap whose Request has left, beside as many as are live


class Policy:
    """The waiting Requests in an order of its own, and its say over the running ones: here, first come, first served,
    and the newest is preempted. `now` is the scheduler's clock, read once a step; a policy reads no other, so that a
    recorded run can be replayed."""

    charges = False  # whether it wants charge() called, once a row

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def arrived(self, request: Request) -> None:
        """A new Request is there; unless it waits for a fork, push() follows."""

    def push(self, request: Request) -> None:
        """A Request that never ran waits."""
        self._requests[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """A preempted Request waits again."""
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def first(self, now: float) -> Request | None:
        """Whose turn it is; it stays in the queue."""
        return next(iter(self._requests.values()), None)

    def remove(self, request: Request) -> None:
        """A waiting Request was admitted, or has ended."""
        del self._requests[request.request_id]

    def ended(self, request: Request) -> None:
        """A Request has ended; it is not in the queue any more."""

    def ranked(self, running: list[Request]) -> list[Request]:
        """The running Requests (given in the order of admission), most deserving first: the last is preempted first."""
        return running

    def peers(self, request: Request) -> object:
        """Equal for running Requests of which any may be preempted, the cheapest; ranked() says of whom."""
        return None

    def prefill_cap(self, running: Iterable[Request]) -> int:
        """Most prompt tokens of the next step, all Requests together; at least 1."""
        return NO_CAP

    def charge(self, request: Request, start: int, end: int) -> None:
        """A step computes the positions from `start` up to `end` (perhaps none) for the first time."""

    def __len__(self) -> int:
        return len(self._requests)


class FcfsPolicy(Policy):
    """First come, first served; the newest is preempted. Every operation is O(1)."""


def victim(policy: Policy, running: list[Request]) -> Request | None:
    """Who of these, in the policy's order, loses its blocks: of those that it likes least, whoever costs the least to
    bring back. Each preemption doubles that, so that it is not always the same one."""
    least = policy.peers(running[-1]) if running else None
    peers = [request for request in reversed(running) if policy.peers(request) == least]
    return min(peers, key=lambda r: r.num_computed_tokens << min(r.num_preemptions, 16), default=None)


class RequestHeap:
    """Waiting Requests by a key that never changes while they wait. O(log n); what is removed leaves lazily, but is
    never the larger part for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []  # key, order of arrival here, request id
        self._entries: dict[str, tuple[int, Request]] = {}
        self._count = 0

    def push(self, request: Request, key: float) -> None:
        """Adds a Request; equal keys leave in the order they came."""
        heapq.heappush(self._heap, (key, self._count, request.request_id))
        self._entries[request.request_id] = (self._count, request)
        self._count += 1

    def first(self) -> Request | None:
        """The one with the lowest key."""
        while self._heap:
            _, count, request_id = self._heap[0]
            entry = self._entries.get(request_id)
            if entry is not None and entry[0] == count:
                return entry[1]
            heapq.heappop(self._heap)  # removed, or pushed again since
        return None

    def remove(self, request: Request) -> None:
        """Takes a Request out, wherever it stands."""
        del self._entries[request.request_id]
        if len(self._heap) > 2 * len(self._entries) + STALE:
            live = {(count, request_id) for request_id, (count, _) in self._entries.items()}
            self._heap = [item for item in self._heap if item[1:] in live]
            heapq.heapify(self._heap)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)


class PriorityPolicy(Policy):
    """The lowest `priority` first, with ageing: `ageing_seconds` of waiting count as one step of priority.

    The order of two Requests never changes while they wait: p1 * ageing + arrival1 < p2 * ageing + arrival2. So a
    Request waits only for those that came before it, or within (its priority - theirs) * ageing_seconds after it:
    nothing starves. Preempted are the last in the same order.
    """

    def __init__(self, ageing_seconds: float = 10.0) -> None:
        super().__init__()
        self._ageing = ageing_seconds
        self._heap = RequestHeap()

    def push(self, request: Request) -> None:
        self._heap.push(request, self._key(request))

    def put_back(self, request: Request) -> None:
        self._heap.push(request, self._key(request))

    def first(self, now: float) -> Request | None:
        return self._heap.first()

    def remove(self, request: Request) -> None:
        self._heap.remove(request)

    def ranked(self, running: list[Request]) -> list[Request]:
        return sorted(running, key=self._key)

    def peers(self, request: Request) -> object:
        return request.priority

    def __len__(self) -> int:
        return len(self._heap)

    def _key(self, request: Request) -> float:
        return request.priority * self._ageing + request.arrival_time
