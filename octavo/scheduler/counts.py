"""What a scheduler counts for the StepRecord."""

from collections.abc import Collection
from dataclasses import dataclass, fields

from octavo.kvcache.manager import KVCacheManager
from octavo.messages import StepRecord
from octavo.request import Request
from octavo.step import SchedulerOutput


@dataclass(slots=True)
class _Counted:
    """What happened since the last StepRecord was filled; the fields are StepRecord's."""

    num_prefill_tokens: int = 0
    num_chunked: int = 0
    num_preempted: int = 0
    num_preempted_tokens: int = 0
    num_recomputed_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    host_queries: int = 0
    host_hits: int = 0
    num_forked: int = 0
    num_prefill_pairs: int = 0


_COUNTED = tuple(field.name for field in fields(_Counted))  # num_kv_read, which each step has, is told apart


class Counts(_Counted):
    """Counts of a step as they come up; fill() hands them over and begins again."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kv_read = 0
        self._evictions_told = 0
        self._is_plain = True  # nothing but num_kv_read was counted by a method

    def scheduled(self, request: Request, start: int, share: int, *, samples: bool) -> None:
        """A Request computes `share` tokens from position `start` on."""
        end = start + share
        self._is_plain = False
        self.num_kv_read += end
        if share > 1:
            self.num_prefill_pairs += share * (start + end + 1) // 2
        self.num_prefill_tokens += max(share - samples, 0)
        self.num_chunked += not samples
        if start < request.num_lost_tokens:
            self.num_recomputed_tokens += min(end, request.num_lost_tokens) - start

    def looked_up(self, request: Request, num_found: int, kv: KVCacheManager) -> None:
        """A Request is admitted for the first time, and begins with a known prefix of `num_found` tokens."""
        if kv.enable_prefix_caching and not request.reads_prompt:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += num_found
            if kv.host.num_blocks:
                self.host_queries += request.num_tokens - num_found + kv.num_loaded_tokens(request)
                self.host_hits += kv.num_loaded_tokens(request)

    def fill(
        self, record: StepRecord, output: SchedulerOutput, running: Collection[Request], kv: KVCacheManager
    ) -> None:
        """Writes everything, and the pool's state after schedule(), into a record."""
        record.num_kv_read, self.num_kv_read = self.num_kv_read, 0
        if self.num_preempted or not self._is_plain:
            self._is_plain = True
            for name in _COUNTED:
                setattr(record, name, getattr(self, name))
                setattr(self, name, 0)
        record.num_running = len(output.scheduled)
        record.num_tokens = output.num_tokens
        pool, host = kv.pool, kv.host
        if host.num_blocks:
            record.num_saved_blocks, record.num_loaded_blocks = host.num_saved, host.num_loaded
            host.num_saved = host.num_loaded = 0
            record.host_usage = len(host) / host.num_blocks
        if output.copy_blocks:
            record.num_copied_blocks = len(output.copy_blocks) - record.num_saved_blocks - record.num_loaded_blocks
        num_idle_slots = 0
        for request in running:
            num_idle_slots += request.num_slots - request.num_computed_tokens
        record.num_idle_slots = num_idle_slots
        record.num_evicted_blocks = pool.num_evictions - self._evictions_told
        self._evictions_told = pool.num_evictions
        record.num_free_blocks = free = pool.num_free
        record.num_cached_blocks = pool.num_available - free
        record.num_used_blocks = pool.num_blocks - pool.num_available
