"""Between the engine's reader and one consumer. Bounded: at most one output waits, later ones merge into it."""

from __future__ import annotations

import asyncio

from octavo.outputs import RequestOutput
from octavo.sampling_params import RequestOutputKind


class Outbox:
    """A slow consumer never holds the engine and never piles up outputs; it gets larger ones."""

    def __init__(self, kind: RequestOutputKind) -> None:
        self._deltas = kind is RequestOutputKind.DELTA
        self._waiting: RequestOutput | Exception | None = None
        self._filled = asyncio.Event()

    def put(self, item: RequestOutput | Exception) -> None:
        """Hands over an output, or the error that ends the stream."""
        waiting = self._waiting
        if self._deltas and isinstance(waiting, RequestOutput) and isinstance(item, RequestOutput):
            _add(waiting, item)
        else:  # a cumulative output replaces the one before it
            self._waiting = item
        self._filled.set()

    async def take(self) -> RequestOutput | Exception:
        """What has gathered since the last time; waits for something."""
        await self._filled.wait()
        self._filled.clear()
        item, self._waiting = self._waiting, None
        assert item is not None
        return item


def _add(earlier: RequestOutput, later: RequestOutput) -> None:
    by_index = {output.index: output for output in earlier.outputs}
    for new in later.outputs:
        old = by_index.get(new.index)
        if old is None:
            earlier.outputs.append(new)
            continue
        old.text += new.text
        old.token_ids.extend(new.token_ids)
        if new.logprobs is not None:
            old.logprobs = [*(old.logprobs or []), *new.logprobs]
        old.cumulative_logprob = new.cumulative_logprob
        old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason
    earlier.finished = later.finished
    earlier.metrics = later.metrics
    earlier.num_cached_tokens = later.num_cached_tokens
