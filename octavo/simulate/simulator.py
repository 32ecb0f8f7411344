"""Runs the engine's scheduler (not a copy) and its KV cache manager on a trace. Only the computing half is replaced: a
step takes what the cost model says, in virtual time, and the model says what the trace says."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from octavo.config import EngineConfig
from octavo.errors import QueueFullError
from octavo.kvcache.eviction import EVICTIONS
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import StepRecord
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.scheduler.budget import Limits
from octavo.scheduler.choose import make_policy
from octavo.scheduler.copying import CopyChoice
from octavo.scheduler.cost import CostModel, StepWork
from octavo.scheduler.scheduler import Scheduler
from octavo.simulate.outcome import Outcome, Seen
from octavo.simulate.trace import Arrival
from octavo.step import ModelRunnerOutput, SchedulerOutput, most_blocks


@dataclass(frozen=True, slots=True)
class Machine:
    """What is simulated: a model on a machine, in numbers."""

    cost: CostModel
    num_blocks: int
    max_model_len: int
    kv_windows: tuple[int, ...] = (0,)  # per KV group
    num_host_blocks: int = 0

    def longest(self, config: EngineConfig) -> int:
        """Tokens of the longest request that fits."""
        lengths = range(1, self.max_model_len + 1)
        sizes = config.block_size, self.kv_windows, config.max_step_tokens
        return bisect_right(lengths, self.num_blocks, key=lambda length: most_blocks(length, *sizes))


def simulate(
    trace: Sequence[Arrival],
    machine: Machine,
    config: EngineConfig,
    *,
    tell: Callable[[int], None] = lambda num_done: None,
) -> Outcome:
    """Runs a trace to its end, one step in flight; `tell` hears how many requests have ended.

    Arrivals are noticed between steps, as by an engine whose inbox is drained there.
    """
    now = 0.0
    kv = KVCacheManager(
        machine.num_blocks,
        config.block_size,
        machine.kv_windows,
        config.max_step_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        hash_key=b"",
        eviction=EVICTIONS[config.prefix_eviction_policy](),
        num_host_blocks=machine.num_host_blocks,
    )
    copies = CopyChoice(machine.cost, config.block_size, len(machine.kv_windows))
    kv.host.saves = copies.saves
    scheduler = Scheduler(
        kv,
        Limits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=machine.max_model_len,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            admission_headroom=config.admission_headroom,
            max_num_queued_reqs=config.max_num_queued_reqs or 0,
            max_num_queued_tokens=config.max_num_queued_tokens,
        ),
        policy=make_policy(config, machine.cost),
        clock=lambda: now,
    )
    outcome = Outcome([Seen(arrival) for arrival in trace], [])
    next_arrival = num_done = 0
    while next_arrival < len(trace) or scheduler.has_unfinished:
        while next_arrival < len(trace) and trace[next_arrival].time <= now:
            try:
                scheduler.add(_request(next_arrival, trace[next_arrival], now))
            except QueueFullError:
                outcome.seen[next_arrival].refused = True
                num_done += 1
            next_arrival += 1
        output = scheduler.schedule()
        if not output.scheduled:
            now = trace[next_arrival].time
            continue
        record = StepRecord(step=len(outcome.records), time=now)
        scheduler.fill(record, output)
        result = _answers(output, outcome)
        record.num_sampled = sum(map(len, result.token_ids))
        work = StepWork.of(record)
        record.execute_seconds = machine.cost.seconds(work)
        kv.host.saves = copies.learn(work, record.execute_seconds)
        now += record.execute_seconds
        deltas = scheduler.update(output, result)
        outcome.take(deltas, now)
        outcome.records.append(record)
        if ended := sum(delta.finish_reason is not None for delta in deltas):
            num_done += ended
            tell(num_done)
    return outcome


def capacity(trace: Sequence[Arrival], machine: Machine, config: EngineConfig) -> float:
    """Requests a second when all of the trace wait from the start: load 1.0."""
    outcome = simulate(
        [replace(arrival, time=0.0) for arrival in trace],
        machine,
        replace(config, scheduling_policy="fcfs", max_num_queued_reqs=0, max_num_queued_tokens=0),
    )
    return len(outcome.seen) / outcome.seconds


def _request(place: int, arrival: Arrival, now: float) -> Request:
    return Request(
        request_id=str(place),
        prompt_token_ids=arrival.token_ids(),
        params=SamplingParams(ignore_eos=True, max_tokens=arrival.num_output),
        stop_ids=frozenset(),
        max_tokens=arrival.num_output,
        arrival_time=now,
        priority=arrival.priority,
        tenant=arrival.tenant,
    )


def _answers(output: SchedulerOutput, outcome: Outcome) -> ModelRunnerOutput:
    """What the trace lets the model say: for each row that samples, the content id of its answer."""
    tokens = [[outcome.seen[int(row.request_id)].arrival.answer] if row.samples else [] for row in output.scheduled]
    return ModelRunnerOutput(token_ids=tokens, logprobs=[None] * len(tokens))
