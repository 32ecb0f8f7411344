"""Between the engine's reader and one consumer. Bounded: at most one output waits, later ones merge into it.

A consumer that only writes what it gets to a socket may leave a relay: what comes while it waits goes there first, and
it need not wake up for each.
"""

import asyncio
from collections.abc import Callable

from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import RequestOutputKind

Relay = Callable[[CompletionOutput], bool]


class Outbox:
    """A slow consumer never holds the engine and never piles up outputs; it gets larger ones. `relay` says whether it
    has taken what came of an answer; what it raises ends the stream."""

    def __init__(self, kind: RequestOutputKind, relay: Relay | None = None) -> None:
        self._deltas = kind is RequestOutputKind.DELTA
        self._relay = relay
        self._is_awaited = False
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

    def relay(self, new: CompletionOutput) -> bool:
        """Whether it was taken past the consumer, which waits and has nothing to take before it."""
        if self._relay is None or not self._is_awaited or self._waiting is not None:
            return False
        try:
            return self._relay(new)
        except Exception as error:
            self.put(error)
            return True

    async def take(self) -> RequestOutput | Exception:
        """What has gathered since the last time; waits for something."""
        self._is_awaited = True
        try:
            await self._filled.wait()
        finally:
            self._is_awaited = False
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
