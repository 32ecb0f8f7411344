"""A step's tokens on their way to the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from octavo.runtime.base import Float32, Int32, SamplerOutput, SamplingInputs


class Results:
    """Pinned buffers, used in turn, with an event each: there is one more of them than steps in flight."""

    def __init__(self, tokens: torch.Tensor, num_buffers: int) -> None:
        """`tokens`: int32, of as many rows as a step may sample, where the sampler leaves them."""
        max_rows, pinned = len(tokens), tokens.is_cuda
        self._tokens = tokens
        self._hosts = [torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned) for _ in range(num_buffers)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (buffer, rows) -> views
        self._arrived = [torch.cuda.Event() for _ in range(num_buffers if pinned else 0)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def fetch(self, num_rows: int) -> Callable[[], Int32]:
        """Queues a copy of the first tokens behind what was launched; what it returns waits for that, once."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._hosts)
        key = turn, num_rows
        if key not in self._copies:
            self._copies[key] = self._hosts[turn][:num_rows], self._tokens[:num_rows]
        host, tokens = self._copies[key]
        host.copy_(tokens, non_blocking=True)
        if self._arrived:
            self._arrived[turn].record()

        def wait() -> Int32:
            if self._arrived:
                self._arrived[turn].synchronize()
            values: Int32 = self._arrays[turn][:num_rows].copy()
            return values

        return wait


def output_of(
    wait: Callable[[], Int32], sampling: SamplingInputs, fill: Callable[[SamplerOutput], None] | None,
    states: torch.Tensor | None,
) -> SamplerOutput:  # fmt: skip
    """Waits for the tokens; `fill` adds the log probabilities, which were copied before them, as `states` were."""
    tokens = wait()
    if fill is None and states is None:
        return SamplerOutput(tokens, *_untold(len(tokens)))
    output = SamplerOutput.without_logprobs(tokens, sampling.num_logprobs)
    if fill is not None:
        fill(output)
    output.states = None if states is None else states.numpy().copy()
    return output


def output_of_nobody(wait: Callable[[], Int32]) -> SamplerOutput:
    """The result of a step in which nobody samples: there when it has ended, so that its time is not the next one's."""
    none = wait()
    return SamplerOutput.without_logprobs(none, none)


@lru_cache(maxsize=1024)
def _untold(num_rows: int) -> tuple[Float32, Int32, Int32, Float32]:
    """The log probabilities, ranks and alternatives of rows that asked for none; shared, so never written."""
    none = SamplerOutput.without_logprobs(np.zeros(num_rows, np.int32), np.full(num_rows, -1, np.int32))
    return none.logprobs, none.ranks, none.top_ids, none.top_logprobs
