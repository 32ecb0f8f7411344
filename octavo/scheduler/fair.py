"""Fair shares between tenants: the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al.,
OSDI 2024).

Every tenant has a counter of the service it got, in weighted tokens divided by its weight. Who is admitted next is the
tenant with the lowest counter among those that wait; within a tenant, first come, first served. Work is conserved: a
tenant alone gets everything. A tenant that begins to wait is lifted to the lowest counter of those that wait already
(or, when nobody does, to where the last one left): what it did not use is not saved up.

Unfairness is bounded. The counters of two tenants that both have Requests waiting differ by at most

    B = max_num_seqs * (PROMPT_WEIGHT * longest prompt + OUTPUT_WEIGHT * most new tokens) / smallest weight

Proof: let V be the lowest counter of those that wait. It never falls, because counters only grow and who joins is
lifted to it. A tenant's counter was V when it was last admitted; since then it grew only by its running Requests, at
most max_num_seqs of them, each by at most one Request's worth. So every waiting counter lies between V and V + B, and
over any interval in which two tenants of equal weight wait, the service they get differs by at most 2 B, however long
it is; first come, first served has no such bound. (The paper charges a prompt at admission; here a token is charged
when a step computes it for the first time: prefix hits and recomputation are free.)
"""

from collections import OrderedDict

from octavo.request import Request
from octavo.scheduler.policies import Policy

PROMPT_WEIGHT = 1.0  # of a prompt token; an output token costs about twice: the paper's weights
OUTPUT_WEIGHT = 2.0
MAX_IDLE_TENANTS = 10_000  # whose counters are remembered; the longest idle are forgotten


class FairPolicy(Policy):
    """Lowest counter first. A Request carries its tenant's weight: twice the weight, twice the service."""

    charges = True

    def __init__(self) -> None:
        super().__init__()
        self._counters: dict[str, float] = {}  # of tenants with live Requests: weighted tokens by weight
        self._idle: OrderedDict[str, float] = OrderedDict()  # of the others
        self._num_live: dict[str, int] = {}
        self._queues: dict[str, OrderedDict[str, Request]] = {}
        self._length = 0
        self._floor = 0.0  # the lowest waiting counter when somebody last left the queue

    def arrived(self, request: Request) -> None:
        tenant = request.tenant
        if tenant not in self._num_live:
            self._counters[tenant] = self._idle.pop(tenant, 0.0)
        self._num_live[tenant] = self._num_live.get(tenant, 0) + 1

    def push(self, request: Request) -> None:
        tenant = request.tenant
        self._queue(tenant)[request.request_id] = request
        self._length += 1

    def put_back(self, request: Request) -> None:
        queue = self._queue(request.tenant)
        queue[request.request_id] = request
        queue.move_to_end(request.request_id, last=False)
        self._length += 1

    def first(self, now: float) -> Request | None:
        if not self._length:
            return None
        tenant = min(self._queues, key=self._counters.__getitem__)
        return next(iter(self._queues[tenant].values()))

    def remove(self, request: Request) -> None:
        self._floor = self._lowest()
        queue = self._queues[request.tenant]
        del queue[request.request_id]
        self._length -= 1
        if not queue:
            del self._queues[request.tenant]

    def ended(self, request: Request) -> None:
        tenant = request.tenant
        self._num_live[tenant] -= 1
        if not self._num_live[tenant]:
            del self._num_live[tenant]
            self._idle[tenant] = self._counters.pop(tenant)
            if len(self._idle) > MAX_IDLE_TENANTS:
                self._idle.popitem(last=False)

    def ranked(self, running: list[Request]) -> list[Request]:
        """The least served tenant keeps its blocks; within a tenant, the oldest."""
        return sorted(running, key=lambda request: self._counters[request.tenant])

    def peers(self, request: Request) -> object:
        return request.tenant

    def charge(self, request: Request, start: int, end: int) -> None:
        prompt_end = request.num_prompt_tokens
        num_prompt, num_output = max(min(end, prompt_end) - start, 0), max(end - max(start, prompt_end), 0)
        weighted = PROMPT_WEIGHT * num_prompt + OUTPUT_WEIGHT * num_output
        self._counters[request.tenant] += weighted / request.weight

    def __len__(self) -> int:
        return self._length

    def _lowest(self) -> float:
        return min((self._counters[tenant] for tenant in self._queues), default=self._floor)

    def _queue(self, tenant: str) -> OrderedDict[str, Request]:
        """The tenant's queue; one that begins to wait is lifted."""
        queue = self._queues.get(tenant)
        if queue is None:
            self._counters[tenant] = max(self._counters[tenant], self._lowest())
            queue = self._queues[tenant] = OrderedDict()
        return queue
