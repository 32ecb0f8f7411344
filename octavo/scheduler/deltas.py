"""What is told of a Request: its row to the worker, its tokens and its end to the front."""

from octavo.messages import RequestDelta
from octavo.request import FinishReason, Request
from octavo.step import Blocks, NewRow, TokenLogprobs


def new_row(request: Request, block_ids: Blocks, num_logprobs: int) -> NewRow:
    """The whole state of its row, as it is now."""
    wanted = request.params.prompt_logprobs if request.reads_prompt else None
    return NewRow(
        row=request.row,
        request_id=request.request_id,
        epoch=request.epoch,
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        block_ids=block_ids,
        num_computed_tokens=request.num_computed_tokens,
        params=request.params,
        stop_ids=request.stop_ids,
        seed=request.seed,
        num_logprobs=num_logprobs,
        pooling=request.pooling,
        num_prompt_logprobs=-1 if wanted is None else wanted,
    )


def append(
    request: Request, tokens: list[int], logprobs: list[TokenLogprobs] | None, vector: bytes | None = None
) -> RequestDelta:
    """Appends new tokens up to the one that ends the Request, if any does: the delta then has a finish reason."""
    token_ids, num_prompt = request.token_ids, request.num_prompt_tokens
    delta = make_delta(request, tokens, logprobs)
    delta.vector = vector
    for count, token in enumerate(tokens, 1):
        token_ids.append(token)
        if token in request.stop_ids and len(token_ids) - num_prompt > request.params.min_tokens:
            delta.finish_reason = FinishReason.STOP
            delta.stop_reason = token if token in (request.params.stop_token_ids or ()) else None
        elif len(token_ids) >= request.max_length:
            delta.finish_reason = FinishReason.LENGTH
        else:
            continue
        delta.token_ids, delta.logprobs = tokens[:count], logprobs[:count] if logprobs else None
        break
    if vector is not None:
        delta.token_ids = []  # it stood for the vector
    elif request.reads_prompt:
        delta.prompt_logprobs, request.prompt_logprobs, request.reads_prompt = request.prompt_logprobs, [], False
    return delta


def make_delta(
    request: Request,
    token_ids: list[int] | None = None,
    logprobs: list[TokenLogprobs] | None = None,
    finish_reason: FinishReason | None = None,
    error: str | None = None,
) -> RequestDelta:
    """What a step brought a Request."""
    first = request.first_scheduled_time
    return RequestDelta(
        request_id=request.request_id,
        token_ids=token_ids if token_ids is not None else [],
        logprobs=logprobs,
        finish_reason=finish_reason,
        num_cached_tokens=request.num_cached_tokens,
        queue_time=first - request.arrival_time if first is not None else 0.0,
        error=error,
    )


def last_deltas(
    request: Request, reason: FinishReason, error: str | None = None, kind: str | None = None
) -> list[RequestDelta]:
    """The last delta of each of its answers; `kind` is the error's class."""
    deltas = []
    for answer in request.answer_ids:
        delta = make_delta(request, finish_reason=reason, error=error)
        delta.request_id, delta.error_kind = answer, kind
        deltas.append(delta)
    return deltas
