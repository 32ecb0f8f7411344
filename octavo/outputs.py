"""What a caller gets back. Names and shapes are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(slots=True)
class Logprob:
    """Log probability of one token at one position, of the model's raw distribution."""

    logprob: float
    rank: int | None = None  # 1 is the most likely token
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` answers to a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the sampled one first, then the alternatives
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it

    def finished(self) -> bool:
        """True when no token will follow."""
        return self.finish_reason is not None


@dataclass(slots=True)
class BeamSearchSequence:
    """One answer of `LLM.beam_search`."""

    tokens: list[int]  # prompt and answer
    logprobs: list[dict[int, Logprob]]  # per token of the answer
    cum_logprob: float
    text: str | None  # of all tokens; None without a tokenizer
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The answers to one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of a prompt."""

    embedding: list[float]


@dataclass(slots=True)
class ScoringOutput:
    """How alike two texts are: the cosine of their vectors, from -1 to 1."""

    score: float


Pooled = TypeVar("Pooled", EmbeddingOutput, ScoringOutput)


@dataclass(slots=True)
class PoolingRequestOutput(Generic[Pooled]):
    """What `LLM.embed` gives for a prompt, or `LLM.score` for a pair, whose token ids stand one after the other."""

    request_id: str
    outputs: Pooled
    prompt_token_ids: list[int]
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds on the front's monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    queue_seconds: float = 0.0  # from arrival to first scheduling

    def copy(self) -> RequestMetrics:
        """As they are now."""
        first, last = self.first_token_time, self.last_token_time
        return RequestMetrics(self.arrival_time, first, last, self.finished_time, self.queue_seconds)


@dataclass(slots=True)
class RequestOutput:
    """The answer to a request, so far or in full."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV was already there
    num_generated: int = 0  # tokens of all answers so far, those of best_of that are not shown included
    vector: bytes | None = None  # what an embedded prompt became: float32 [hidden_size], not normalised
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # per prompt token; the first has none
