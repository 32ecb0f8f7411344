"""A Request: what a client asked, from arrival to finish; the unit of scheduling. Owned by the engine process.

It has no phase. `num_computed_tokens` tries to catch up with `num_tokens`; chunked prefill, prefix hits and
resuming after a preemption are that one rule. (`n > 1` is several Requests of one group, made by the front.)
"""

from dataclasses import dataclass, field
from enum import StrEnum

from octavo.sampling_params import Pooling, SamplingParams
from octavo.step import TokenLogprobs


class RequestStatus(StrEnum):
    """Where a Request stands with the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, at the front
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a Request ended; the first two are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One request as the engine sees it: token ids and counts, no text."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]  # end-of-sequence ids (unless ignore_eos) and stop_token_ids
    max_tokens: int  # resolved: never past the context
    arrival_time: float  # engine's monotonic clock, seconds
    seed: int = 0  # resolved: the request's own, or drawn once by the front
    priority: int = 0  # lower runs first, under the policy of that name
    tenant: str = ""  # whose fair share it uses
    weight: float = 1.0  # of that tenant
    deadline: float | None = None  # on the clock of arrival_time: ended when it passes
    cache_salt: str | None = None
    fork_of: str | None = None  # the Request, with the same prompt, whose prefill serves this one too
    pooling: Pooling | None = None  # nothing is sampled: its prompt becomes one vector
    reads_prompt: bool = False  # more than KV is wanted of its prompt: cached blocks do not do
    has_grammar: bool = False  # what it may sample next depends on what it has sampled

    status: RequestStatus = RequestStatus.WAITING
    epoch: int = 0  # how often it was (re)admitted; stamps work in flight
    row: int = -1  # its fixed index in the runtime's buffers while it runs
    token_ids: list[int] = field(default_factory=list)  # prompt + generated
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # so far, of the prompt from its second token on
    num_computed_tokens: int = 0  # tokens whose KV is in the cache (or is being computed by a step in flight)
    max_length: int = 0  # most tokens, prompt and generated
    max_pending: int = 0  # tokens that may be pending when its next one is scheduled
    num_slots: int = 0  # positions that its blocks hold; kept by the KV cache
    plain_from: int = 0  # from here on a step of it is one more token: no prompt, nothing computed again
    num_pending: int = 0  # tokens behind token_ids that steps in flight sample: counted, not known yet
    num_cached_tokens: int = 0  # prompt tokens served by the prefix cache at first admission
    num_preemptions: int = 0
    num_lost_tokens: int = 0  # the most it had computed when its KV was taken: up to there it computes again
    first_scheduled_time: float | None = None
    has_moved: bool = False  # what the worker has of its row is out of date: it is sent whole with the next step
    retry_alone: bool = False  # its step failed: it runs once alone, to find the guilty one

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def needs_host_token(self) -> bool:
        """True when its next step cannot be decided before its last token is known here: it is not run ahead."""
        params = self.params  # all of these look at tokens on the host; allowed_token_ids do not
        has_rules = self.has_grammar or bool(params.bad_words) or params.max_thinking_tokens is not None
        return has_rules or params.has_penalties or params.use_beam_search

    @property
    def answer_ids(self) -> list[str]:
        """Under which ids its answers return."""
        return answer_ids(self.request_id, self.params)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens (a copy)."""
        return self.token_ids[len(self.prompt_token_ids) :]


def answer_ids(request_id: str, params: SamplingParams) -> list[str]:
    """The ids of an engine request's answers: its own, or with beam search one for each of n."""
    n = params.n if params.use_beam_search else 1
    return [answer_id(request_id, index, n) for index in range(n)]


def answer_id(request_id: str, index: int, n: int) -> str:
    """The id of the index-th of n answers to a request."""
    return request_id if n == 1 else f"{request_id}#{index}"
