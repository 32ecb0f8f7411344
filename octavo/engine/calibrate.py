"""Measures what steps cost on this machine, with this model, by running some: prompts alone, batches that decode, both
together. The requests are random tokens that share nothing, and leave nothing in the prefix cache.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from octavo.engine.core import EngineCore
from octavo.engine.record import start_recording
from octavo.messages import AbortRequests, AddRequest, StepRecord
from octavo.observe.step_log import StepLog
from octavo.sampling_params import SamplingParams
from octavo.scheduler.copying import CopyChoice
from octavo.scheduler.cost import StepWork, fit, typical
from octavo.scheduler.door import Door
from octavo.scheduler.slo import SloPolicy

log = logging.getLogger("octavo.engine")
START_SECONDS = 1.0  # of the start, where something needs a cost model
NUM_NEW = 6  # tokens each calibration request generates: one from its prompt, the others step by step
LONGEST = 4096  # tokens of a prompt
BATCH = 2048  # prompt tokens of several requests at once: none may take all the time there is


def prepare(core: EngineCore, *, serving: bool = False) -> None:
    """Gives what decides by the cost of steps a model of it, booking the time among the start's phases; then begins the
    recording, if there is to be one."""
    policy, host = core.scheduler.policy, core.scheduler.kv.host
    if isinstance(policy, SloPolicy) or host.num_blocks:
        began = time.monotonic()
        cost = fit(typical(timed_steps(core, seconds=START_SECONDS)))
        if isinstance(policy, SloPolicy):
            policy.cost = cost
        if host.num_blocks:
            cost = replace(cost, per_copy=core.info.host_copy_seconds)
            core.copies = CopyChoice(cost, core.config.block_size, len(core.info.kv_windows))
            host.saves = core.copies.saves
            log.info("%s", core.copies)
        core.info.timings["calibrate"] = time.monotonic() - began
    path = start_recording(core, serving=serving)
    core.record = None if path is None else str(path)


def timed_steps(
    core: EngineCore, *, seconds: float, tell: Callable[[float], None] = lambda share: None
) -> list[tuple[StepWork, float]]:
    """What steps of an idle engine did and took, scheduling included, in at most about `seconds`; not the first two
    (cold caches). `tell` hears the share that is done."""
    kv, log = core.scheduler.kv, core.log
    caching, kv.enable_prefix_caching, core.log = kv.enable_prefix_caching, False, StepLog()
    door, core.scheduler.door = core.scheduler.door, Door()  # without bounds, and the real one learns no pace
    records: list[StepRecord] = []
    began = time.monotonic()
    try:
        for number, requests in enumerate(_batches(core)):
            for request in requests:
                core.handle(request)
            while core.has_work and (spent := time.monotonic() - began) < seconds:
                records += core.step().records
                tell(min(spent / seconds, 1.0))
            core.handle(AbortRequests([request.request_id for request in requests]))
            while core.has_work:
                core.step()
            if time.monotonic() - began >= seconds and number:
                break
    finally:
        kv.enable_prefix_caching, core.log, core.scheduler.door = caching, log, door
    tell(1.0)
    return [(StepWork.of(r), r.schedule_seconds + r.execute_seconds + r.update_seconds) for r in records[2:]]


def _batches(core: EngineCore) -> Iterator[list[AddRequest]]:
    """Ever other numbers of requests and lengths, drawn evenly on a logarithmic scale from one to what fits."""
    draw = random.Random(0)
    config, spec = core.config, core.info.spec
    num_slots = core.info.plan.num_tokens
    longest = max(1, min(LONGEST, spec.max_model_len - NUM_NEW, num_slots - NUM_NEW))
    number = 0
    few = min(16, longest)
    sizes = [(1, longest), (config.max_num_seqs, few), (1, few)]  # the last is first: it warms up
    while True:
        rows, length = sizes.pop() if sizes else (_even(draw, 1, config.max_num_seqs), _even(draw, 1, longest))
        rows = max(1, min(rows, max(BATCH // length, 1), num_slots // (length + NUM_NEW + config.block_size)))
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=NUM_NEW)
        batch = []
        for _ in range(rows):
            ids = [draw.randrange(spec.vocab_size) for _ in range(max(1, int(length * draw.uniform(0.5, 1.0))))]
            batch.append(AddRequest(f"calibration-{number}", ids, params, NUM_NEW, seed=0))
            number += 1
        yield batch


def _even(draw: random.Random, low: int, high: int) -> int:
    return min(high, int(low * (high / low) ** draw.random() + 0.5))
