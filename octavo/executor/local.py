"""What carries a step to the worker, here: when `sample` returns, a CPU has run it, a GPU was given it."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig
from octavo.models.spec import ModelFiles
from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.worker.worker import Worker, WorkerInfo

Masks = Mapping[int, npt.NDArray[np.uint32]]  # row -> [ceil(vocab / 32)], as SamplingInputs.masks
# a step's result, to come: waits for it, or raises what the step failed with. Called once, in the order of the steps
StepResult = Callable[[], ModelRunnerOutput]


class LocalExecutor:
    """`start` once, then per step `execute` and `sample`, in the order the steps were scheduled."""

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.worker = Worker(config, files)
        self._failure: Exception | None = None  # of the step that execute() could not launch
        self._failed: _Failed | None = None  # the last step that was not launched

    def start(self) -> WorkerInfo:
        """Loads the model. Raises what the worker raises."""
        return self.worker.start()

    def execute(self, output: SchedulerOutput) -> None:
        """Publishes a step: from here on it always executes."""
        if self._failed is not None and not self._failed.is_told:
            self._failure = self._failed.failure  # it would compute from what that step did not leave
            return
        try:
            self.worker.runner.execute(output)
        except Exception as error:  # the step's failure, wherever it happens, is reported by its result
            self._failure = error

    def sample(self, masks: Masks | None = None) -> StepResult:
        """The result of the step just published. What it raises is that step's failure. `masks`, by row, say
        what some rows may choose."""
        failure, self._failure = self._failure, None
        if failure is None:
            try:
                return self.worker.runner.sample(masks)
            except Exception as error:
                failure = error
        self._failed = _Failed(failure)
        return self._failed

    def close(self) -> None:
        """Ends the worker."""
        self.worker.close()


class _Failed:
    """A step that could not be launched. Until that was told, no later one is."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.is_told = False

    def __call__(self) -> ModelRunnerOutput:
        self.is_told = True
        raise self.failure
