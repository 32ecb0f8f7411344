"""What a scheduler tells: counts for the StepRecord, deltas for the front."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.kvcache.block_pool import BlockPool
from octavo.messages import RequestDelta, StepRecord
from octavo.request import FinishReason, Request
from octavo.step import TokenLogprobs


@dataclass(slots=True)
class Counts:
    """What happened since the last StepRecord was filled; the fields are StepRecord's."""

    num_prefill_tokens: int = 0
    num_chunked: int = 0
    num_preempted: int = 0
    num_preempted_tokens: int = 0
    num_recomputed_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_forked: int = 0
    num_kv_read: int = 0
    num_prefill_pairs: int = 0

    def fill(self, record: StepRecord) -> None:
        """Copies them into a record."""
        for name in self.__slots__:
            setattr(record, name, getattr(self, name))


def fill_pool(record: StepRecord, pool: BlockPool, evictions_told: int) -> int:
    """The pool's state after schedule(); returns its evictions so far, to be handed in the next time."""
    record.num_evicted_blocks = pool.num_evictions - evictions_told
    record.num_free_blocks = pool.num_free
    record.num_cached_blocks = pool.num_cached
    record.num_used_blocks = pool.num_used
    return pool.num_evictions


def make_delta(
    request: Request,
    token_ids: list[int] | None = None,
    logprobs: list[TokenLogprobs] | None = None,
    finish_reason: FinishReason | None = None,
    error: str | None = None,
) -> RequestDelta:
    """What a step brought a Request."""
    first = request.first_scheduled_time
    return RequestDelta(
        request_id=request.request_id,
        token_ids=token_ids if token_ids is not None else [],
        logprobs=logprobs,
        finish_reason=finish_reason,
        num_cached_tokens=request.num_cached_tokens,
        queue_time=first - request.arrival_time if first is not None else 0.0,
        error=error,
    )
