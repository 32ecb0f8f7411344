"""What carries a step to the workers. The engine sees only this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.worker.worker import WorkerInfo

Masks = Mapping[int, npt.NDArray[np.uint32]]  # row -> [ceil(vocab / 32)], as SamplingInputs.masks
# a step's result, to come: waits for it, or raises what the step failed with. Called once, in the order of the steps
StepResult = Callable[[], ModelRunnerOutput]


class Executor(Protocol):
    """`start` once, then per step `execute` and `sample`, in the order the steps were scheduled."""

    def start(self) -> WorkerInfo:
        """Loads the model on every worker. Raises what the workers raise."""
        ...

    def execute(self, output: SchedulerOutput) -> None:
        """Publishes a step: from here on it always executes."""
        ...

    def sample(self, masks: Masks | None = None) -> StepResult:
        """The result of the step just published. What it raises is that step's failure. `masks`, by row, say
        what some rows may choose."""
        ...

    def close(self) -> None:
        """Ends the workers."""
        ...
