"""Puts load on a server: sends each prompt at its time, reads its stream, keeps what was seen."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from octavo.cli.bench.arithmetic import Outcome
from octavo.cli.client import Server, raise_for_status, request
from octavo.cli.talk import read_chunk
from octavo.errors import OctavoError, ServerError

Kind = Literal["openai", "openai-chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how requests are made."""

    server: Server
    endpoint: str  # "/v1/completions"
    kind: Kind
    model: str
    extra: dict[str, Any]  # fields of every request: temperature, ignore_eos, ...

    def body(self, prompt: str | list[int], output_len: int) -> dict[str, Any]:
        """The JSON of one request. A chat takes text, completions also token ids."""
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | self.extra
        if self.kind == "openai-chat":
            return body | {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": output_len}
        return body | {"prompt": prompt, "max_tokens": output_len}


@dataclass(frozen=True, slots=True)
class Job:
    """One request to make."""

    prompt: str | list[int]
    prompt_tokens: int
    output_len: int
    send_at: float  # seconds after the start


async def run_load(
    target: Target, jobs: list[Job], *, max_concurrency: int | None, on_done: Callable[[Outcome], None]
) -> tuple[list[Outcome], float]:
    """Runs all jobs; returns what each saw, in order, and the seconds from the first send to the last answer.

    A request whose time has come while `max_concurrency` are under way waits; its clock starts when it is sent.
    """
    gate = asyncio.Semaphore(max_concurrency or len(jobs))
    began = time.perf_counter()

    async def one(job: Job) -> Outcome:
        await asyncio.sleep(job.send_at - (time.perf_counter() - began))
        async with gate:
            outcome = await send(target, job)
        on_done(outcome)
        return outcome

    outcomes = await asyncio.gather(*(one(job) for job in jobs))
    return outcomes, time.perf_counter() - began


async def send(target: Target, job: Job) -> Outcome:
    """Makes one request. What goes wrong is written into the outcome, for a run must not end on it."""
    outcome = Outcome(prompt_tokens=job.prompt_tokens)
    began = time.perf_counter()
    try:
        async with request(target.server, "POST", target.endpoint, target.body(job.prompt, job.output_len)) as response:
            await raise_for_status(response, target.server.url + target.endpoint)
            await _read_stream(response.events(), outcome, began)
    except OctavoError as error:
        outcome.error = str(error)
        return outcome
    outcome.success = outcome.ttft > 0
    if not outcome.success:
        outcome.error = "the stream ended without a token"
    return outcome


async def check(target: Target, job: Job) -> None:
    """Makes one request before the run. Raises ServerError when it fails: the run would only repeat that."""
    outcome = await send(target, job)
    if not outcome.success:
        raise ServerError(f"the first test request failed: {outcome.error}")


async def _read_stream(events: Any, outcome: Outcome, began: float) -> None:
    """Fills in times as chunks arrive, and counts: the server's own where it gives usage, else one a chunk."""
    previous = began
    num_chunks = 0
    reported: int | None = None
    async for data in events:
        if data == b"[DONE]":
            break
        chunk = read_chunk(data)
        if chunk.usage_tokens is not None:
            reported = chunk.usage_tokens
            outcome.prompt_tokens = chunk.prompt_tokens or outcome.prompt_tokens
        if not chunk.text:
            continue
        now = time.perf_counter()
        num_chunks += 1
        if num_chunks == 1:
            outcome.ttft = now - began
        else:
            outcome.itls.append(now - previous)
        previous = now
        outcome.text += chunk.text
    outcome.e2el = previous - began
    outcome.output_tokens = num_chunks if reported is None else reported
