"""What a Request may sample next: a grammar, a list of allowed tokens, words that must not be completed.

Each rule gives a mask, one bit per token of the vocabulary; a Request's mask is the AND of its rules'. The masks of a
step are made after it was launched, so on a device they cost nothing while it runs. A Request with a grammar or bad
words needs its last token on the host first; a list of allowed tokens is always the same, and waits for nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidValueError, OctavoError, StepError
from octavo.messages import AddRequest, RequestDelta
from octavo.step import SchedulerOutput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from octavo.text.tokenizer import Tokenizer

log = logging.getLogger("octavo.engine")
Mask = npt.NDArray[np.uint32]  # [ceil(vocab / 32)]: bit i of word w allows token 32 w + i
MAX_MATCHERS = 64  # built grammars that are kept


class Thinking:
    """Ends thoughts after so many tokens: then nothing but their end may follow."""

    def __init__(self, most: int, begin: list[int], end: list[int]) -> None:
        self._left, self._begin, self._end = most, begin, end
        self._seen: list[int] = []
        self._is_on = not begin

    def take(self, tokens: list[int]) -> None:
        """The Request got these tokens."""
        for token in tokens:
            self._seen = [*self._seen, token][-max(len(self._begin), len(self._end)) :]
            if self._is_on:
                self._left -= 1
                self._is_on = self._seen[-len(self._end) :] != self._end
            elif self._begin and self._seen[-len(self._begin) :] == self._begin:
                self._is_on, self._begin = True, []

    def forced(self) -> int | None:
        """What must come next; None where anything may."""
        if not self._is_on or self._left > 0:
            return None
        done = next(n for n in range(len(self._end) - 1, -1, -1) if self._seen[len(self._seen) - n :] == self._end[:n])
        return self._end[done]


class Rules:
    """The rules of one Request. `take` hears every token it got."""

    def __init__(
        self, vocab_size: int, *, matcher: LLMatcher | None, allowed: Sequence[int] | None, bad: list[list[int]]
    ) -> None:
        self.thinking: Thinking | None = None
        self._matcher = matcher
        self._bad = bad
        self._longest = max(map(len, bad), default=1) - 1  # tokens before the one that completes a word
        self._tail: list[int] = []
        self._static = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
        if allowed is not None:
            self._static[:] = 0
            for token in allowed:
                self._static[token >> 5] |= np.uint32(1 << (token & 31))

    def mask(self) -> Mask:
        """What the next token may be.

        Raises InvalidValueError: nothing at all, or the grammar ran into one of its limits.
        """
        if self.thinking is not None and (token := self.thinking.forced()) is not None:
            mask = np.zeros_like(self._static)
            mask[token >> 5] = np.uint32(1 << (token & 31))
            return mask
        if self._matcher is None:
            mask = self._static.copy()
        else:
            words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)  # may be one more than needed
            mask = words[: len(self._static)] & self._static
            if self._matcher.is_error():
                raise InvalidValueError(f"the grammar became too complex: {self._matcher.get_error():.200}")
        for word in self._bad:
            if len(word) == 1 or self._tail[-(len(word) - 1) :] == word[:-1]:
                mask[word[-1] >> 5] &= ~np.uint32(1 << (word[-1] & 31))
        if not mask.any():
            raise InvalidValueError("the grammar, allowed_token_ids and bad_words leave no token to go on with")
        return mask

    def take(self, tokens: list[int]) -> None:
        """The Request got these tokens. Raises StepError for one that the grammar does not allow."""
        if self.thinking is not None:
            self.thinking.take(tokens)
        if self._longest:
            self._tail = (self._tail + tokens)[-self._longest :]
        if self._matcher is not None and not self._matcher.consume_tokens(tokens):
            raise StepError(f"the grammar refused what it allowed: {self._matcher.get_error():.200}")


class RuleBook:
    """The rules of all live Requests. Grammars are built in a thread, because the first of a kind takes a while.

    Args:
        vocab_size: of the model's logits.
        eos_ids: what the model ends with; a grammar that is complete allows nothing else.
        tokenizer: called once, when the first grammar comes.
    """

    def __init__(self, vocab_size: int, eos_ids: Iterable[int], tokenizer: Callable[[], Tokenizer | None]) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._load = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self.live: dict[str, Rules] = {}  # by request id
        self.opening: dict[str, tuple[AddRequest, Future[Rules]]] = {}  # whose rules are being made
        self._failed: list[tuple[str, Exception]] = []

    def open(self, message: AddRequest) -> None:
        """Begins to make the rules of a request; `opened` hands it back."""
        self._thread = self._thread or ThreadPoolExecutor(1, "rules")
        self.opening[message.request_id] = (message, self._thread.submit(self._make, message))

    def opened(self) -> Iterator[tuple[AddRequest, Exception | None]]:
        """Requests whose rules are made since the last call, or why they could not be: InvalidValueError where it is
        the request's fault."""
        for request_id, (message, future) in list(self.opening.items()):
            if future.done():
                del self.opening[request_id]
                try:
                    self.live[request_id] = future.result()
                except Exception as error:  # of this request, and of no other
                    yield message, _told(request_id, error)
                else:
                    yield message, None

    def forget(self, request_id: str) -> bool:
        """A Request has ended; True if its rules were still being made."""
        self.live.pop(request_id, None)
        return self.opening.pop(request_id, None) is not None

    def masks(self, output: SchedulerOutput) -> dict[int, Mask]:
        """By row, what the sampling Requests of a step may choose; those without rules are not in it."""
        masks: dict[int, Mask] = {}
        for item in output.scheduled:
            rules = self.live.get(item.request_id) if item.samples else None
            if rules is not None:
                try:
                    masks[item.row] = rules.mask()
                except Exception as error:
                    self._failed.append((item.request_id, _told(item.request_id, error)))
        return masks

    def take(self, deltas: Iterable[RequestDelta]) -> list[tuple[str, Exception]]:
        """Hears what a step brought; returns the Requests that cannot go on, and why."""
        for delta in deltas:
            rules = self.live.get(delta.request_id)
            if rules is not None and delta.finish_reason is None:
                try:
                    rules.take(delta.token_ids)
                except Exception as error:
                    self._failed.append((delta.request_id, _told(delta.request_id, error)))
        failed, self._failed = self._failed, []
        return failed

    def forget_finished(self, deltas: Iterable[RequestDelta]) -> None:
        """Forgets the Requests that these deltas end."""
        for delta in deltas:
            if delta.finish_reason is not None:
                self.forget(delta.request_id)

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _make(self, asked: AddRequest) -> Rules:
        matcher = self._matcher(asked.grammar) if asked.grammar is not None else None
        allowed = asked.params.allowed_token_ids
        rules = Rules(self._vocab_size, matcher=matcher, allowed=allowed, bad=asked.bad_ids)
        if asked.think_ids is not None:
            rules.thinking = Thinking(asked.params.max_thinking_tokens or 0, *asked.think_ids)
        rules.take(asked.output_token_ids)
        return rules

    def _matcher(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        first = self._matchers.get(grammar)
        if first is None:
            self._tokenizer = self._tokenizer or self._make_tokenizer()
            first = LLMatcher(self._tokenizer, grammar, log_level=0)
            if first.is_error():
                raise InvalidValueError(f"no grammar can be built: {first.get_error():.500}")
            self._matchers[grammar] = first
            if len(self._matchers) > MAX_MATCHERS:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(grammar)
        return first.deep_copy()

    def _make_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        tokenizer = self._load()
        if tokenizer is None or not self._eos_ids:
            raise InvalidValueError("structured output needs a tokenizer and an end-of-sequence token")
        words: Any = _Words(tokenizer, self._vocab_size, self._eos_ids[0])
        return LLTokenizer(words, n_vocab=self._vocab_size, eos_token=self._eos_ids)


def _told(request_id: str, error: Exception) -> Exception:
    """The error; the log hears of one that nobody raised on purpose."""
    if not isinstance(error, OctavoError):
        log.error("request %s: its rules failed", request_id, exc_info=error)
    return error


class _Words:
    """A vocabulary as llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        num_tokens = min(tokenizer.vocab_size, vocab_size)
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(num_tokens)]
        self.special_token_ids = sorted(token for token in tokenizer.special_ids if token < num_tokens)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special_tokens=False)
