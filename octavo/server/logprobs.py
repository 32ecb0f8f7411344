"""Log probabilities in the two shapes of OpenAI: a list of objects (chat), four parallel lists (completions)."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from octavo.outputs import CompletionOutput, Logprob

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no -Infinity


class LogprobsWriter:
    """Turns the logprobs of one choice into JSON shapes, delta after delta.

    Args:
        tokenizer: None writes tokens as "token_id:17".
        num_top: how many alternatives were asked for.
        as_ids: write ids although there is a tokenizer.
        unseen: tokens whose text the answer leaves out.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, num_top: int, *, as_ids: bool = False, unseen: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._unseen = unseen
        self._offset = 0  # characters written so far
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def chat(self, output: CompletionOutput) -> dict[str, Any]:
        """`choices[].logprobs` of a chat answer."""
        content = []
        for token, entries in zip(output.token_ids, output.logprobs or (), strict=True):
            entry = self._entry(token, entries[token])
            entry["top_logprobs"] = [self._entry(other, logprob) for other, logprob in self._top(entries)]
            content.append(entry)
        return {"content": content, "refusal": None}

    def lists(self, token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None]) -> dict[str, Any]:
        """`choices[].logprobs` of a completion: four parallel lists. Offsets count from the start of the first; a token
        outside the most likely ones is listed with them, as OpenAI does; the first token of a prompt has no log
        probability."""
        shape: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, entries in zip(token_ids, logprobs, strict=True):
            shape["text_offset"].append(self._offset)
            shape["tokens"].append(self._label(token))
            shape["token_logprobs"].append(entries and _finite(entries[token]))
            top = dict([*self._top(entries), (token, entries[token])]) if entries else {}
            labelled = {self._label(other): _finite(logprob) for other, logprob in top.items()}
            shape["top_logprobs"].append(labelled if entries else None)
            self._offset += self._num_chars(token)
        return shape

    def _top(self, entries: dict[int, Logprob]) -> list[tuple[int, Logprob]]:
        """The most likely tokens, best first; the sampled one only when it is among them."""
        return sorted(entries.items(), key=lambda entry: -entry[1].logprob)[: self._num_top]

    def _entry(self, token: int, logprob: Logprob) -> dict[str, Any]:
        raw = None if self._as_ids or self._tokenizer is None else self._tokenizer.token_bytes(token)
        text = f"token_id:{token}" if raw is None else raw.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": None if raw is None else list(raw)}

    def _label(self, token: int) -> str:
        """A token as a key: half a character is written as bytes, so that two halves differ."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _num_chars(self, token: int) -> int:
        if self._tokenizer is None or token in self._unseen:
            return 0
        return len(self._decoder.decode(self._tokenizer.token_bytes(token)))


def prompt_shape(logprobs: Iterable[dict[int, Logprob] | None]) -> list[dict[int, dict[str, Any]] | None]:
    """`prompt_logprobs` as vLLM shows them: by token id, the first token's null."""
    return [
        None if entries is None else {token: _vllm(entry) for token, entry in entries.items()} for entries in logprobs
    ]


def _vllm(entry: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)
