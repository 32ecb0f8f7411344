"""What gpu_check measures of serving: arrivals over time, the engine behind its channel, whether tokens are right."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Result = Callable[..., None]
MARGIN = 0.03  # of the largest logit: what bfloat16 may turn around


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
    """Eight requests again, the whole sequence at once and without graphs: how often is their token the likeliest?"""
    import torch

    from octavo.runtime.base import SamplingInputs, StepInputs

    runtime = llm._executor.worker.runtime
    most_rows, block_size = llm.config.max_num_seqs, llm.config.block_size
    graphs, runtime._graphs = runtime._graphs, None
    agreed = clear = total = 0
    for index in np.linspace(0, len(outputs) - 1, min(8, len(outputs))).astype(int):
        prompt, tokens = work.requests[index][0], list(outputs[index].outputs[0].token_ids)
        ids = np.array([*prompt, *tokens[:-1]], np.int32)
        for first in range(len(prompt) - 1, len(ids), most_rows):
            end = min(first + most_rows, len(ids))
            step = StepInputs.one_request(ids[:end], first_logits=first, block_size=block_size)
            runtime.execute(step)
            runtime.sample(SamplingInputs.greedy(end - first))
            logits = runtime._logits_on_device().float()
            best, ids_of_best = logits.topk(2, 1)
            chosen = torch.tensor(tokens[first - len(prompt) + 1 : end - len(prompt) + 1], device=logits.device)
            is_clear = best[:, 0] - best[:, 1] > MARGIN * logits.abs().max()
            agreed += int((is_clear & (ids_of_best[:, 0] == chosen)).sum())
            clear += int(is_clear.sum())
            total += len(chosen)
    runtime._graphs = graphs
    result(f"{name} teacher-forced", tokens=total, clear=clear, agree=agreed / max(clear, 1))


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
