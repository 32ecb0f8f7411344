"""What a step costs beside the model: the engine's own share, from the StepRecords of an engine process under load.

    step = schedule + rows + native + update + publish

`schedule` and `update` are the scheduler's; `rows` is what execution takes outside the native library (host arrays,
their check, tokens back into rows); `publish` is the rest until the next step begins: encoding, the socket, the inbox.
Only steps count in which every stream decodes one token and whose successor does too.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import median

from octavo.config import EngineConfig
from octavo.engine.async_engine import AsyncEngine
from octavo.messages import StepRecord
from octavo.sampling_params import RequestOutputKind, SamplingParams

PROMPT, STEPS = 64, 160
VOCABULARY = range(1000, 30000)
SHARES = ("schedule", "rows", "update", "publish")


def split(records: Iterable[StepRecord], streams: int) -> dict[str, float]:
    """Median seconds a step by share, and `native`; empty when no step counts."""
    steady = [r for r in records if r.num_running == r.num_tokens == streams and not r.num_prefill_tokens]
    found: dict[str, list[float]] = {name: [] for name in (*SHARES, "native")}
    for record, following in pairwise(steady):
        if following.step != record.step + 1:
            continue
        inside = record.schedule_seconds + record.execute_seconds + record.update_seconds
        found["schedule"].append(record.schedule_seconds)
        found["rows"].append(record.execute_seconds - record.foreign_seconds)
        found["update"].append(record.update_seconds)
        found["publish"].append(following.time - record.time - inside)
        found["native"].append(record.foreign_seconds)
    return {name: median(values) for name, values in found.items() if values}


async def run(options: Mapping[str, object], streams: int) -> dict[str, float]:
    """Streams tokens from an engine process of its own and splits its steps; `options` are fields of EngineConfig."""
    engine = await AsyncEngine.start(EngineConfig.from_kwargs(**options))
    records: list[StepRecord] = []
    engine.metrics.on_steps = records.extend  # type: ignore[method-assign, assignment]
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    draw = random.Random(0)

    async def stream(number: int) -> None:
        prompt = draw.choices(VOCABULARY, k=PROMPT)
        async for _ in engine.generate(prompt, params, f"stream-{number}"):
            pass

    try:
        await asyncio.gather(*(stream(number) for number in range(streams)))
    finally:
        await engine.shutdown()
    return split(records, streams)
