"""From the tokens of one request to the text its client sees: incremental decoding and stop strings.

Work per token does not grow with the text: bytes go through an incremental UTF-8 decoder, and stop strings are looked
for in what is new and in the end of the text that may be the beginning of one. Nothing is decoded twice.
"""

import codecs
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
        self.is_plain = params.detokenize and not params.stops  # decode() does, but for the last token
        self._rest = b""  # the beginning of a character
        self._stops = params.stops
        self._letters = frozenset("".join(params.stops))
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
        if not self._stops:
            return TextDelta(self.decode(shown))
        texts: list[str] = []
        for token in shown:
            self._num_tokens += 1
            text, stop = self._search(self.decode((token,)))
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
        text = self._held + self._rest.decode(errors="replace")
        self._held, self._rest = "", b""
        return text

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that the next tokens complete; stop strings are not looked for."""
        data = self._rest
        for token in tokens:
            if token not in self._skipped:
                data += self._tokenizer.token_bytes(token)
        text, num_read = codecs.utf_8_decode(data, "replace")
        self._rest = data[num_read:]
        return text

    def _search(self, text: str) -> tuple[str, str | None]:
        """What may go out now that `text` has come in, and the stop string that it completes."""
        pending, num_held = self._held + text, len(self._held)
        if self._num_tokens > self._min_tokens:
            found = []  # (end, -length): the first to end, of those the longest
            for stop in self._stops:
                if (at := pending.find(stop, max(0, num_held - len(stop) + 1))) >= 0:
                    found.append((at + len(stop), -len(stop)))
            if found:
                end, length = min(found)
                return pending[: end if self._include_stop else end + length], pending[end + length : end]
        cut = len(pending) - self._longest_beginning(pending)
        self._held = pending[cut:]
        return pending[:cut], None

    def _longest_beginning(self, text: str) -> int:
        """Characters at the end of a text that a stop string begins with."""
        if text[-1:] not in self._letters:
            return 0
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < len(text) - longest:
                if stop.startswith(text[at:]):
                    longest = len(text) - at
                at = text.find(stop[0], at + 1)
        return longest
