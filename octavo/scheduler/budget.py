"""What a scheduler may take on, what a step may still hold, and how far its Requests may run ahead."""

from dataclasses import dataclass

from octavo.config import PROMPT_ROWS
from octavo.errors import ConfigError
from octavo.request import Request


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a scheduler takes on. Raises ConfigError for one of the first three below 1."""

    max_num_seqs: int  # rows, so the most Requests that run at once
    max_num_batched_tokens: int  # the token budget of one step, prompts and single tokens alike
    max_model_len: int  # most tokens of a Request, prompt and generated
    long_prefill_token_threshold: int = 0  # most tokens of one Request in a step; 0 for no cap
    max_run_ahead: int = 0  # most tokens of a Request that may be pending when its next one is scheduled; 0 for none
    # blocks per running Request that an admission leaves free, so that those that run find the blocks of their next
    # tokens and nobody is preempted for them a moment later
    admission_headroom: float = 0.0
    max_num_queued_reqs: int = 0  # Requests that may wait; 0 for no bound
    max_num_queued_tokens: int = 0  # prompt tokens that may wait; 0 for no bound

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")


class Budget:
    """Tokens of a step and of one Request in it, prompt tokens that the policy allows, prompt positions told of."""

    def __init__(self, limits: Limits) -> None:
        self.max_tokens = limits.max_num_batched_tokens
        self.max_run_ahead = limits.max_run_ahead
        self._max_share = limits.long_prefill_token_threshold or self.max_tokens
        self.prefill_left = self._rows_left = 0

    def begin(self, prefill_cap: int) -> None:
        """A new step."""
        self.prefill_left, self._rows_left = prefill_cap, PROMPT_ROWS

    def share(self, request: Request, num_taken: int) -> int:
        """How many tokens the Request computes, beside `num_taken` of others: what it lacks, cut; none while it waits
        for its last one."""
        if request.num_pending and not self.can_run_ahead(request):
            return 0
        lacking = len(request.token_ids) + request.num_pending - request.num_computed_tokens
        share = min(lacking, self._max_share, self.max_tokens - num_taken)
        if request.reads_prompt:
            share = min(share, self._rows_left)
        return share if lacking <= 1 else min(share, self.prefill_left)

    def can_run_ahead(self, request: Request) -> bool:
        """Whether its next token may be computed before the pending ones are known: not if they use up its length."""
        ahead = request.num_pending
        return ahead <= request.max_pending and len(request.token_ids) + ahead < request.max_length

    def max_pending(self, request: Request) -> int:
        """How many of its tokens may be pending when it is scheduled; one where that may be a stop token, since what is
        computed behind it is thrown away."""
        if request.needs_host_token:
            return 0
        return min(self.max_run_ahead, 1) if request.stop_ids else self.max_run_ahead

    def take(self, request: Request, share: int, samples: bool) -> None:
        """It does; without a sample it lacks more, though it be a single token."""
        if share > 1 or not samples:
            self.prefill_left -= share
        if request.reads_prompt:
            self._rows_left -= share
