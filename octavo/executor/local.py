"""One worker in this process and this thread: when `sample` returns, a CPU has run the step, a GPU was given it."""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.executor.base import Masks, StepResult
from octavo.models.spec import ModelFiles
from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.worker.worker import Worker, WorkerInfo


class LocalExecutor:
    """Executor (executor/base.py) over one in-process worker."""

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.worker = Worker(config, files)
        self._failure: Exception | None = None  # of the step that execute() could not launch
        self._failed: _Failed | None = None  # the last step that was not launched

    def start(self) -> WorkerInfo:
        return self.worker.start()

    def execute(self, output: SchedulerOutput) -> None:
        if self._failed is not None and not self._failed.is_told:
            self._failure = self._failed.failure  # it would compute from what that step did not leave
            return
        try:
            self.worker.runner.execute(output)
        except Exception as error:  # the step's failure, wherever it happens, is reported by its result
            self._failure = error

    def sample(self, masks: Masks | None = None) -> StepResult:
        failure, self._failure = self._failure, None
        if failure is None:
            try:
                return self.worker.runner.sample(masks)
            except Exception as error:
                failure = error
        self._failed = _Failed(failure)
        return self._failed

    def close(self) -> None:
        self.worker.close()


class _Failed:
    """A step that could not be launched. Until that was told, no later one is."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure
        self.is_told = False

    def __call__(self) -> ModelRunnerOutput:
        self.is_told = True
        raise self.failure
