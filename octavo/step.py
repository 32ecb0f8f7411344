"""The contract between the counting half and the computing half: plain records, no tensors.

`SchedulerOutput` goes down (scheduler -> executor -> worker), `ModelRunnerOutput` comes up. Nothing else passes.
A Request owns one row of the worker from admission to finish or preemption; a step sends only what changed.
"""

from dataclasses import dataclass

from octavo.sampling_params import Pooling, SamplingParams
from octavo.structs import Struct, struct_field

Blocks = tuple[list[int], ...]  # block ids, by KV group
NO_BLOCKS: Blocks = ((),)  # type: ignore[assignment]


def most_blocks(num_tokens: int, block_size: int, windows: tuple[int, ...], step_tokens: int) -> int:
    """Blocks that a Request of so many tokens holds at most, over all KV groups: where a group has a window (0: none),
    what the tokens of one step, at most `step_tokens`, see."""
    whole = -(-num_tokens // block_size)
    seen = [-(-(window - 1 + step_tokens) // block_size) + 1 if window else whole for window in windows]
    return sum(min(whole, blocks) for blocks in seen)


@dataclass(slots=True)
class NewRow:
    """The whole state of a row, sent when its Request is admitted or comes back after a preemption."""

    row: int
    request_id: str
    epoch: int
    token_ids: list[int]  # everything known so far: the prompt, and what was generated before a preemption
    num_prompt_tokens: int
    block_ids: Blocks  # all that are allocated so far (cached ones first)
    num_computed_tokens: int  # KV already there (prefix hits)
    params: SamplingParams
    stop_ids: frozenset[int]  # banned while fewer than params.min_tokens tokens were generated
    seed: int
    num_logprobs: int = -1  # most likely tokens to tell at each position; 0: the sampled one alone, -1: none
    num_prompt_logprobs: int = -1  # the same of the prompt's tokens
    pooling: Pooling | None = None  # nothing is sampled: the prompt becomes one vector


class ScheduledRow(Struct, gc=False):
    """One Request's share of a step: the next `num_tokens` positions after what is computed."""

    row: int
    request_id: str
    epoch: int
    start: int  # first position computed in this step (= num_computed_tokens before it)
    num_tokens: int
    samples: bool  # True when the last position is the Request's last token, so a new token comes out
    # appended to the row's table; empty for a row that is new in this step (NewRow carries them all)
    new_block_ids: Blocks = NO_BLOCKS
    fork_of: int = -1  # with num_tokens = 0: the row of this step whose last logits it samples from; it shares its KV


class SchedulerOutput(Struct, gc=False):
    """One step, decided. Once published it always executes."""

    step: int
    new_rows: list[NewRow] = struct_field(default_factory=list)
    scheduled: list[ScheduledRow] = struct_field(default_factory=list)
    # (from, to), in this order, before anything is computed; an id behind the pool's is a block in host memory
    copy_blocks: list[tuple[int, int]] = struct_field(default_factory=list)
    num_tokens: int = 0  # sum over `scheduled`


@dataclass(slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the raw distribution (before temperature and penalties)."""

    token_logprob: float
    rank: int  # of the token that is there; 1 is the most likely
    top_ids: list[int]  # the most likely ids, best first (empty when only the sampled one was asked for)
    top_logprobs: list[float]


class ModelRunnerOutput(Struct, gc=False):
    """What a step produced; both lists run parallel to `SchedulerOutput.scheduled`."""

    token_ids: list[list[int]]  # new tokens per scheduled row; [] in mid-prefill
    logprobs: list[list[TokenLogprobs] | None]  # one entry per new token where asked for
    foreign_seconds: float = 0.0  # of the step, inside compiled code
    num_foreign_calls: int = 0  # into it
    # by row: of the tokens behind the prompt positions that this step computed, where asked for
    prompt_logprobs: dict[int, list[TokenLogprobs]] = struct_field(default_factory=dict)
    vectors: dict[int, bytes] = struct_field(default_factory=dict)  # by row, of prompts that are embedded: float32
