"""Reads a checkpoint's JSON files field by field: every number is checked for type and bounds before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ModelFileError

MAX_JSON_BYTES = 64 << 20  # a config is a few kilobytes
MAX_SIZE = 1 << 31  # of any dimension


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelFileError: no such file, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


class Fields:
    """A JSON object with checked access. A field that is null counts as absent; `default` None makes it required.

    Every method raises ModelFileError naming file and field.
    """

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        self._values = values
        self._path = path
        self._prefix = prefix

    def has(self, name: str) -> bool:
        """True when the field is there and not null."""
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        """Every field that is there."""
        return list(self._values)

    def raw(self, name: str) -> Any:
        """The value as parsed, or None."""
        return self._values.get(name)

    def wrong(self, name: str, must: str) -> ModelFileError:
        """The error for a field whose value cannot be."""
        shown = repr(self._values.get(name))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ModelFileError(f"{self._path}: {self._prefix}{name} must be {must}, not {shown}")

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """A whole number from low to high."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number from low to high."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, "a number")
        if not low <= value <= high:  # false for NaN as well
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def texts(self, name: str, count: int) -> list[str]:
        """A list of `count` strings."""
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, str) for v in value):
            raise self.wrong(name, f"a list of {count} strings")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) > MAX_SIZE or not all(map(_is_positive, value)):
            raise self.wrong(name, "a list of positive numbers")
        return tuple(float(v) for v in value)

    def indices(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers from 0 on; empty when absent."""
        value = self.raw(name)
        numbers = [] if value is None else value
        if not isinstance(numbers, list) or not all(type(v) is int and 0 <= v < MAX_SIZE for v in numbers):
            raise self.wrong(name, "a list of numbers from 0 on")
        return tuple(numbers)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or a list of them; empty when absent. Ids outside the vocabulary (-1 is common) can never come
        out and are left out."""
        value = self.raw(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and -1 <= i < MAX_SIZE for i in ids):
            raise self.wrong(name, "a token id or a list of them")
        return tuple(i for i in dict.fromkeys(ids) if 0 <= i < vocab_size)

    def child(self, name: str) -> Fields:
        """A nested object; an empty one when absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, self._path, f"{self._prefix}{name}.")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ModelFileError(f"{self._path}: {self._prefix}{name} is missing")
        return default


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12
