"""How one request wants its tokens chosen and when it wants to stop. Names and defaults are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

from octavo.errors import InvalidValueError, UnsupportedParameterError

MAX_BEAM_WIDTH = 64
MAX_STOP = 16
MAX_STOP_LENGTH = 256  # characters
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_IDS = 1 << 16
MAX_BAD_WORDS = 128
MAX_GRAMMAR = 1 << 16  # characters of a specification as JSON
MAX_NESTING = 32
MAX_TOKENS = 1 << 24  # of a request; the model's context binds long before
BOUNDS: dict[str, tuple[float, float]] = {  # of numbers, here, in HTTP bodies and in a generation_config.json
    "n": (1, 128),
    "best_of": (1, 128),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),  # without 0
    "top_k": (-1, 1 << 30),
    "min_p": (0.0, 1.0),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "max_tokens": (1, MAX_TOKENS),
    "min_tokens": (0, MAX_TOKENS),
    "max_thinking_tokens": (0, MAX_TOKENS),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "length_penalty": (-10.0, 10.0),
}
_MAY_BE_NONE = {"best_of", "seed", "max_tokens", "max_thinking_tokens", "logprobs", "prompt_logprobs"}
_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "use_beam_search")

Pooling = Literal["last", "mean"]


class RequestOutputKind(StrEnum):
    """What each RequestOutput of a stream carries."""

    CUMULATIVE = "cumulative"  # everything so far
    DELTA = "delta"  # what is new since the last one
    FINAL_ONLY = "final_only"  # one output, at the end


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """What the answer must look like; exactly one of these, as in vLLM.

    Raises InvalidValueError: none or several are given, or one is too large or nested too deeply.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or EBNF with ::=
    json_object: bool | None = None  # any JSON object
    asked_as: str = "structured_outputs"  # the parameter that errors name

    def __post_init__(self) -> None:
        if len(self._given()) != 1:
            raise InvalidValueError(
                "give exactly one of json, regex, choice, grammar, json_object", param=self.asked_as
            )
        kind, spec = self.chosen
        if is_too_large(spec):
            raise InvalidValueError(
                f"{kind} must have at most {MAX_GRAMMAR} characters and {MAX_NESTING} levels", param=self.asked_as
            )
        if kind in ("regex", "grammar") and not isinstance(spec, str):
            raise InvalidValueError(f"{kind} must be a string, not {_show(spec)}", param=self.asked_as)
        is_list = isinstance(self.choice, list | tuple) and all(isinstance(text, str) and text for text in self.choice)
        if kind == "choice" and not (is_list and self.choice):
            raise InvalidValueError("choice must be a list of strings, none empty", param=self.asked_as)

    @property
    def chosen(self) -> tuple[str, Any]:
        """The one that is given, and its name."""
        return self._given()[0]

    def _given(self) -> list[tuple[str, Any]]:
        names = ("json", "regex", "choice", "grammar", "json_object")
        return [(name, value) for name in names if (value := getattr(self, name)) not in (None, False)]


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
    max_thinking_tokens: int | None = None  # then thoughts are ended
    thinking_marks: tuple[str, str] = ("<think>", "</think>")  # around thoughts; "" first: they begin the answer
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    use_beam_search: bool = False  # keeps the best_of (default n) likeliest answers, returns the n best
    length_penalty: float = 1.0  # an answer's score is its log probability over length ** length_penalty
    early_stopping: bool | str = False  # True: as soon as there are enough answers; "never": not while one could win
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: Any | None = None
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._refuse_unbuilt()
        for name, (low, high) in BOUNDS.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                _number(name, value, low, high)
        if self.top_p == 0.0:
            raise InvalidValueError("top_p must be above 0 and at most 1; for greedy use temperature=0", param="top_p")
        _number("best_of", self.num_candidates, self.n, BOUNDS["n"][1])
        _number("min_tokens", self.min_tokens, 0, self.max_tokens or MAX_TOKENS)
        for name in _SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidValueError(f"{name} must be True or False, not {_show(value)}", param=name)
        if _stop_list(self.stop) and not self.detokenize:
            raise InvalidValueError("stop strings need detokenize=True; use stop_token_ids", param="stop")
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_IDS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidValueError("allowed_token_ids must name at least one token", param="allowed_token_ids")
        _words("bad_words", self.bad_words, MAX_BAD_WORDS)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise InvalidValueError(
                f"structured_outputs must be StructuredOutputsParams, not {_show(self.structured_outputs)}",
                param="structured_outputs",
            )
        if self.structured_outputs and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise InvalidValueError(f"{name} does not go with structured outputs: they say when to end", param=name)
        self._check_logit_bias()
        self._check_beams()
        try:
            self.output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            raise InvalidValueError(
                f"output_kind must be one of {', '.join(RequestOutputKind)}, not {_show(self.output_kind)}",
                param="output_kind",
            ) from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidValueError where a parameter names a token that the model does not have."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            ids = getattr(self, name)
            if ids and max(ids) >= vocab_size:
                raise InvalidValueError(
                    f"{name}: token id {max(ids)} is outside the vocabulary of {vocab_size}", param=name
                )

    @property
    def has_rules(self) -> bool:
        """True when not every token may come next."""
        return bool(self.structured_outputs or self.bad_words or self.allowed_token_ids)

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return _stop_list(self.stop)

    @property
    def num_candidates(self) -> int:
        """Answers to find, of which the n best are returned."""
        return self.best_of or self.n

    @property
    def beam_width(self) -> int:
        """Hypotheses that grow together; 1 without beam search."""
        return self.num_candidates if self.use_beam_search else 1

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when the tokens seen so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    def _refuse_unbuilt(self) -> None:
        for name in ("logits_processors", "truncate_prompt_tokens"):
            if getattr(self, name) not in (None, []):
                raise UnsupportedParameterError(f"{name} is not supported yet: leave it out", param=name)

    def _check_beams(self) -> None:
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidValueError('early_stopping must be true, false or "never"', param="early_stopping")
        if not self.use_beam_search:
            if self.length_penalty != 1.0 or self.early_stopping is not False:
                name = "early_stopping" if self.length_penalty == 1.0 else "length_penalty"
                raise InvalidValueError(f"{name} needs use_beam_search=true", param=name)
            return
        _number("n" if self.best_of is None else "best_of", self.num_candidates, 1, MAX_BEAM_WIDTH)
        asked = {
            "temperature": self.temperature not in (0.0, 1.0),
            "top_p": self.top_p != 1.0,
            "top_k": self.top_k > 0,
            "min_p": self.min_p > 0,
            "logit_bias": bool(self.logit_bias),
            "presence_penalty": self.has_penalties,
            "stop": bool(_stop_list(self.stop)),
            "bad_words": bool(self.bad_words),
            "allowed_token_ids": self.allowed_token_ids is not None,
            "structured_outputs": self.structured_outputs is not None,
            "prompt_logprobs": self.prompt_logprobs is not None,
            "max_thinking_tokens": self.max_thinking_tokens is not None,
        }
        for name, is_asked in asked.items():
            if is_asked:
                raise InvalidValueError(
                    f"beam search takes the likeliest tokens of the plain distribution: leave {name} out", param=name
                )

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidValueError(
                f"logit_bias must be a mapping of at most {MAX_LOGIT_BIAS} token ids to numbers", param="logit_bias"
            )
        for token, bias in self.logit_bias.items():
            _number("logit_bias", token, 0, 1 << 31, "a token id of logit_bias")
            _number("logit_bias", bias, -100.0, 100.0)


