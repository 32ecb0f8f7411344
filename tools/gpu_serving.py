"""What gpu_check measures of serving: arrivals over time, the engine behind its channel, whether tokens are right."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Result = Callable[..., None]
MARGIN = {"bfloat16": 0.03, "fp8": 0.1}  # of the largest logit: what the type of KV may turn around
LEAST_AGREEMENT = 0.99


def host_times(records: list[Any]) -> dict[str, float]:
    """Median milliseconds that the host works for a step (it waits for nothing in them), decodes and mixed steps."""

    def median(chosen: list[Any]) -> float:
        spent = [r.schedule_seconds + r.launch_seconds + r.update_seconds for r in chosen]
        return statistics.median(spent) * 1e3 if spent else 0.0

    mixed = [r for r in records if r.num_prefill_tokens and r.num_tokens - r.num_prefill_tokens > 1]
    return {
        "host_decode_ms": median([r for r in records if not r.num_prefill_tokens]),
        "host_mixed_ms": median(mixed),
        "mixed_steps": len(mixed),
    }


def check_tokens(llm: Any, name: str, work: Any, outputs: list[Any], result: Result) -> None:
    """Eight requests again, the whole sequence at once and without graphs: how often is their token the likeliest?

    Raises:
        AssertionError: too seldom, where the margin is clear; or it is clear nowhere, which shows nothing.
    """
    runtime = llm._executor.worker.runtime
    margin = MARGIN.get(llm.config.kv_cache_dtype, MARGIN["bfloat16"])
    graphs, runtime._graphs = runtime._graphs, None
    agreed = clear = total = 0
    try:
        for index in np.linspace(0, len(outputs) - 1, min(8, len(outputs))).astype(int):
            for logits, chosen in _teacher_forced(llm, work.requests[index][0], outputs[index].outputs[0].token_ids):
                best, ids_of_best = logits.topk(2, 1)
                is_clear = best[:, 0] - best[:, 1] > margin * logits.abs().max()
                agreed += int((is_clear & (ids_of_best[:, 0] == chosen)).sum())
                clear += int(is_clear.sum())
                total += len(chosen)
    finally:
        runtime._graphs = graphs
    agree = agreed / max(clear, 1)
    result(f"{name} teacher-forced", tokens=total, clear=clear, agree=agree, margin=margin)
    assert clear > 0, "no token is clearly the likeliest: this shows nothing"
    assert agree >= LEAST_AGREEMENT, f"{agreed} of {clear} clear tokens agree with the eager steps: too few"


def _teacher_forced(llm: Any, prompt: list[int], tokens: Sequence[int]) -> Iterator[tuple[Any, Any]]:
    """(logits, token that was chosen) in pieces of as many rows as a step may sample."""
    import torch

    from lab.teacher import one_request
    from octavo.runtime.base import SamplingInputs

    runtime, most_rows = llm._executor.worker.runtime, llm.config.max_num_seqs
    ids = np.array([*prompt, *tokens[:-1]], np.int32)
    for first in range(len(prompt) - 1, len(ids), most_rows):
        end = min(first + most_rows, len(ids))
        runtime.execute(one_request(ids[:end], first_logits=first, block_size=llm.config.block_size))
        runtime.sample(SamplingInputs.greedy(end - first))
        logits = runtime._logits_on_device().float()
        yield logits, torch.tensor(tokens[first - len(prompt) + 1 : end - len(prompt) + 1], device=logits.device)


def poisson(llm: Any, shape: str, work: Any, rate: float, result: Result) -> None:
    """G6: the requests of G1 arriving at `rate` a second; gaps between tokens, and the host's share of mixed steps."""
    from octavo import SamplingParams
    from octavo.messages import AddRequest

    rng, arrivals = random.Random(0), [0.0]
    for _ in work.requests[1:]:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    todo = [
        (at, AddRequest(str(i), prompt, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n), n, seed=i))
        for i, (at, (prompt, n)) in enumerate(zip(arrivals, work.requests, strict=True))
    ]
    core, first_step = llm.core, llm.core.log.num_steps
    waits: list[float] = []
    gaps: list[float] = []
    seen: dict[str, float] = {}
    start = time.perf_counter()
    while todo or core.has_work:
        now = time.perf_counter() - start
        while todo and todo[0][0] <= now:
            core.handle(todo.pop(0)[1])
        deltas = core.step().deltas if core.has_work else []
        now = time.perf_counter() - start
        for delta in deltas:
            if delta.request_id in seen:
                gaps += [now - seen[delta.request_id]] * len(delta.token_ids)
            else:
                waits.append(now - arrivals[int(delta.request_id)])
            seen[delta.request_id] = now
    seconds = time.perf_counter() - start
    records = list(core.log)[-min(core.log.num_steps - first_step, len(core.log)) :]
    itl, ttft = np.array(gaps) * 1e3, np.array(waits) * 1e3
    result(
        f"{shape} G6 arrivals", rate=rate, out_tok_s=work.num_out / seconds, itl_p50_ms=float(np.median(itl)),
        itl_p99_ms=float(np.percentile(itl, 99)), itl_max_ms=float(itl.max()), ttft_p50_ms=float(np.median(ttft)),
        ttft_p99_ms=float(np.percentile(ttft, 99)), **host_times(records),
        longest_launch_ms=max(r.launch_seconds for r in records) * 1e3,
    )  # fmt: skip


def through_the_channel(model: str, settings: dict[str, Any], shape: str, work: Any, result: Result) -> None:
    """G1 through AsyncEngine: another process, its messages, one stream a request."""
    from octavo import AsyncEngine, SamplingParams
    from octavo.config import EngineConfig
    from octavo.sampling_params import RequestOutputKind

    async def one(engine: Any, number: int, prompt: list[int], count: int) -> int:
        kind = RequestOutputKind.DELTA
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count, output_kind=kind)
        stream = engine.generate({"prompt_token_ids": prompt}, params, f"{number}")
        return sum([len(output.outputs[0].token_ids) async for output in stream])

    async def measure() -> None:
        engine = await AsyncEngine.start(EngineConfig(model=model, **settings))
        await asyncio.gather(*(one(engine, 1000 + i, p[:64], 16) for i, (p, _) in enumerate(work.requests[:16])))
        start = time.perf_counter()
        counts = await asyncio.gather(*(one(engine, i, p, n) for i, (p, n) in enumerate(work.requests)))
        seconds = time.perf_counter() - start
        await engine.shutdown()
        assert sum(counts) == work.num_out
        result(f"{shape} G1 through AsyncEngine", s=seconds, out_tok_s=work.num_out / seconds)

    asyncio.run(measure())
