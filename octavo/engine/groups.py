"""What the front knows of requests that run: a group is what one caller asked for, its children are the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from octavo.messages import AddRequest
from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.request import FinishReason
from octavo.sampling_params import SamplingParams
from octavo.text.stream import TextStream

if TYPE_CHECKING:
    from octavo.observe.metrics import Metrics  # the offline engine has none

# (when the last tokens of a request had come, when it came itself if there were none, how many came together now): of
# how many requests. Those that run together have arrived together, so a step has few of these.
Arrivals = dict[tuple[float | None, float, int], int]


@dataclass(slots=True)
class Child:
    """One of the n engine requests of a group."""

    parent: Group
    request_id: str
    output: CompletionOutput
    stream: TextStream | None
    request: AddRequest
    alone: bool = False  # the engine runs nothing else at this moment
    first_token_time: float | None = None
    last_token_time: float | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None


@dataclass(slots=True)
class Group:
    """What the caller asked for: one prompt, n answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    vector: bytes | None = None  # what the prompt became, where it is embedded
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    children: list[Child] = field(default_factory=list)
    on_tokens: Callable[[int], None] | None = None  # hears how many came
    relay: Callable[[CompletionOutput], bool] | None = None  # may take what came of an answer that goes on

    @property
    def finished(self) -> bool:
        return None not in [child.output.finish_reason for child in self.children]  # asked for each token: no generator

    def answers(self) -> list[CompletionOutput]:
        """Copies of all answers; of the n best where more were made."""
        outputs = [copy_output(child.output) for child in self.children]
        if len(outputs) > self.params.n:
            outputs.sort(key=lambda output: -(output.cumulative_logprob or 0.0) / max(1, len(output.token_ids)))
            del outputs[self.params.n :]
            for index, output in enumerate(outputs):
                output.index = index
                output.logprobs = output.logprobs if self.params.logprobs is not None else None
        return outputs

    @property
    def error(self) -> Exception | None:
        for child in self.children:
            if child.error is not None:
                return child.error
        return None


@dataclass(slots=True)
class Update:
    """What a batch of deltas brought one group: the output to hand out (if its kind wants one now)."""

    group: Group
    output: RequestOutput | None


def copy_output(output: CompletionOutput) -> CompletionOutput:
    """A snapshot whose lists no later token changes."""
    logprobs = None if output.logprobs is None else list(output.logprobs)
    return replace(output, token_ids=list(output.token_ids), logprobs=logprobs)


def tell_finished(group: Group, metrics: Metrics, unfinished: FinishReason = FinishReason.ABORT) -> None:
    """Tells the metrics how each answer of a group ended; `unfinished` is for those that were cut off."""
    for child in group.children:
        times = replace(group.metrics, first_token_time=child.first_token_time, last_token_time=child.last_token_time)
        metrics.on_finished(
            child.output.finish_reason or unfinished,
            times,
            prompt_tokens=len(group.prompt_token_ids),
            output_tokens=len(child.output.token_ids),
            cached_tokens=group.num_cached_tokens,
            max_tokens=group.params.max_tokens,
        )
    metrics.on_answers(group.params.n, max((len(child.output.token_ids) for child in group.children), default=0))
