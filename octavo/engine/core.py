"""The engine's loop: drain the inbox, schedule, launch, sample, update, publish.

Up to `depth` steps are in flight. Depth 1 is one step after the other. At depth 2 (a GPU) a step is scheduled and
launched while the one before it runs; the tokens between them stay on the device.

The same loop runs in the engine process (process.py) and in the caller's own (llm.py); only the way messages come and
go differs.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from octavo import messages
from octavo.config import EngineConfig
from octavo.engine.memory_map import memory_map
from octavo.engine.rules import RuleBook
from octavo.errors import OctavoError, QueueFullError
from octavo.executor.local import LocalExecutor, StepResult
from octavo.kvcache.eviction import EVICTIONS
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import AddRequest, RequestDelta, StepOutputs, StepRecord, ToEngine
from octavo.observe.step_log import StepLog
from octavo.request import FinishReason, Request, answer_ids
from octavo.scheduler.budget import Limits
from octavo.scheduler.choose import make_policy
from octavo.scheduler.copying import CopyChoice
from octavo.scheduler.cost import StepWork
from octavo.scheduler.recorder import RecordingScheduler
from octavo.scheduler.scheduler import Scheduler
from octavo.step import SchedulerOutput
from octavo.structs import Struct
from octavo.worker.worker import WorkerInfo

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

log = logging.getLogger("octavo.engine")
OPENING_SECONDS = 0.0005  # between two looks at rules that are being made


class _InFlight(Struct, gc=False):
    output: SchedulerOutput
    record: StepRecord
    result: StepResult


class EngineCore:
    """Scheduler and executor, joined. `handle` takes messages, `step` makes progress and returns what to publish."""

    def __init__(
        self,
        config: EngineConfig,
        executor: LocalExecutor,
        info: WorkerInfo,
        *,
        depth: int | None = None,
        default_queue: int = 0,
        tokenizer: Callable[[], Tokenizer | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            depth: most steps in flight; by default what the workers can, and 1 without --async-scheduling.
            default_queue: requests that may wait where the config does not say; 0 for no bound.
            tokenizer: loads the model's, when the first grammar needs it.
            clock: seconds, monotonic.
        """
        self.config = config
        self.info = info
        self._clock = clock
        self.log = StepLog()
        self._executor = executor
        self._depth = depth or (info.max_depth if config.async_scheduling else 1)
        self._in_flight: deque[_InFlight] = deque()
        self.record: str | None = None  # where the scheduler is recorded
        self.copies: CopyChoice | None = None  # whether what the pool gives up is copied to host memory
        self._done_at = 0.0  # when the last result came
        self.announce: Callable[[StepOutputs], None] | None = None  # called before a suspect runs alone
        self._pending: list[RequestDelta] = []  # of requests that ended outside a step
        self._memory: messages.MemoryMap | None = None  # somebody has asked for
        self._secluded: str | None = None  # a beam search that has the engine for itself until it ends
        self._held: deque[tuple[float, AddRequest]] = deque()  # since when, what waits for that
        self._eos_ids = frozenset(info.spec.eos_token_ids)
        self._rules = RuleBook(info.spec.vocab_size, info.spec.eos_token_ids, tokenizer)
        key = config.prefix_caching_hash_key
        kv = KVCacheManager(
            num_blocks=info.plan.num_blocks,
            block_size=config.block_size,
            windows=info.kv_windows,
            step_tokens=config.max_step_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            hash_key=key.encode() if key is not None else secrets.token_bytes(32),
            eviction=EVICTIONS[config.prefix_eviction_policy](),
            num_host_blocks=info.plan.num_host_blocks,
        )
        kind = Scheduler if config.record == "off" else RecordingScheduler
        self.scheduler = kind(
            kv,
            Limits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=info.spec.max_model_len,
                long_prefill_token_threshold=config.long_prefill_token_threshold,
                max_run_ahead=self._depth - 1,
                admission_headroom=config.admission_headroom,
                max_num_queued_reqs=default_queue if config.max_num_queued_reqs is None else config.max_num_queued_reqs,
                max_num_queued_tokens=config.max_num_queued_tokens,
            ),
            policy=make_policy(config),
            clock=clock,
        )

    def ready(self) -> messages.EngineReady:
        """What the front is told once the engine can answer."""
        plan = self.info.plan
        return messages.EngineReady(
            num_blocks=plan.num_blocks,
            block_size=self.config.block_size,
            max_model_len=self.info.spec.max_model_len,
            vocab_size=self.info.spec.vocab_size,
            generation_defaults=self.info.spec.generation_defaults,
            weight_bytes=plan.weight_bytes,
            kv_bytes=plan.kv_bytes,
            runtime=self.info.runtime,
            dtype=self.info.dtype,
            kv_cache_dtype=plan.kv_dtype,
            timings=self.info.timings,
            plan=plan.describe(),
            record=self.record,
            num_kv_groups=len(self.info.kv_windows),
        )

    @property
    def has_work(self) -> bool:
        """True while step() has something to do or to publish."""
        return bool(self._pending or self._held or self._memory) or self._is_busy

    def handle(self, message: ToEngine) -> None:
        """Takes one message from the front; it acts at the next step."""
        if isinstance(message, AddRequest):
            if self._secluded:
                self._hold(message)
            else:
                self._let_in(message)
        elif isinstance(message, messages.AbortRequests):
            for request_id in message.request_ids:
                if self._rules.forget(request_id):
                    self._pending.append(RequestDelta(request_id, finish_reason=FinishReason.ABORT))
                self._pending.extend(self._abort_held(request_id) or self.scheduler.abort(request_id))
        elif isinstance(message, messages.FinishRequest):
            self._rules.forget(message.request_id)
            self.scheduler.finish(message.request_id, message.num_kept)
        elif isinstance(message, messages.AskMemory):
            self._memory = memory_map(self.scheduler, self._clock())

    def step(self) -> StepOutputs:
        """Launches a step if there is room in flight, else waits for the oldest; returns what happened since."""
        if self._secluded and not self._is_busy:
            self._secluded = None
            while self._held and not self._secluded:
                since, held = self._held.popleft()
                waited = self._clock() - since
                self._let_in(replace(held, timeout=None if held.timeout is None else max(0.0, held.timeout - waited)))
        for message, error in self._rules.opened() if self._rules.opening else ():
            if error is None:
                self._add(message)
            else:
                self._pending.append(_failed(message.request_id, str(error), type(error).__name__))
        if self.scheduler.door.deadlines:
            self._pending.extend(self.scheduler.expire())
        launched = len(self._in_flight) < self._depth and self._launch()
        records: list[StepRecord] = []
        if self._in_flight and (len(self._in_flight) == self._depth or not launched):
            records += self._finish_oldest()
        if not (records or launched or self._pending) and self._rules.opening:
            time.sleep(OPENING_SECONDS)  # nothing else to do
        deltas, self._pending = self._pending, []
        if self._rules.live:
            self._rules.forget_finished(deltas)
        memory, self._memory = self._memory, None
        return StepOutputs(deltas, records, memory)

    def close(self) -> None:
        """Ends the workers."""
        self._rules.close()
        self.scheduler.close()
        self._executor.close()

    @property
    def _is_busy(self) -> bool:
        return bool(self._in_flight or self._rules.opening or self.scheduler.has_unfinished)

    def _let_in(self, message: AddRequest) -> None:
        """Begins a request. A beam search that ran when an engine died is followed by nobody until it has ended: it
        tells nothing before, so it cannot be cleared by a token as the others are."""
        if message.runs_alone and message.params.use_beam_search:
            self._secluded = message.request_id
        if message.params.has_rules or message.grammar or message.think_ids:
            self._rules.open(message)
        else:
            self._add(message)

    def _hold(self, message: AddRequest) -> None:
        """Keeps what comes meanwhile, as far as the queue would."""
        num_tokens = sum(len(held.prompt_token_ids) for _, held in self._held)
        try:
            if not message.runs_alone:  # that one was let in before
                self.scheduler.door.check(len(self._held), num_tokens, len(message.prompt_token_ids), self._clock())
        except QueueFullError as error:
            self._refuse(message, error)
        else:
            self._held.append((self._clock(), message))

    def _refuse(self, message: AddRequest, error: Exception) -> None:
        for name in answer_ids(message.request_id, message.params):
            refusal = _failed(name, str(error), type(error).__name__)
            refusal.retry_after = error.retry_after if isinstance(error, QueueFullError) else 0.0
            self._pending.append(refusal)

    def _abort_held(self, request_id: str) -> list[RequestDelta]:
        held = next((item for item in self._held if item[1].request_id == request_id), None)
        if held is None:
            return []
        self._held.remove(held)
        return [RequestDelta(name, finish_reason=FinishReason.ABORT) for name in answer_ids(request_id, held[1].params)]

    def _add(self, message: AddRequest) -> None:
        params = message.params
        eos_ids = frozenset() if params.ignore_eos or message.pooling else self._eos_ids
        now = self._clock()
        request = Request(
            request_id=message.request_id,
            prompt_token_ids=message.prompt_token_ids,
            params=params,
            stop_ids=eos_ids | frozenset(params.stop_token_ids or ()),
            max_tokens=message.max_tokens,
            arrival_time=now,
            seed=message.seed,
            priority=message.priority,
            tenant=message.tenant,
            weight=message.weight,
            deadline=None if message.timeout is None else now + message.timeout,
            cache_salt=message.cache_salt,
            fork_of=message.fork_of if self.config.enable_copy_on_write else None,
            has_grammar=message.grammar is not None,
            pooling=message.pooling,
            reads_prompt=not message.output_token_ids
            and (message.pooling == "mean" or params.prompt_logprobs is not None),
            retry_alone=message.runs_alone,
        )
        request.token_ids += message.output_token_ids
        try:
            self.scheduler.add(request)
        except Exception as error:  # the front checked it; whatever is left ends this request and no other
            if not isinstance(error, OctavoError):
                log.exception("request %s cannot be added", message.request_id)
            self._refuse(message, error)

    def _launch(self) -> bool:
        record = StepRecord(step=self.log.num_steps + len(self._in_flight), time=self._clock())
        output = self.scheduler.schedule()
        if not output.scheduled:
            return False
        self.scheduler.fill(record, output)
        if self.announce and (self._secluded or self.scheduler.suspects) and (alone := self._alone(output)):
            self.announce(StepOutputs([RequestDelta(alone, alone=True)], []))
        scheduled_at = self._clock()
        record.schedule_seconds = scheduled_at - record.time
        self._executor.execute(output)
        result = self._executor.sample(self._rules.masks(output) if self._rules.live else None)
        record.launch_seconds = record.execute_seconds = self._clock() - scheduled_at
        self._in_flight.append(_InFlight(output, record, result))
        return True

    def _alone(self, output: SchedulerOutput) -> str | None:
        """Whom an engine that dies of this step died of. A beam search counts only where it is alone to its end."""
        if self._secluded or len(output.scheduled) > 1:
            return self._secluded
        suspect = self.scheduler.suspects.get(output.scheduled[0].request_id)
        return suspect.request_id if suspect and not suspect.params.use_beam_search else None

    def _finish_oldest(self) -> list[StepRecord]:
        oldest = self._in_flight.popleft()
        record = oldest.record
        waiting_since = self._clock()
        try:
            result = oldest.result()
        except Exception as error:
            return self._fail_all(oldest, f"{type(error).__name__}: {error}")
        done_at = self._clock()
        record.execute_seconds += done_at - waiting_since
        record.foreign_seconds, record.num_foreign_calls = result.foreign_seconds, result.num_foreign_calls
        deltas = self.scheduler.update(oldest.output, result)
        record.num_sampled = sum(map(len, result.token_ids))
        for delta in deltas:
            if delta.finish_reason is not None:
                record.num_finished += 1
        if self.copies is not None:
            self._follow_costs(self.copies, StepWork.of(record), done_at - max(record.time, self._done_at))
        self._done_at = done_at
        record.update_seconds = self._clock() - done_at
        self._pending.extend(deltas)
        for request_id, reason in self._rules.take(deltas) if self._rules.live else ():
            if self.scheduler.abort(request_id):
                self._pending.append(_failed(request_id, str(reason), type(reason).__name__))
        self.log.append(record)
        return [record]

    def _follow_costs(self, copies: CopyChoice, work: StepWork, seconds: float) -> None:
        host = self.scheduler.kv.host
        saved, host.saves = host.saves, copies.learn(work, seconds)
        if saved != host.saves:
            log.info("%s", copies)

    def _fail_all(self, failed: _InFlight, error: str) -> list[StepRecord]:
        """The step failed, and so does every later one, whatever became of it: it was computed from this one's."""
        steps = [failed, *self._in_flight]
        self._in_flight.clear()
        for later in steps[1:]:
            with suppress(Exception):  # waits, so that nothing is in flight when the Requests start over
                later.result()
        for step in steps:
            step.record.num_failed = len(step.output.scheduled)
            self._pending.extend(self.scheduler.fail(step.output, error))
            self.log.append(step.record)
        return [step.record for step in steps]


def _failed(request_id: str, message: str, kind: str | None = None) -> RequestDelta:
    return RequestDelta(request_id, finish_reason=FinishReason.ERROR, error=message, error_kind=kind)
