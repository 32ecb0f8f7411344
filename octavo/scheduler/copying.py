"""Copy or compute: whether KV that the pool gives up is worth a copy to host memory, by what both take while it runs.

Both are followed: machines drift, and a copy beside a large step is not the copy that was timed at start.
"""

from dataclasses import replace

from octavo.scheduler.cost import CostModel, StepWork

PROMPT = 512  # tokens: what would be computed again is priced as a part of such a prompt
WEIGHT = 0.05  # of a new step in the moving averages
RETRY_STEPS = 256  # without a copy; then one is tried again, and what was known of copies
AGED = 0.1  # counts this much


class CopyChoice:
    """Follows what steps take, with copies and without.

    Args:
        cost: of a step; `per_copy` as it was timed, 0 where copies are free.
        block_size, num_groups: tokens of a block; KV groups, so blocks of as many tokens.
    """

    def __init__(self, cost: CostModel, block_size: int, num_groups: int) -> None:
        self._cost = replace(cost, per_copy=0.0)
        self._one = cost.prefill_seconds(PROMPT) * block_size / PROMPT
        self._num_groups = num_groups
        self._pace = 1.0  # seconds of steps without copies over what the model says: the moving average
        self._num_copied = 1 / WEIGHT  # of steps with copies, as moving sums: blocks, and seconds more than without
        self._seconds = cost.per_copy * self._num_copied
        self._least = cost.per_copy  # what a copy takes with nothing beside it
        self._num_without = 0  # steps since the last copy

    @property
    def computing(self) -> float:
        """Seconds to compute what lies in the blocks of `block_size` tokens."""
        return self._pace * self._one

    @property
    def copying(self) -> float:
        """Seconds to copy it out and back."""
        return 2 * self._num_groups * max(self._seconds / self._num_copied, self._least)

    @property
    def saves(self) -> bool:
        """Whether to copy what the next step gives up."""
        return self.copying < self.computing or self._num_without >= RETRY_STEPS

    def learn(self, work: StepWork, seconds: float) -> bool:
        """Takes a step; `saves` from here on."""
        alone = self._cost.seconds(work)
        if work.num_copied:
            self._num_copied = (1 - WEIGHT) * self._num_copied + work.num_copied
            self._seconds = (1 - WEIGHT) * self._seconds + seconds - self._pace * alone
            self._num_without = 0
        else:
            self._pace += WEIGHT * (seconds / max(alone, 1e-9) - self._pace)
            self._num_without += 1
            if self._num_without == RETRY_STEPS:
                self._num_copied, self._seconds = AGED * self._num_copied, AGED * self._seconds
        return self.saves

    def __str__(self) -> str:
        times = f"{1000 * self.computing:.3f} ms, their KV to host memory and back {1000 * self.copying:.3f} ms"
        return f"the tokens of a block: {times}; evicted KV is {'copied' if self.saves else 'dropped'}"
