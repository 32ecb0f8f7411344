"""From the tokens of one request to the text its client sees: incremental decoding and stop strings.

Work per token is constant: bytes go through an incremental UTF-8 decoder, characters through one automaton that knows
all stop strings. Nothing that was decoded is decoded again.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """What a few more tokens changed.

    Attributes:
        text: new text, final: it is never taken back.
        stop: the stop string that ended the request, or None.
        num_kept: with `stop`, how many of all generated tokens count: up to the one that completed the stop string.
    """

    text: str
    stop: str | None = None
    num_kept: int | None = None


class TextStream:
    """The text of one generated sequence, as it grows.

    All texts together equal `Tokenizer.decode` of the tokens, up to the stop string; one exception: where decoding
    would drop the space before the first word (SentencePiece), it stays, because this text continues a prompt. An
    incomplete character is held back until its bytes are there, and so is text that may be the beginning of a stop
    string.

    Of several stop strings the one that is completed first counts (of those that end together, the longest), so the
    result does not depend on how the text was cut into tokens. Stop strings completed within the first
    `params.min_tokens` tokens do not count.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._detokenize = params.detokenize
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = _StopFinder(params.stops) if params.stops else None
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self._num_tokens = 0
        self._stopped: TextDelta | None = None

    def add(self, token_ids: Sequence[int], *, ends_with_stop_token: bool = False) -> TextDelta:
        """Take the next tokens; tokens after a stop string are ignored.

        Args:
            token_ids: in order of generation.
            ends_with_stop_token: the last one ended the request (EOS or one of `stop_token_ids`): it counts, but its
                text is left out unless `include_stop_str_in_output`.
        """
        if self._stopped is not None:
            return self._stopped
        if not self._detokenize:
            return TextDelta("")
        silent = ends_with_stop_token and not self._include_stop
        shown = token_ids[:-1] if silent else token_ids
        if self._stops is None:
            return TextDelta(self._decoder.decode(b"".join(map(self._bytes, shown))))
        texts: list[str] = []
        for token in shown:
            self._num_tokens += 1
            text, stop = self._search(self._decoder.decode(self._bytes(token)), self._stops)
            texts.append(text)
            if stop is not None:
                self._stopped = TextDelta("", stop, self._num_tokens)
                return TextDelta("".join(texts), stop, self._num_tokens)
        self._num_tokens += silent
        return TextDelta("".join(texts))

    def finish(self) -> str:
        """What is still held back; call it once, when no token will follow. "" after a stop string."""
        if self._stopped is not None or not self._detokenize:
            return ""
        text = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return text

    def _bytes(self, token: int) -> bytes:
        return b"" if token in self._skipped else self._tokenizer.token_bytes(token)

    def _search(self, text: str, stops: _StopFinder) -> tuple[str, str | None]:
        """What may go out now that `text` has come in, and the stop string that it completes."""
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            stop = stops.feed(character)
            if stop is not None and self._num_tokens > self._min_tokens:
                return pending[: end if self._include_stop else end - len(stop)], stop
        cut = len(pending) - stops.depth
        self._held = pending[cut:]
        return pending[:cut], None


class _StopFinder:
    """Finds the first of several strings in a stream of characters (Aho and Corasick 1975).

    `depth` is the length of the longest suffix seen so far that begins one of the strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depths = [0]
        self._found: list[str | None] = [None]  # by node: the longest stop that ends there
        self._fail = [0]
        self._node = 0
        for stop in stops:
            self._insert(stop)
        self._link()

    @property
    def depth(self) -> int:
        return self._depths[self._node]

    def feed(self, character: str) -> str | None:
        """The stop string that `character` completes, or None."""
        node = self._node
        while node and character not in self._next[node]:
            node = self._fail[node]
        self._node = self._next[node].get(character, 0)
        return self._found[self._node]

    def _insert(self, stop: str) -> None:
        node = 0
        for character in stop:
            if character not in self._next[node]:
                self._next[node][character] = len(self._next)
                self._next.append({})
                self._depths.append(self._depths[node] + 1)
                self._found.append(None)
                self._fail.append(0)
            node = self._next[node][character]
        self._found[node] = stop

    def _link(self) -> None:
        """Breadth first: where to go on, and what has been found, when a longer string breaks off."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for character, child in self._next[node].items():
                fail = self._fail[node]
                while fail and character not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[child] = self._next[fail].get(character, 0)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fail[child]]
                queue.append(child)
