"""Typed messages between the front (text) and the engine (ids). Plain records: offline they are handed over
as they are; between processes the channel encodes them as msgpack by their declared types. Never pickle."""

from dataclasses import dataclass, field
from typing import TypedDict

from octavo.sampling_params import Pooling, SamplingParams
from octavo.step import TokenLogprobs
from octavo.structs import Struct, struct_field

# ---------------------------------------------------------------- front -> engine


class Admission(TypedDict, total=False):
    """How a request is to be served, beside its sampling; fields and defaults are AddRequest's."""

    priority: int
    cache_salt: str | None
    tenant: str
    weight: float
    timeout: float | None
    pooling: Pooling | None


@dataclass(slots=True)
class AddRequest:
    """A new request. The front has already checked it against the model's limits."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # resolved against the context
    seed: int
    priority: int = 0  # lower runs first
    cache_salt: str | None = None
    fork_of: str | None = None  # another request with the same prompt and salt, added before: one prefill for both
    tenant: str = ""  # whose fair share it uses
    weight: float = 1.0  # of that tenant
    timeout: float | None = None  # seconds from arrival; then it is ended
    grammar: str | None = None  # llguidance's
    pooling: Pooling | None = None  # nothing is sampled: the prompt becomes one vector
    bad_ids: list[list[int]] = field(default_factory=list)  # words that must not be completed
    # what thoughts begin with (nothing: the answer itself) and end with, where they have a limit
    think_ids: tuple[list[int], list[int]] | None = None
    output_token_ids: list[int] = field(default_factory=list)  # generated already, by an engine that is gone
    runs_alone: bool = False  # for its next token, because an engine died while it ran


@dataclass(slots=True)
class AbortRequests:
    """These requests are wanted no more (a client left, a caller gave up)."""

    request_ids: list[str]


@dataclass(slots=True)
class FinishRequest:
    """The front saw a stop string: keep `num_kept` generated tokens; later ones are dropped and not billed."""

    request_id: str
    num_kept: int


@dataclass(slots=True)
class AskMemory:
    """How does the KV memory stand? The next outputs have a map of it."""


@dataclass(slots=True)
class Shutdown:
    """Stop after the current step; running requests are aborted."""


# ---------------------------------------------------------------- engine -> front


@dataclass(slots=True)
class EngineReady:
    """The engine can answer. Times are seconds; sizes bytes."""

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    generation_defaults: dict[str, int | float]  # what the model's generation_config recommends of SamplingParams
    weight_bytes: int
    kv_bytes: int
    runtime: str  # "native (portable, 2 threads)"
    dtype: str
    kv_cache_dtype: str
    timings: dict[str, float]  # phase -> seconds; they add up to the start-up time
    plan: str  # the memory plan, as printed
    record: str | None = None  # file that the scheduler is recorded to
    num_kv_groups: int = 1  # blocks that so many tokens as one holds are in


@dataclass(slots=True)
class EngineFailed:
    """The engine cannot start, or cannot go on. `kind` is the class name in errors.py."""

    kind: str
    message: str


@dataclass(slots=True)
class Holder:
    """A request that runs, or was preempted and waits again. Counts are tokens unless said otherwise."""

    request_id: str
    status: str  # "running" | "preempted"
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int  # times
    blocks: list[int]  # that it holds, as first, length, first, length, ...


@dataclass(slots=True)
class MemoryMap:
    """The KV memory between two steps. `states` and `ages` have one character a block, in the order of their ids.

    states: "." free; "c" nobody holds it, but its prefix can be hit; "1" to "9" so many requests hold it; "+" more do.
    ages: "n" (from "0" on; ":" is 10, and so on in ASCII): fewer than 2 ** n seconds since it was last given to a
        request, hit, or given back by the last that held it. Means nothing of a free block.
    """

    block_size: int  # tokens
    states: str
    ages: str
    holders: list[Holder]  # the most blocks first; of many the first 256


class RequestDelta(Struct, omit_defaults=True, gc=False):
    """What one step brought one request; between processes without what is as usual."""

    request_id: str
    token_ids: list[int] = struct_field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None  # the stop token id
    cumulative_logprob: float | None = None  # of the whole answer; told by beam search
    num_cached_tokens: int = 0
    queue_time: float = 0.0  # seconds from arrival to first scheduling
    error: str | None = None
    error_kind: str | None = None  # class name in errors.py, where the error is the request's own
    retry_after: float = 0.0  # seconds, of a QueueFullError
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, from the prompt's second one on
    vector: bytes | None = None  # what the prompt became: float32 [hidden_size]
    alone: bool = False  # told before the step: it runs alone, so if the engine dies now, it died of this request


class StepRecord(Struct, array_like=True, gc=False):
    """One step in numbers: the single source of metrics, black boxes, cost models and the lab. Times: the
    engine's monotonic clock, seconds. Tokens unless said otherwise."""

    step: int
    time: float  # at the start of schedule()
    schedule_seconds: float = 0.0
    execute_seconds: float = 0.0  # launching, and waiting for the result
    launch_seconds: float = 0.0  # of these, until everything was launched; all of them where nothing runs behind
    update_seconds: float = 0.0
    num_running: int = 0  # requests in this step
    num_waiting: int = 0  # requests left waiting
    num_tokens: int = 0  # computed in this step
    num_prefill_tokens: int = 0  # of these, positions before a request's last known token
    num_sampled: int = 0  # new tokens
    num_kv_read: int = 0  # positions attended to by the last token of each request, summed
    num_prefill_pairs: int = 0  # query-key pairs of requests with more than one token in this step
    num_finished: int = 0  # requests
    num_chunked: int = 0  # requests whose prompt was cut by the budget in this step
    num_preempted: int = 0  # requests
    num_preempted_tokens: int = 0  # computed tokens thrown away
    num_recomputed_tokens: int = 0  # computed again after a preemption
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    num_forked: int = 0  # requests that began with the KV of another one's prompt, blocks shared
    num_copied_blocks: int = 0  # shared blocks copied on write
    num_evicted_blocks: int = 0
    num_saved_blocks: int = 0  # of evicted ones, copied to host memory
    num_loaded_blocks: int = 0  # copied back
    host_queries: int = 0  # tokens looked up in host memory: not found in the pool
    host_hits: int = 0  # tokens found there
    host_usage: float = 0.0  # share of the blocks in host memory that hold something
    num_free_blocks: int = 0  # never used or unhashed
    num_cached_blocks: int = 0  # free for the taking, but still holding a hashed prefix
    num_used_blocks: int = 0
    num_idle_slots: int = 0  # token positions in the running requests' blocks that hold nothing yet
    num_foreign_calls: int = 0  # into the native library
    foreign_seconds: float = 0.0  # of execute_seconds, inside it
    num_failed: int = 0  # requests whose step failed


class StepOutputs(Struct, array_like=True, gc=False):
    """Everything the front hears from one step (or several, merged, when the front is slow)."""

    deltas: list[RequestDelta]
    records: list[StepRecord]
    memory: MemoryMap | None = None  # for whoever asked


ToEngine = AddRequest | AbortRequests | FinishRequest | AskMemory | Shutdown
ToFront = EngineReady | EngineFailed | StepOutputs
