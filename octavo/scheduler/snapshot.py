"""The whole state of a scheduler as plain JSON, and back: what a recording begins with.

Walks the objects of the counting half, whatever their fields are: shared objects stay shared, dictionaries keep their
order. Of token ids only their number is kept, so no prompt can be read from it. Clocks, when blocks were touched, the
prefix hasher with its secret key, and log probabilities are left out: who restores a state brings its own.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from octavo.kvcache.block_hash import BlockHasher
from octavo.request import Request
from octavo.step import TokenLogprobs

ROOMS = ("octavo.scheduler.", "octavo.kvcache.", "octavo.request")
COUNTED = ("prompt_token_ids", "token_ids")


class LeftOut:
    """Base of objects that are no part of the state."""


def freeze(value: object) -> Any:
    """JSON of an object graph. Raises TypeError for what it does not know: nothing is lost silently."""
    return _Freezer().freeze(value)


def facts(request: Request) -> dict[str, Any]:
    """What a Request is, without its tokens and what only they need: all that decisions depend on."""
    kept: dict[str, Any] = {name: getattr(request, name) for name in Request.__slots__}
    kept |= {name: len(kept[name]) for name in COUNTED}
    params = request.params
    kept |= {"params": request.needs_host_token, "stop_ids": bool(request.stop_ids)}
    kept |= {"cache_salt": None, "prompt_logprobs": [], "num_beams": params.beam_width if params.use_beam_search else 0}
    return kept


class _Freezer:
    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._seen: list[object] = []  # kept alive, so that ids stay theirs

    def freeze(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return {"enum": value.value, "of": type(value).__name__}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, tuple):
            return {"tuple": [self.freeze(item) for item in value]}
        if isinstance(value, LeftOut | BlockHasher | TokenLogprobs | array) or callable(value):
            return {"left out": True}
        if id(value) in self._numbers:
            return {"same": self._numbers[id(value)]}
        number = self._numbers[id(value)] = len(self._seen)
        self._seen.append(value)
        return {"number": number, **self._contents(value)}

    def _contents(self, value: Any) -> dict[str, Any]:
        if isinstance(value, list):
            return {"list": [self.freeze(item) for item in value]}
        if isinstance(value, deque):
            return {"deque": [self.freeze(item) for item in value], "maxlen": value.maxlen}
        if isinstance(value, dict):
            pairs = [[self.freeze(key), self.freeze(item)] for key, item in value.items()]
            return {"ordered" if isinstance(value, OrderedDict) else "dict": pairs}
        kind = type(value)
        if not kind.__module__.startswith(ROOMS):
            raise TypeError(f"{kind.__module__}.{kind.__name__} is no part of a scheduler's state")
        fields = facts(value) if isinstance(value, Request) else {name: getattr(value, name) for name in _names(value)}
        return {"class": kind.__name__, "fields": {name: self.freeze(field) for name, field in fields.items()}}


def _names(value: object) -> Iterator[str]:
    yield from getattr(value, "__dict__", ())
    for kind in type(value).__mro__:
        yield from getattr(kind, "__slots__", ())


class Thaw:
    """Makes the object graph again.

    Args:
        classes: by name, all that may be made.
        left_out: what to put in the place of what was left out, by the field's name.
        request: a Request from facts(), whose statuses and the like are thawed already.
    """

    def __init__(
        self, classes: dict[str, Any], left_out: Callable[[str], Any], request: Callable[[dict[str, Any]], Request]
    ) -> None:
        self._classes, self._left_out, self._request = classes, left_out, request
        self._made: dict[int, Any] = {}

    def __call__(self, frozen: Any, name: str = "") -> Any:
        """The object that freeze() gave this JSON for."""
        if not isinstance(frozen, dict):
            return frozen
        if "same" in frozen:
            return self._made[frozen["same"]]
        if "left out" in frozen:
            return self._left_out(name)
        if "enum" in frozen:
            return self._classes[frozen["of"]](frozen["enum"])
        if "bytes" in frozen:
            return bytes.fromhex(frozen["bytes"])
        if "tuple" in frozen:
            return tuple(map(self, frozen["tuple"]))
        return self._object(frozen)

    def _object(self, frozen: dict[str, Any]) -> Any:
        number = frozen["number"]
        if frozen.get("class") == "Request":
            made: Any = self._request({name: self(field, name) for name, field in frozen["fields"].items()})
            self._made[number] = made
        elif "class" in frozen:
            kind = self._classes[frozen["class"]]
            made = self._made[number] = kind.__new__(kind)
            for name, field in frozen["fields"].items():
                object.__setattr__(made, name, self(field, name))  # frozen dataclasses too
        elif "list" in frozen:
            made = self._made[number] = []
            made.extend(map(self, frozen["list"]))
        elif "deque" in frozen:
            made = self._made[number] = deque(map(self, frozen["deque"]), frozen["maxlen"])
        else:
            made = self._made[number] = OrderedDict() if "ordered" in frozen else {}
            for key, item in frozen["ordered"] if "ordered" in frozen else frozen["dict"]:
                made[self(key)] = self(item)
        return made
