"""Who runs: how a waiting Request gets a row of the worker and blocks of the pool, and how it loses both.

The two go together: whoever has a row has blocks for all of its known tokens, and nobody else has any.
"""

import heapq

from octavo.kvcache.manager import KVCacheManager
from octavo.request import Request, RequestStatus
from octavo.scheduler.policies import Policy

NEVER = 1 << 30  # a position that no Request reaches


class Rows:
    """The rows, and the running Requests in the order of admission.

    Args:
        kv: the block tables.
        num_rows: so many Requests run at once, at most.
        headroom: blocks per running Request that an admission leaves free.
    """

    def __init__(self, kv: KVCacheManager, num_rows: int, headroom: float) -> None:
        self.num_rows = num_rows
        self.running: dict[str, Request] = {}
        self._kv = kv
        self._headroom = headroom
        self.free = list(range(num_rows))  # those that nobody has; a heap: the lowest is taken first

    def ranked(self, policy: Policy) -> list[Request]:
        """The running Requests, in the order of admission; where blocks may run out, in the policy's order behind the
        oldest, which nobody preempts."""
        order = list(self.running.values())
        if len(order) > 2 and self._kv.pool.num_available < len(order) * self._kv.step_blocks:
            order[1:] = policy.ranked(order[1:])
        return order

    def try_allocate(self, members: list[Request]) -> list[int] | None:
        """Look up, count, allocate: blocks of all known tokens, for all of these Requests or, where blocks or rows are
        short, for none of them (None). Returns how many tokens of each are computed already.

        Of all tokens, although the first chunk may be shorter: so a prefill never preempts anybody, nor starts what the
        pool cannot hold.
        """
        if len(self.free) < len(members):
            return None
        spare = int(self._headroom * len(self.running))
        starts: list[int] = []
        for member in members:
            hits = self._kv.lookup(member)
            if self._kv.try_allocate(member, member.num_tokens, hits, spare) is None:
                for other in members[: len(starts)]:
                    self._kv.free(other)
                return None
            starts.append(len(hits[0]) * self._kv.block_size)
        return starts

    def start(self, request: Request, num_computed_tokens: int, now: float) -> None:
        """Gives a Request that has its blocks a row: it runs."""
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
        request.num_computed_tokens = num_computed_tokens
        request.status = RequestStatus.RUNNING
        request.row = heapq.heappop(self.free)
        request.plain_from = max(request.num_lost_tokens, request.num_prompt_tokens, request.num_tokens - 1)
        if request.params.use_beam_search:
            request.plain_from = NEVER
        self.running[request.request_id] = request

    def fork(self, parent: Request, child: Request, now: float) -> None:
        """Gives a Request the KV of another one, and a row: it runs."""
        self._kv.fork(parent, child, parent.num_computed_tokens)
        child.num_cached_tokens = parent.num_cached_tokens
        self.start(child, parent.num_computed_tokens, now)

    def release(self, request: Request) -> None:
        """Takes row and blocks, and raises the epoch: results in flight are stale from here on."""
        request.status = RequestStatus.PREEMPTED
        if request.num_tokens - 1 > request.plain_from:  # its answer's blocks, which update() left for one batch
            self._kv.hash_full(request, request.num_tokens - 1)
        self._kv.free(request)
        del self.running[request.request_id]
        heapq.heappush(self.free, request.row)
        request.row = -1
        request.epoch += 1
        request.num_lost_tokens = max(request.num_lost_tokens, request.num_computed_tokens)
        request.num_computed_tokens = request.num_pending = 0
        request.prompt_logprobs = []  # what is computed again is told again
