"""The KV memory at one moment between two steps, for whoever watches it: each block, and who holds which."""

from heapq import nlargest

import numpy as np

from octavo.messages import Holder, MemoryMap
from octavo.scheduler.recorder import runs
from octavo.scheduler.scheduler import Scheduler

MAX_HOLDERS = 256  # told one by one: those with the most blocks


def memory_map(scheduler: Scheduler, now: float) -> MemoryMap:
    """The map; `now` is on the scheduler's clock. 50,000 blocks take about 4 ms."""
    kv, pool = scheduler.kv, scheduler.kv.pool
    ages = np.maximum(int(now) - np.array(pool.touched), 0)
    ages = np.frexp(ages.astype(np.float64))[1] + ord("0")  # the exponent is the number of bits
    held = [(kv.held(request), request) for request in scheduler.holders()]
    return MemoryMap(
        block_size=kv.block_size,
        states=pool.states(),
        ages=ages.astype(np.uint8).tobytes().decode(),
        holders=[
            Holder(r.request_id, r.status, r.num_prompt_tokens, r.num_output_tokens, r.num_preemptions, runs(blocks))
            for blocks, r in nlargest(MAX_HOLDERS, held, key=lambda pair: len(pair[0]))
        ],
    )
