"""Is the engine alive? Judged by its steps, against what steps have cost so far, and by the CPU time it uses.

Silence alone proves nothing: a long prompt on a busy laptop is silent too, and whoever kills that makes it worse. So an
engine with work is called stalled only when it has been silent for many times the longest step to be expected *and*
either its process has used no CPU time for seconds (a deadlock, a stopped process), or it has used far more than any
step could take (an endless loop). Where the system tells no CPU time (macOS), a silent engine passes for one that
computes.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from octavo.messages import StepRecord

MIN_SILENCE = 5.0  # seconds
FIRST_SPIN = 600.0  # seconds of silence before the first step, in which a process may compute: nothing is known yet
MIN_SLEEP = 2.0  # seconds without CPU time
TIMES_EXPECTED = 10  # silence, in longest steps to be expected
TIMES_SPUN = 4  # CPU seconds per second of the limit and thread
DECAY = 0.999  # of what was seen, per step
MIN_TOKENS = 16  # a smaller step says nothing of the cost of a token
MAX_RESTARTS = 3
RESTART_WINDOW = 600.0  # seconds
BACK_OFF = (0.0, 1.0, 5.0)  # seconds before the first, second, third restart within the window


@dataclass(slots=True)
class Progress:
    """How the engine stands. Times are seconds."""

    stage: str  # "idle" | "working" | "stalled" | "restarting" | "dead"
    num_unfinished: int  # requests
    last_step_age: float | None  # None before the first
    oldest_waiting: float  # age of the oldest request without a token; 0 when there is none
    expected_step: float  # what the largest step would take, as far as seen
    stall_limit: float  # silence from which the process is looked at
    num_restarts: int


class Watchdog:
    """Hears every step and looks at the process now and then.

    Args:
        max_num_tokens: the token budget of a step.
        num_threads: threads that may use CPU at once.
        clock: seconds.
    """

    def __init__(self, max_num_tokens: int, num_threads: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_num_tokens = max_num_tokens
        self._num_threads = num_threads
        self._clock = clock
        self._slowest = 0.0  # seconds of a step
        self._per_token = 0.0  # seconds
        self._last_step: float | None = None
        self.reset()

    def reset(self) -> None:
        """The engine is new, or has nothing to do."""
        self._last = self._moved = self._clock()
        self._cpu = self._cpu_at_step = -1.0  # unknown

    def heard(self, records: Iterable[StepRecord]) -> None:
        """Takes the steps that the engine has told of."""
        for record in records:
            seconds = record.schedule_seconds + record.execute_seconds + record.update_seconds
            self._slowest = max(self._slowest * DECAY, seconds)
            self._last_step = self._clock()
            if record.num_tokens >= MIN_TOKENS:
                self._per_token = max(self._per_token * DECAY, record.execute_seconds / record.num_tokens)
        self._last = self._moved = self._clock()
        self._cpu_at_step = self._cpu

    @property
    def last_step_age(self) -> float | None:
        """Seconds since the last step; None before the first."""
        return None if self._last_step is None else self._clock() - self._last_step

    @property
    def silence(self) -> float:
        """Seconds since the last step, or since there was nothing to do."""
        return self._clock() - self._last

    @property
    def expected_step(self) -> float:
        """Seconds that the largest step would take."""
        return max(self._slowest, self._per_token * self._max_num_tokens)

    @property
    def limit(self) -> float:
        """Seconds of silence from which the process is looked at."""
        return max(MIN_SILENCE, TIMES_EXPECTED * self.expected_step)

    def stalled(self, cpu_seconds: float | None) -> bool:
        """Looks at an engine that has work; `cpu_seconds` is what its process has used so far."""
        now = self._clock()
        if cpu_seconds is not None:
            if cpu_seconds > self._cpu:
                self._moved = now
            self._cpu = cpu_seconds
            if self._cpu_at_step < 0:
                self._cpu_at_step = cpu_seconds
        if now - self._last < self.limit:
            return False
        if cpu_seconds is not None and now - self._moved >= MIN_SLEEP:
            return True
        if not self._slowest and now - self._last < FIRST_SPIN:
            return False
        if cpu_seconds is None:
            return now - self._last >= TIMES_SPUN * self.limit
        return cpu_seconds - self._cpu_at_step > TIMES_SPUN * self.limit * self._num_threads


class Restarts:
    """How often an engine was restarted lately, and whether it may be again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: list[float] = []
        self.count = 0  # ever

    def next_delay(self) -> float | None:
        """Books a restart: seconds to wait before it, or None when there were too many."""
        now = self._clock()
        self._times = [t for t in self._times if now - t < RESTART_WINDOW]
        if len(self._times) >= MAX_RESTARTS:
            return None
        self._times.append(now)
        self.count += 1
        return BACK_OFF[len(self._times) - 1]
