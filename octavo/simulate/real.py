"""The same traces on a real engine core, so that a simulation can be held against it."""

import time
from collections.abc import Callable, Sequence

from octavo.engine.core import EngineCore
from octavo.messages import AddRequest
from octavo.sampling_params import SamplingParams
from octavo.simulate.outcome import Outcome, Seen
from octavo.simulate.trace import Arrival


def run_real(
    trace: Sequence[Arrival],
    core: EngineCore,
    *,
    salt: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
    tell: Callable[[int], None] = lambda num_done: None,
) -> Outcome:
    """Feeds a trace to an idle engine as its times come, without a front: what is measured is the engine alone. Another
    `salt` shares no prefix with the runs before."""
    vocab_size = core.info.spec.vocab_size
    outcome = Outcome([Seen(arrival) for arrival in trace], [])
    messages = [
        AddRequest(
            str(place),
            arrival.token_ids(vocab_size),
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=arrival.num_output),
            arrival.num_output,
            seed=0,
            priority=arrival.priority,
            tenant=arrival.tenant,
            cache_salt=salt,
        )
        for place, arrival in enumerate(trace)
    ]
    began = clock()
    added = num_done = 0
    while added < len(trace) or core.has_work:
        while added < len(trace) and trace[added].time <= clock() - began:
            core.handle(messages[added])
            added += 1
        if not core.has_work:
            wait(max(0.0, trace[added].time - (clock() - began)))
            continue
        outputs = core.step()
        outcome.take(outputs.deltas, clock() - began)
        outcome.records += outputs.records
        num_done += sum(delta.finish_reason is not None for delta in outputs.deltas)
        tell(num_done)
    return outcome
