"""What carries a step to the workers. The engine sees only this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.worker.worker import WorkerInfo

Masks = Mapping[int, npt.NDArray[np.uint32]]  # row -> [ceil(vocab / 32)], as SamplingInputs.masks


class StepResult(Protocol):
    """A step's result, to come; a concurrent.futures.Future is one. Asked for once, in the order of the steps."""

    def result(self) -> ModelRunnerOutput:
        """Waits for it. Raises what the step failed with."""
        ...

    def exception(self) -> BaseException | None:
        """Waits for it; what the step failed with, None where it did not."""
        ...


class Executor(Protocol):
    """`start` once, then per step `execute` and `sample`, in the order the steps were scheduled."""

    def start(self) -> WorkerInfo:
        """Loads the model on every worker. Raises what the workers raise."""
        ...

    def execute(self, output: SchedulerOutput) -> None:
        """Publishes a step: from here on it always executes."""
        ...

    def sample(self, masks: Masks | None = None) -> StepResult:
        """The result of the step just published. An exception in it is that step's failure. `masks`, by row, say what
        some rows may choose."""
        ...

    @property
    def num_foreign_calls(self) -> int:
        """Calls into compiled code so far."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...
