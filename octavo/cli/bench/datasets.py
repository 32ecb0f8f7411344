"""What a benchmark asks: random ids, shared prefixes, ShareGPT conversations, or the prompts of a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.files import read_text
from octavo.config import one_of
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

NAMES = ("random", "sharegpt", "custom", "prefix_repetition")
_SHAREGPT_MIN = 4  # tokens; shorter ones are dropped, as are prompts and wholes over these limits
_SHAREGPT_MAX_PROMPT = 1024
_SHAREGPT_MAX_TOTAL = 2048


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to make: its prompt as ids, as text where it came as text, and how many tokens to ask for."""

    token_ids: list[int]
    output_len: int
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Which prompts to make. Lengths are tokens.

    Raises ConfigError from `prompts` when a file is missing, unreadable or holds nothing usable.
    """

    name: str = "random"
    path: Path | None = None
    num_prompts: int = 32
    seed: int = 0
    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0  # random: lengths vary uniformly by this share, up and down
    prefix_len: int = 0  # random: one prefix before all prompts; prefix_repetition: of each prefix
    num_prefixes: int = 10
    fixed_output_len: int | None = None  # sharegpt and custom: instead of what the file says

    def __post_init__(self) -> None:
        one_of("--dataset-name", self.name, NAMES)
        if (self.path is None) == (self.name in ("sharegpt", "custom")):
            verb = "needs" if self.path is None else "reads no"
            raise ConfigError(f"--dataset-name {self.name} {verb} --dataset-path FILE")
        if not 0.0 <= self.range_ratio < 1.0:
            raise ConfigError(f"--random-range-ratio must be at least 0 and below 1, not {self.range_ratio}")

    def prompts(self, tokenizer: Tokenizer | None, vocab_size: int) -> list[Prompt]:
        """The prompts, the same for the same seed. Text datasets need a tokenizer."""
        draw = random.Random(self.seed)
        if self.name in ("random", "prefix_repetition"):
            special = tokenizer.special_ids if tokenizer else frozenset()
            allowed = [i for i in range(vocab_size) if i not in special]
            return list(self._random(draw, allowed) if self.name == "random" else self._prefixes(draw, allowed))
        if tokenizer is None:
            raise ConfigError(f"--dataset-name {self.name} needs a tokenizer")
        rows = self._sharegpt(draw, tokenizer) if self.name == "sharegpt" else self._custom(tokenizer)
        found = [prompt for _, prompt in zip(range(self.num_prompts), rows, strict=False)]
        if not found:
            raise ConfigError(f"{self.path} holds no usable prompt for --dataset-name {self.name}")
        return [found[i % len(found)] for i in range(self.num_prompts)]  # asked again when there are too few

    def _random(self, draw: random.Random, allowed: list[int]) -> Iterator[Prompt]:
        prefix = draw.choices(allowed, k=self.prefix_len)
        for _ in range(self.num_prompts):
            length, output = self._vary(draw, self.input_len), self._vary(draw, self.output_len)
            yield Prompt(prefix + draw.choices(allowed, k=length), output)

    def _vary(self, draw: random.Random, length: int) -> int:
        low = max(1, math.floor(length * (1 - self.range_ratio)))
        return draw.randint(low, max(low, math.ceil(length * (1 + self.range_ratio))))

    def _prefixes(self, draw: random.Random, allowed: list[int]) -> Iterator[Prompt]:
        prefixes = [draw.choices(allowed, k=self.prefix_len) for _ in range(self.num_prefixes)]
        made = [
            Prompt(prefixes[i % self.num_prefixes] + draw.choices(allowed, k=self.input_len), self.output_len)
            for i in range(self.num_prompts)
        ]
        draw.shuffle(made)
        return iter(made)

    def _sharegpt(self, draw: random.Random, tokenizer: Tokenizer) -> Iterator[Prompt]:
        rows = self._load_json(self._read())
        if not isinstance(rows, list):
            raise ConfigError(f"{self.path} must hold a list of conversations, as ShareGPT's files do")
        talks = [talk for row in rows if (talk := _first_turns(row))]
        draw.shuffle(talks)
        for asked, answered in talks:
            ids = tokenizer.encode(asked)
            output = self.fixed_output_len or len(tokenizer.encode(answered))
            too_short = len(ids) < _SHAREGPT_MIN or (self.fixed_output_len is None and output < _SHAREGPT_MIN)
            if too_short or len(ids) > _SHAREGPT_MAX_PROMPT or len(ids) + output > _SHAREGPT_MAX_TOTAL:
                continue
            yield Prompt(ids, output, asked)

    def _custom(self, tokenizer: Tokenizer) -> Iterator[Prompt]:
        for number, line in enumerate(self._read().splitlines(), start=1):
            if not line.strip():
                continue
            row = self._load_json(line, f", line {number}")
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise ConfigError(f'{self.path}, line {number}: expected an object with the string "prompt"')
            output = self.fixed_output_len or row.get("output_tokens", self.output_len)
            if not isinstance(output, int) or isinstance(output, bool) or output < 1:
                raise ConfigError(f"{self.path}, line {number}: output_tokens must be 1 or more, not {output!r}")
            yield Prompt(tokenizer.encode(row["prompt"]), output, row["prompt"])

    def _read(self) -> str:
        assert self.path is not None
        return read_text("--dataset-path", self.path)

    def _load_json(self, text: str, where: str = "") -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{self.path}{where} is not JSON: {error}") from error


def _first_turns(row: object) -> tuple[str, str] | None:
    """Question and answer of a ShareGPT row; None for a row without them."""
    try:
        first, second = row["conversations"][:2]  # type: ignore[index]
        return str(first["value"]), str(second["value"])
    except (KeyError, TypeError, ValueError):
        return None
