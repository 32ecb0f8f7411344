"""Runs steps: patches the rows, builds the arrays, calls the runtime, writes the sampled tokens back into the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from octavo.errors import StepError
from octavo.runtime.base import Runtime, SamplerOutput
from octavo.step import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from octavo.worker.batch import Batch
from octavo.worker.rows import Rows
from octavo.worker.steady import Batches


class ModelRunner:
    """One runtime and its rows. `execute` then `sample`, once per step."""

    def __init__(self, runtime: Runtime, rows: Rows) -> None:
        self._runtime = runtime
        self._rows = rows
        self._batches = Batches(rows)
        self._batch: Batch | None = None
        self._num_calls = 0  # into compiled code, before this step

    def execute(self, output: SchedulerOutput) -> None:
        """Starts the step. A runtime may defer the work to sample()."""
        self._num_calls = self._runtime.num_foreign_calls
        for new in output.new_rows:
            self._rows.admit(new)
        self._rows.extend_tables(output.scheduled)
        if output.copy_blocks:
            self._runtime.copy_blocks(output.copy_blocks)
        self._batch = self._batches.next(output.scheduled)
        self._runtime.execute(self._batch.inputs)

    def sample(self, masks: Mapping[int, npt.NDArray[np.uint32]] | None = None) -> Callable[[], ModelRunnerOutput]:
        """Launches the rest of the step; `masks` say what some rows may choose (SamplingInputs.masks). What it returns,
        called in the order of the steps, waits for the result:

        one new token for every scheduled row that reached its last known or pending token.
        """
        batch = self._batch
        if batch is None:
            raise StepError("sample() without execute()")
        self._batch = None
        if masks:
            _set_masks(batch, masks)
        wait = self._runtime.sample_later(batch.sampling)
        num_calls = self._runtime.num_foreign_calls - self._num_calls

        def finish() -> ModelRunnerOutput:
            out = wait()
            if batch.is_decode:
                new = [[token] for token in self._batches.take(batch, out.token_ids)]
                if batch.wanted == []:
                    return ModelRunnerOutput(new, [None] * len(new), out.foreign_seconds, num_calls)
                told = [None if entry is None else [entry] for entry in _logprobs(batch, out)]
                return ModelRunnerOutput(new, told, out.foreign_seconds, num_calls)
            num_sampled = len(batch.tokens_of.rows)
            tokens, logprobs = out.token_ids[:num_sampled], _logprobs(batch, out)
            self._rows.append(batch.tokens_of, tokens)
            result = _spread(batch.samples, tokens.tolist(), logprobs[:num_sampled])
            for row, count in batch.prompts:
                result.prompt_logprobs[row] = cast("list[TokenLogprobs]", logprobs[num_sampled : num_sampled + count])
                num_sampled += count
            _pool(batch, out, result)
            result.foreign_seconds, result.num_foreign_calls = out.foreign_seconds, num_calls
            return result

        return finish


def _pool(batch: Batch, out: SamplerOutput, result: ModelRunnerOutput) -> None:
    """Hands each prompt that is embedded its states; one that is complete has its vector, for a token's place."""
    first = 0
    for place, row, count, pool in batch.pooled:
        if count:
            assert out.states is not None
            pool.add(out.states[first : first + count])
            first += count
        if place >= 0:
            result.token_ids[place], result.vectors[row] = [0], pool.vector()


def _set_masks(batch: Batch, masks: Mapping[int, npt.NDArray[np.uint32]]) -> None:
    sampling = batch.sampling
    assert sampling.rows is not None
    number_of = {row: number for number, row in enumerate(masks)}
    sampling.mask_of = np.array([number_of.get(row, -1) for row in sampling.rows.tolist()], np.int32)
    sampling.masks = np.stack(list(masks.values()))


def _logprobs(batch: Batch, out: SamplerOutput) -> list[TokenLogprobs | None]:
    wanted = batch.sampling.num_logprobs.tolist()
    if batch.wanted is None:
        batch.wanted = wanted if max(wanted, default=-1) >= 0 else []
    if not batch.wanted:
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


def _spread(samples: list[bool], tokens: list[int], logprobs: list[TokenLogprobs | None]) -> ModelRunnerOutput:
    """Per sampled position -> per scheduled row."""
    result = ModelRunnerOutput(token_ids=[], logprobs=[])
    sampled = iter(zip(tokens, logprobs, strict=True))
    for does in samples:
        token, logprob = next(sampled) if does else (None, None)
        result.token_ids.append([] if token is None else [token])
        result.logprobs.append(None if logprob is None else [logprob])
    return result
