"""What a step may still hold."""

from __future__ import annotations

from octavo.config import PROMPT_ROWS
from octavo.request import Request


class Budget:
    """Tokens of a step and of one Request in it, prompt tokens that the policy allows, prompt positions told of."""

    def __init__(self, max_tokens: int, max_share: int) -> None:
        self.max_tokens = max_tokens
        self._max_share = max_share or max_tokens
        self.prefill_left = self._rows_left = 0

    def begin(self, prefill_cap: int) -> None:
        """A new step."""
        self.prefill_left, self._rows_left = prefill_cap, PROMPT_ROWS

    def share(self, request: Request, num_taken: int) -> int:
        """How many tokens the Request computes, beside `num_taken` of others: what it lacks, cut."""
        lacking = len(request.token_ids) + request.num_pending - request.num_computed_tokens
        share = min(lacking, self._max_share, self.max_tokens - num_taken)
        if request.reads_prompt:
            share = min(share, self._rows_left)
        return share if lacking <= 1 else min(share, self.prefill_left)

    def take(self, request: Request, share: int) -> None:
        """It does."""
        if share > 1:
            self.prefill_left -= share
        if request.reads_prompt:
            self._rows_left -= share
