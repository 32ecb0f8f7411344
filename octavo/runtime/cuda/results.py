"""A step's tokens on their way to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.runtime.base import Int32, SamplerOutput, SamplingInputs


class Results:
    """Pinned buffers, used in turn, with an event each: there is one more of them than steps in flight."""

    def __init__(self, max_rows: int, num_buffers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(max_rows, dtype=torch.int32, pin_memory=pinned) for _ in range(num_buffers)]
        self._arrived = [torch.cuda.Event() for _ in range(num_buffers if pinned else 0)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def fetch(self, tokens: torch.Tensor) -> Callable[[], Int32]:
        """Queues a copy of int32 tokens [R] behind what was launched; what it returns waits for that, once."""
        turn, num_rows = self._turn, len(tokens)
        self._turn = (turn + 1) % len(self._hosts)
        self._hosts[turn][:num_rows].copy_(tokens, non_blocking=True)
        if self._arrived:
            self._arrived[turn].record()

        def wait() -> Int32:
            if self._arrived:
                self._arrived[turn].synchronize()
            values: Int32 = self._hosts[turn].numpy()[:num_rows].copy()
            return values

        return wait


def output_of(
    wait: Callable[[], Int32],
    sampling: SamplingInputs,
    fill: Callable[[SamplerOutput], None] | None,
    states: torch.Tensor | None,
) -> SamplerOutput:
    """Waits for the tokens; `fill` adds the log probabilities, which were copied before them, as `states` were."""
    output = SamplerOutput.without_logprobs(wait(), sampling.num_logprobs)
    if fill is not None:
        fill(output)
    output.states = None if states is None else states.numpy().copy()
    return output


def output_of_nobody(wait: Callable[[], Int32]) -> SamplerOutput:
    """The result of a step in which nobody samples: there when it has ended, so that its time is not the next one's."""
    none = wait()
    return SamplerOutput.without_logprobs(none, none)
