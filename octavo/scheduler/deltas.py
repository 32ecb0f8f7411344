"""What the front is told of a Request that ends before its time."""

from __future__ import annotations

from octavo.messages import RequestDelta
from octavo.request import FinishReason, Request
from octavo.scheduler.counts import make_delta


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
