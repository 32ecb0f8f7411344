"""Who runs: how a waiting Request gets a row of the worker and blocks of the pool, and how it loses both.

The two go together: whoever has a row has blocks for all of its known tokens, and nobody else has any.
"""

from __future__ import annotations

import heapq

from octavo.kvcache.manager import KVCacheManager
from octavo.request import Request, RequestStatus

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
        self._free = list(range(num_rows))  # a heap: the lowest is taken first

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    def try_allocate(self, members: list[Request]) -> list[int] | None:
        """Look up, count, allocate: blocks of all known tokens, for all of these Requests or, where blocks or rows are
        short, for none of them (None). Returns how many tokens of each are computed already.

        Of all tokens, although the first chunk may be shorter: so a prefill never preempts anybody, nor starts what the
        pool cannot hold.
        """
        if len(self._free) < len(members):
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
        request.row = heapq.heappop(self._free)
        request.plain_from = max(request.num_lost_tokens, request.num_prompt_tokens, request.num_tokens - 1)
        if request.params.use_beam_search:
            request.plain_from = NEVER
        self.running[request.request_id] = request

    def release(self, request: Request) -> None:
        """Takes row and blocks, and raises the epoch: results in flight are stale from here on."""
        if request.num_tokens - 1 > request.plain_from:  # its answer's blocks, which update() left for one batch
            self._kv.hash_full(request, request.num_tokens - 1)
        self._kv.free(request)
        del self.running[request.request_id]
        heapq.heappush(self._free, request.row)
        request.row = -1
        request.epoch += 1
        request.num_lost_tokens = max(request.num_lost_tokens, request.num_computed_tokens)
        request.num_computed_tokens = request.num_pending = 0
        request.prompt_logprobs = []  # what is computed again is told again
