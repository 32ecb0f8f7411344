"""How long the counting half takes per step: the real scheduler in a steady state, with all that goes with it."""

import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from octavo.config import EngineConfig
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import StepRecord
from octavo.observe.step_log import StepLog
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from octavo.scheduler.budget import Limits
from octavo.scheduler.choose import make_policy
from octavo.scheduler.cost import CostModel
from octavo.scheduler.recorder import RecordingScheduler, Ring
from octavo.scheduler.scheduler import Scheduler
from octavo.step import ModelRunnerOutput

MAX_MODEL_LEN = 4096
TYPICAL_COST = CostModel(fixed=2e-3, per_token=1e-5)  # for the policy that predicts steps


@dataclass(slots=True)
class StepTimes:
    """Seconds of each step: arrivals, schedule() with its StepRecord, update() with its deltas."""

    add: list[float] = field(default_factory=list)
    schedule: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    num_finished: int = 0

    @property
    def step(self) -> list[float]:
        """schedule() and update() of one step together."""
        return [schedule + update for schedule, update in zip(self.schedule, self.update, strict=True)]


class SchedulerBench:
    """`running` Requests decode, `waiting` wait; whoever ends is followed by another, which brings a new prompt.

    Prompts have 32 to 256 tokens and answers 50 to 150, so that with 256 running about 2.5 end in every step.
    """

    def __init__(self, config: EngineConfig, *, running: int, waiting: int, record: bool) -> None:
        num_blocks = 2 * running * (256 + 150) // config.block_size
        kv = KVCacheManager(num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        kind = RecordingScheduler if record else Scheduler
        self._folder = tempfile.TemporaryDirectory()
        self._scheduler = kind(
            kv,
            Limits(
                max_num_seqs=running, max_num_batched_tokens=config.max_num_batched_tokens, max_model_len=MAX_MODEL_LEN
            ),
            policy=make_policy(config, TYPICAL_COST),
        )
        if isinstance(self._scheduler, RecordingScheduler):
            ring = Ring(Path(self._folder.name) / "bench.jsonl", config.record_bytes)
            self._scheduler.record(ring, {})
        self._draw = random.Random(0)
        self._count = 0
        self._log = StepLog()
        self._times = StepTimes()
        for _ in range(running + waiting):
            self._scheduler.add(self._request())

    def run(self, num_steps: int) -> StepTimes:
        """Times so many steps, after as many as it takes until all rows are taken and ends are spread evenly."""
        for _ in range(300):
            self._step()
        self._times = StepTimes()
        for _ in range(num_steps):
            self._step()
        self._scheduler.close()
        self._folder.cleanup()
        return self._times

    def _step(self) -> None:
        scheduler, times = self._scheduler, self._times
        began = time.perf_counter()
        record = StepRecord(step=self._log.num_steps, time=began)
        output = scheduler.schedule()
        scheduler.fill(record, output)
        scheduled = time.perf_counter()
        result = ModelRunnerOutput(
            [[self._count & 0xFFFF] if row.samples else [] for row in output.scheduled], [None] * len(output.scheduled)
        )
        sampled = time.perf_counter()
        deltas = scheduler.update(output, result)
        record.num_finished = len(deltas) - [delta.finish_reason for delta in deltas].count(None)
        self._log.append(record)
        updated = time.perf_counter()
        new = [self._request() for _ in range(record.num_finished)]
        made = time.perf_counter()
        for request in new:
            scheduler.add(request)
        times.add.append(time.perf_counter() - made)
        times.schedule.append(scheduled - began)
        times.update.append(updated - sampled)
        times.num_finished += record.num_finished

    def _request(self) -> Request:
        draw = self._draw
        self._count += 1
        max_tokens = draw.randint(50, 150)
        return Request(
            request_id=f"r{self._count}",
            prompt_token_ids=[draw.randrange(50_000) for _ in range(draw.randint(32, 256))],
            params=SamplingParams(ignore_eos=True, max_tokens=max_tokens),
            stop_ids=frozenset(),
            max_tokens=max_tokens,
            arrival_time=time.monotonic(),
            tenant=f"t{self._count % 8}",
            priority=self._count % 3,
        )
