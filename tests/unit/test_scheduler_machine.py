"""Random walks over scheduler and KV cache, with steps in flight and steps that fail; every invariant after every
step. The fake executor checks what each Request attends to; here: the counts, and that tokens equal a naive loop."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
from fake import FakeExecutor, kv_in, kv_of, make_request, naive
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from invariants import check_kv

from octavo.errors import ContextLengthError, QueueFullError, TimeLimitError
from octavo.kvcache.block_hash import BlockHasher
from octavo.kvcache.eviction import EVICTIONS
from octavo.kvcache.manager import GONE, KVCacheManager
from octavo.messages import RequestDelta, StepRecord
from octavo.request import Request, RequestStatus
from octavo.scheduler.budget import Limits
from octavo.scheduler.cost import CostModel
from octavo.scheduler.fair import FairPolicy
from octavo.scheduler.policies import FcfsPolicy, Policy, PriorityPolicy
from octavo.scheduler.recorder import RecordingScheduler, Ring
from octavo.scheduler.scheduler import Scheduler
from octavo.scheduler.slo import SloPolicy
from octavo.simulate.replay import Replay

KEY = b"machine"
WINDOWS = [(0,), (0,), (0, 3), (0, 1, 6), (2,), (0, 5, 5, 40), (7, 7)]  # per KV group
STOP_IDS = frozenset({3})
STEP_COST = CostModel(fixed=1.0, per_token=0.5, per_row=0.1, per_position=0.01, per_pair=0.01)
POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FcfsPolicy,
    "priority": lambda: PriorityPolicy(ageing_seconds=5.0),
    "fair": FairPolicy,
    "slo": lambda: SloPolicy(ttft=20.0, itl=4.0, cost=STEP_COST),
}


class SchedulerMachine(RuleBasedStateMachine):
    """add, abort, finish, launch a step, take a result, let a step fail."""

    ids = Bundle("ids")

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        extra_budget=st.integers(0, 20),
        spare_len=st.integers(-3, 5),
        threshold=st.sampled_from([0, 0, 0, 1, 3, 5]),
        caching=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 4),
        runs_ahead=st.booleans(),
        policy=st.sampled_from(list(POLICIES)),
        headroom=st.sampled_from([0.0, 0.0, 0.5, 2.0]),
        eviction=st.sampled_from(list(EVICTIONS)),
        max_queued=st.sampled_from([0, 0, 0, 1, 5]),
        record_bytes=st.sampled_from([0, 0, 4_000, 1 << 20]),
        windows=st.sampled_from(WINDOWS),
        num_host_blocks=st.sampled_from([0, 0, 1, 4, 30]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        extra_budget: int,
        spare_len: int,
        threshold: int,
        caching: bool,
        depth: int,
        runs_ahead: bool,
        policy: str,
        headroom: float,
        eviction: str,
        max_queued: int,
        record_bytes: int,
        windows: tuple[int, ...],
        num_host_blocks: int,
    ) -> None:
        num_blocks *= len(windows)
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_seqs + extra_budget
        self.threshold = threshold
        self.kv = KVCacheManager(
            num_blocks,
            block_size,
            windows,
            min(threshold or self.budget, self.budget),
            enable_prefix_caching=caching,
            hash_key=KEY,
            eviction=EVICTIONS[eviction](),
            num_host_blocks=num_host_blocks,
        )
        self.max_model_len = max_model_len = max(2, num_blocks * block_size + 1 + spare_len)
        self.depth = depth
        self.now = 0.0
        self.recording = (Path(tempfile.mkdtemp()) / "walk.jsonl") if record_bytes else None
        self.scheduler = (RecordingScheduler if self.recording else Scheduler)(
            self.kv,
            Limits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=self.budget,
                max_model_len=max_model_len,
                long_prefill_token_threshold=threshold,
                max_run_ahead=depth - 1 if runs_ahead else 0,
                admission_headroom=headroom,
                max_num_queued_reqs=max_queued,
            ),
            policy=POLICIES[policy](),
            clock=lambda: self.now,
        )
        self.max_queued = max_queued
        if isinstance(self.scheduler, RecordingScheduler) and self.recording:
            self.scheduler.record(Ring(self.recording, record_bytes), {"block_size": block_size})
        self.executor = FakeExecutor(num_blocks, block_size, windows, num_host_blocks)
        self.num_updates = 0
        self.live: dict[str, Request] = {}
        self.received: dict[str, list[int]] = {}
        self.meaning: dict[bytes, list[int]] = {}  # digest -> the KV that a block under it must hold

    # ------------------------------------------------------------------------------------------------ what happens

    @rule(
        target=ids,
        names=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4, unique=True),
        family=st.sampled_from([0, 0, 1]),
        shared=st.integers(0, 14),
        tail=st.lists(st.integers(0, 2), max_size=3),
        max_tokens=st.integers(1, 16),
        min_tokens=st.integers(0, 4),
        stops=st.booleans(),
        waits=st.booleans(),
        salt=st.sampled_from([None, None, "tenant"]),
        forks=st.booleans(),
        priority=st.integers(-2, 2),
        tenant=st.sampled_from("abc"),
        timeout=st.sampled_from([None, None, None, 3.0, 30.0]),
    )
    def add(
        self,
        names: list[str],
        family: int,
        shared: int,
        tail: list[int],
        max_tokens: int,
        min_tokens: int,
        stops: bool,
        waits: bool,
        salt: str | None,
        forks: bool,
        priority: int,
        tenant: str,
        timeout: float | None,
    ) -> MultipleResults[str]:
        """One prompt for all these names. An id that has ended may come back while old steps are in flight."""
        prompt = ([family] * shared + tail or [family])[: self.max_model_len]
        for name in names:
            if name not in self.live:
                request = make_request(
                    name,
                    prompt,
                    max_tokens,
                    stop_ids=STOP_IDS if stops else frozenset(),
                    min_tokens=min(min_tokens, max_tokens),
                    cache_salt=salt,
                    needs_host_token=waits,
                    fork_of=names[0] if forks and name != names[0] else None,
                    priority=priority,
                    tenant=tenant,
                    weight=2.0 if tenant == "b" else 1.0,
                    arrival=self.now,
                    timeout=timeout,
                )
                self.add_one(request)
        return multiple(*names)

    def add_one(self, request: Request) -> None:
        name, prompt, max_tokens = request.request_id, request.prompt_token_ids, request.max_tokens
        positions = min(len(prompt) + max_tokens, self.max_model_len) - 1
        fits = self.kv.most_blocks(positions) <= self.kv.pool.num_blocks
        try:
            self.scheduler.add(request)
        except ContextLengthError:
            assert len(prompt) >= self.max_model_len or not fits
            return
        except QueueFullError:
            assert self.scheduler.num_waiting >= self.max_queued > 0
            return
        assert not self.max_queued or self.scheduler.num_waiting <= self.max_queued
        assert len(prompt) < self.max_model_len
        assert fits
        self.live[name] = request
        self.received[name] = []
        self.executor.guilty.discard(name)
        self.learn(request)

    def learn(self, request: Request) -> None:
        """What each block of this Request must hold, whoever reads it."""
        hasher, size = BlockHasher(self.kv.block_size, KEY), self.kv.block_size
        token_ids = request.prompt_token_ids + naive(request.prompt_token_ids, request.max_tokens)[0]
        values = kv_of(token_ids)
        digests = hasher.chain(hasher.root(request.cache_salt), token_ids)
        for start, digest in zip(range(0, len(token_ids), size), digests, strict=False):
            for group in range(len(self.executor.windows)):
                own = [kv_in(group, value) for value in values[start : start + size]]
                self.meaning[digest + bytes([group][:group])] = own

    @rule(name=ids)
    def abort(self, name: str) -> None:
        deltas = self.scheduler.abort(name)
        assert [d.finish_reason for d in deltas] == (["abort"] if self.live.pop(name, None) else [])

    @rule(name=ids, kept=st.integers(0, 16))
    def finish(self, name: str, kept: int) -> None:
        request = self.live.pop(name, None)
        self.scheduler.finish(name, kept)
        if request:
            assert request.status is RequestStatus.FINISHED
            assert request.output_token_ids == self.received[name][:kept]

    @rule(name=ids, always=st.booleans())
    def go_wrong(self, name: str, always: bool) -> None:
        """The next step fails, or from now on every step with this Request."""
        if not always:
            self.executor.fail_next = True
        elif name in self.live:
            self.executor.guilty.add(name)

    @rule(saves=st.booleans())
    def choose_copies(self, saves: bool) -> None:
        """From now on copies to host memory pay, or do not."""
        self.scheduler.kv.host.saves = saves

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.engine_step()

    @precondition(lambda self: self.executor.results)
    @rule()
    def take_one_result(self) -> None:
        self.take_result()

    # ---------------------------------------------------------------------------------------------- engine, checked

    def engine_step(self) -> None:
        """EngineCore.step(), a second later."""
        self.now += 1.0
        for delta in self.scheduler.expire():
            self.take_delta(delta)
        launched = len(self.executor.results) < self.depth and self.launch()
        if self.executor.results and (len(self.executor.results) == self.depth or not launched):
            self.take_result()

    def launch(self) -> bool:
        output = self.scheduler.schedule()
        self.check_counts()
        if not output.scheduled:
            assert self.executor.results or not self.live, "work to do, nothing in flight, and nothing scheduled"
            return False
        record = StepRecord(step=output.step, time=0.0)
        self.scheduler.fill(record, output)
        self.filled(record)
        assert record.num_tokens <= self.budget
        assert (
            record.num_prefill_tokens + sum(i.samples and i.fork_of < 0 for i in output.scheduled) == record.num_tokens
        )
        assert record.num_free_blocks + record.num_cached_blocks + record.num_used_blocks == self.kv.pool.num_blocks
        for item in output.scheduled:
            assert 0 <= item.row < self.max_num_seqs
            assert (item.fork_of < 0) <= item.num_tokens <= (self.threshold or self.budget)
            request = self.live[item.request_id]
            ahead = request.num_pending - item.samples
            assert ahead <= (min(self.depth - 1, 1) if request.stop_ids else self.depth - 1)
            assert not (ahead and request.needs_host_token)
            assert item.start + item.num_tokens < len(request.prompt_token_ids) + request.max_tokens
            assert request.deadline is None or request.deadline > self.now
            if request.retry_alone:
                assert len(output.scheduled) == 1
                assert not self.executor.results
        self.executor.execute(output)
        return True

    def filled(self, record: StepRecord) -> None:
        """For who counts (tools/soak_scheduler.py)."""

    def replayed(self, num_steps: int) -> None:
        """For who counts."""

    def take_result(self) -> None:
        output, result = self.executor.results.popleft()
        if result is None:
            deltas = self.scheduler.fail(output, "boom")
        else:
            self.num_updates += 1
            deltas = self.scheduler.update(output, result)
        for delta in deltas:
            self.take_delta(delta)
        self.check_counts()

    def take_delta(self, delta: RequestDelta) -> None:
        request, received = self.live[delta.request_id], self.received[delta.request_id]
        received.extend(delta.token_ids)
        expected, reason = naive(
            request.prompt_token_ids,
            request.max_tokens,
            self.max_model_len,
            request.stop_ids,
            request.params.min_tokens,
        )
        assert received == expected[: len(received)]
        if delta.finish_reason is None:
            assert len(received) < len(expected)
            return
        del self.live[delta.request_id]
        if delta.error_kind == TimeLimitError.__name__:
            assert request.deadline is not None
            assert request.deadline <= self.now
        elif delta.finish_reason == "error":
            assert delta.error == "boom"
            assert request.retry_alone, "an error without a second chance"
        else:
            assert (received, delta.finish_reason) == (expected, reason)

    # ---------------------------------------------------------------------------------------------------- invariants

    def check_counts(self) -> None:
        """Every block is in one place, and reference counts equal the tables."""
        assert set(self.live) == set(self.scheduler._requests)
        check_kv(self.kv, set(self.live))
        for request in self.live.values():
            ids = [block for table in self.kv._tables[request.request_id].block_ids for block in table if block != GONE]
            most = max(request.num_tokens + request.num_pending, request.num_computed_tokens)
            assert len(ids) <= self.kv.most_blocks(most), "a window keeps more than it sees"

    @invariant()
    def pending_tokens_are_in_flight(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        coming = Counter(
            item.request_id
            for output, _ in self.executor.results
            for item in output.scheduled
            if item.samples and item.request_id in self.live and item.epoch == self.live[item.request_id].epoch
        )
        # an id that came back has the old one's epoch 0, and only its own steps count
        for name, request in self.live.items():
            own = sum(request in step.requests for step in self.scheduler._in_flight.values())
            assert request.num_pending <= min(coming[name], own)
            assert request.num_pending == 0 or request.status is RequestStatus.RUNNING

    @invariant()
    def rows_are_unique(self) -> None:
        assert all(r.num_computed_tokens <= r.num_slots for r in self.scheduler._rows.running.values())
        if not hasattr(self, "scheduler"):
            return
        rows = [r.row for r in self.live.values() if r.status is RequestStatus.RUNNING]
        assert not any(r.num_computed_tokens for r in self.live.values() if r.status is not RequestStatus.RUNNING)
        assert sorted(rows + self.scheduler._rows.free) == list(range(self.max_num_seqs))
        assert self.scheduler.num_running == len(rows)
        assert self.scheduler.num_waiting == len(self.live) - len(rows)

    @invariant()
    def hashed_blocks_hold_what_their_hash_says(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.executor.failing:
            return  # what the failed steps hashed is taken back when their results come
        size = self.kv.block_size
        coming = {target for _, target in self.kv.host.copies}  # planned, for the next step
        for digest, block in (*self.kv.pool._holders.items(), *self.kv.host._blocks.items()):
            if block in coming:
                continue
            assert self.executor.slots[block * size : (block + 1) * size] == self.meaning[digest]

    def teardown(self) -> None:
        """Whatever is left ends within a bounded number of steps, and gives everything back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.scheduler.has_unfinished and not self.executor.results:
                break
            self.engine_step()
        assert not self.live, f"never finished: {self.live}"
        assert self.kv.pool.num_used == 0
        assert sorted(self.scheduler._rows.free) == list(range(self.max_num_seqs))
        if self.recording is not None:
            self.scheduler.close()
            replay = Replay(self.recording)
            assert replay.run() is None
            is_whole = not self.recording.with_name(self.recording.name + ".1").exists()
            assert not is_whole or len(replay.steps) == self.num_updates
            self.replayed(len(replay.steps))
            shutil.rmtree(self.recording.parent)


SchedulerMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
)
TestScheduler = SchedulerMachine.TestCase