@dataclass(kw_only=True)
class BeamSearchParams:
    """Parameters of `LLM.beam_search`, as in vLLM; `early_stopping` is transformers'. Checked as SamplingParams are."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # nothing is sampled: 0 is the only value
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        if self.temperature != 0.0:
            raise InvalidValueError("beam search does not sample: leave temperature out", param="temperature")
        _number("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        self.as_sampling()

    def as_sampling(self) -> SamplingParams:
        """The same, as an engine takes it."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            temperature=0.0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=0,
        )


@dataclass(kw_only=True)
class PoolingParams:
    """How a prompt becomes one vector, of the last states of its tokens. Checked at construction.

    Raises InvalidValueError, or UnsupportedParameterError for `dimensions`: no model here was trained to be cut.
    """

    pooling: Pooling = "last"  # the last token's state, or the mean of all
    normalize: bool = True  # to length 1
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise InvalidValueError(f"pooling must be last or mean, not {_show(self.pooling)}", param="pooling")
        if self.dimensions is not None:
            raise UnsupportedParameterError("this model's vectors cannot be cut: leave it out", param="dimensions")

    def as_sampling(self) -> SamplingParams:
        """The request that the engine runs: it ends where its first token would come."""
        return SamplingParams(temperature=0.0, max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)


def _number(name: str, value: object, low: float, high: float, what: str = "") -> None:
    """Between bounds that are integers only an integer is right."""
    kind, word, form = (int, "an integer", "d") if isinstance(low, int) else (int | float, "a number", "g")
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # false for NaN as well
        raise InvalidValueError(
            f"{what or name} must be {word} from {low:{form}} to {high:{form}}, not {_show(value)}", param=name
        )


def _stop_list(stop: object) -> list[str]:
    return _words("stop", [stop] if isinstance(stop, str) else stop, MAX_STOP, "a string or a list")


def _token_ids(name: str, ids: object, limit: int) -> None:
    if ids is None:
        return
    if not isinstance(ids, Sequence) or isinstance(ids, str) or len(ids) > limit:
        raise InvalidValueError(f"{name} must be a list of at most {limit} token ids", param=name)
    for token in ids:
        _number(name, token, 0, 1 << 31)


def _words(name: str, words: object, limit: int, kind: str = "a list") -> list[str]:
    if words is None:
        return []
    if not isinstance(words, Sequence) or isinstance(words, str) or len(words) > limit:
        raise InvalidValueError(f"{name} must be {kind} of at most {limit} strings", param=name)
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= MAX_STOP_LENGTH:
            raise InvalidValueError(
                f"each of {name} must be a string of 1 to {MAX_STOP_LENGTH} characters, not {_show(word)}", param=name
            )
    return list(words)


def is_too_large(spec: object) -> bool:
    """Whether a text or JSON value has more than MAX_GRAMMAR characters or MAX_NESTING levels."""
    return _nesting(spec) > MAX_NESTING or len(spec if isinstance(spec, str) else str(spec)) > MAX_GRAMMAR


def _nesting(value: object) -> int:
    """Levels of lists and mappings in a JSON value, counted up to one more than MAX_NESTING."""
    level, values = 0, [value]
    while level <= MAX_NESTING:
        values = [
            inner
            for outer in values
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not values:
            break
        level += 1
    return level


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
