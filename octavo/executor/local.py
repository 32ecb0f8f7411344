"""One worker in this process and this thread. Depth 1: on a CPU the step and the host would share the cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from octavo.config import EngineConfig
from octavo.models.spec import ModelFiles
from octavo.step import ModelRunnerOutput, SchedulerOutput
from octavo.worker.worker import Worker, WorkerInfo


class LocalExecutor:
    """Executor (executor/base.py) over one in-process worker."""

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.worker = Worker(config, files)
        self._failure: Exception | None = None

    def start(self, progress: Callable[[int], None] | None = None) -> WorkerInfo:
        return self.worker.start(progress)

    def execute(self, output: SchedulerOutput) -> None:
        try:
            self.worker.execute(output)
        except Exception as error:  # the step's failure, wherever it happens, is reported by its future
            self._failure = error

    def sample(self) -> Future[ModelRunnerOutput]:
        future: Future[ModelRunnerOutput] = Future()
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
            future.set_result(self.worker.sample())
        except Exception as error:
            future.set_exception(error)
        return future

    @property
    def num_foreign_calls(self) -> int:
        return self.worker.num_foreign_calls

    def close(self) -> None:
        self.worker.close()
