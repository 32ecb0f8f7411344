"""Runs steps: patches the rows, builds the arrays, calls the runtime, writes the sampled tokens back into the rows."""

from __future__ import annotations

from octavo.errors import StepError
from octavo.runtime.base import Runtime, SamplerOutput
from octavo.step import ModelRunnerOutput, ScheduledRow, SchedulerOutput, TokenLogprobs
from octavo.worker.batch import Batch, build_batch
from octavo.worker.rows import Rows


class ModelRunner:
    """One runtime and its rows. `execute` then `sample`, once per step."""

    def __init__(self, runtime: Runtime, rows: Rows) -> None:
        self._runtime = runtime
        self._rows = rows
        self._batch: Batch | None = None
        self._scheduled: list[ScheduledRow] = []

    def execute(self, output: SchedulerOutput) -> None:
        """Starts the step. A runtime may defer the work to sample()."""
        for new in output.new_rows:
            self._rows.admit(new)
        self._rows.extend_tables(output.scheduled)
        if output.copy_blocks:
            self._runtime.copy_blocks(output.copy_blocks)
        self._scheduled = output.scheduled
        self._batch = build_batch(output.scheduled, self._rows)
        self._runtime.execute(self._batch.inputs)

    def sample(self) -> ModelRunnerOutput:
        """Ends the step: one new token for every scheduled row that reached its last known token."""
        batch = self._batch
        if batch is None:
            raise StepError("sample() without execute()")
        self._batch = None
        out = self._runtime.sample(batch.sampling)
        tokens = out.token_ids.tolist()
        for item, token in zip(batch.sampled, tokens, strict=True):
            self._rows.append(item.row, item.start + item.num_tokens, token)
        return _spread(self._scheduled, tokens, _logprobs(batch, out))


def _logprobs(batch: Batch, out: SamplerOutput) -> list[TokenLogprobs | None]:
    wanted = batch.sampling.num_logprobs.tolist()
    if max(wanted, default=-1) < 0:
        return [None] * len(wanted)
    return [
        None
        if k < 0
        else TokenLogprobs(
            token_logprob=float(out.logprobs[r]),
            rank=int(out.ranks[r]),
            top_ids=out.top_ids[r, :k].tolist(),
            top_logprobs=out.top_logprobs[r, :k].tolist(),
        )
        for r, k in enumerate(wanted)
    ]


def _spread(
    scheduled: list[ScheduledRow], tokens: list[int], logprobs: list[TokenLogprobs | None]
) -> ModelRunnerOutput:
    """Per sampled position -> per scheduled row."""
    result = ModelRunnerOutput(token_ids=[], logprobs=[])
    sampled = iter(zip(tokens, logprobs, strict=True))
    for item in scheduled:
        token, logprob = next(sampled) if item.samples else (None, None)
        result.token_ids.append([] if token is None else [token])
        result.logprobs.append(None if logprob is None else [logprob])
    return result
