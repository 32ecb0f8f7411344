"""How one request wants its tokens chosen and when it wants to stop. Names and defaults are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from octavo.errors import InvalidValueError, UnsupportedParameterError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP = 16
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_TOKENS = 1 << 24  # of a request; the model's context binds long before
MAX_SEED = (1 << 63) - 1


class RequestOutputKind(StrEnum):
    """What each RequestOutput of a stream carries."""

    CUMULATIVE = "cumulative"  # everything so far
    DELTA = "delta"  # what is new since the last one
    FINAL_ONLY = "final_only"  # one output, at the end


@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, as in vLLM; checked at construction.

    Raises:
        InvalidValueError: a value out of its bounds; `.param` names it.
        UnsupportedParameterError: a known parameter that is not built.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: off
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None  # how many alternatives per token; 0 is the sampled token alone
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    use_beam_search: bool = False
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logits_processors: Any | None = None
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._refuse_unbuilt()
        _integer("n", self.n, 1, MAX_N)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidValueError("top_p must be above 0 and at most 1; for greedy use temperature=0", param="top_p")
        _integer("top_k", self.top_k, -1, 1 << 30)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else MAX_TOKENS)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if _stop_list(self.stop) and not self.detokenize:
            raise InvalidValueError("stop strings need detokenize=True; use stop_token_ids", param="stop")
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        self._check_logit_bias()
        try:
            self.output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            raise InvalidValueError(
                f"output_kind must be one of {', '.join(RequestOutputKind)}, not {_show(self.output_kind)}",
                param="output_kind",
            ) from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidValueError where a parameter names a token that the model does not have."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if ids and max(ids) >= vocab_size:
                raise InvalidValueError(
                    f"{name}: token id {max(ids)} is outside the vocabulary of {vocab_size}", param=name
                )

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return _stop_list(self.stop)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when the tokens seen so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    def _refuse_unbuilt(self) -> None:
        unbuilt = {
            "best_of": self.best_of is not None and self.best_of != self.n,
            "prompt_logprobs": self.prompt_logprobs is not None,
            "use_beam_search": self.use_beam_search,
            "bad_words": bool(self.bad_words),
            "allowed_token_ids": self.allowed_token_ids is not None,
            "logits_processors": bool(self.logits_processors),
            "truncate_prompt_tokens": self.truncate_prompt_tokens is not None,
        }
        for name, asked in unbuilt.items():
            if asked:
                raise UnsupportedParameterError(f"{name} is not supported yet: leave it out", param=name)

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidValueError(
                f"logit_bias must be a mapping of at most {MAX_LOGIT_BIAS} token ids to numbers", param="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 1 << 31)
            _number("logit_bias", bias, -100.0, 100.0)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidValueError(f"{name} must be an integer from {low} to {high}, not {_show(value)}", param=name)


def _number(name: str, value: object, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        raise InvalidValueError(f"{name} must be a number from {low:g} to {high:g}, not {_show(value)}", param=name)


def _stop_list(stop: object) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or len(stops) > MAX_STOP:
        raise InvalidValueError(f"stop must be a string or a list of at most {MAX_STOP} strings", param="stop")
    for s in stops:
        if not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_LENGTH:
            raise InvalidValueError(
                f"each stop must be a string of 1 to {MAX_STOP_LENGTH} characters, not {_show(s)}", param="stop"
            )
    return list(stops)


def _token_ids(name: str, ids: object, limit: int) -> None:
    if ids is None:
        return
    if not isinstance(ids, Sequence) or isinstance(ids, str) or len(ids) > limit:
        raise InvalidValueError(f"{name} must be a list of at most {limit} token ids", param=name)
    for token in ids:
        _integer(name, token, 0, 1 << 31)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
