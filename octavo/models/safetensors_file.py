"""Our own reader of one safetensors file: a checked header over a memory map, BF16 without torch.

Format: 8 bytes little-endian header length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data;
offsets count from the end of the header. Source: the format's specification in huggingface/safetensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.runtime.base import Tensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16 as bit patterns
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of the header; `begin` is an absolute offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class SafetensorsFile:
    """A mapped file. `entries` by name.

    Raises:
        ModelFileError: a truncated or corrupt file; names the file and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < 8:
                raise self._corrupt(f"{size} bytes are too few for a safetensors file")
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
        header_bytes = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise self._corrupt(f"the header claims {header_bytes} bytes, but the file has {size}")
        self.entries = self._parse(self._bytes[8 : 8 + header_bytes].tobytes(), 8 + header_bytes, size)

    def get(self, name: str) -> Tensor:
        """A view on the mapped bytes (a copy only where they are not aligned).

        Raises:
            UnsupportedModelError: the tensor's dtype is not F32, F16 or BF16.
        """
        entry = self.entries[name]
        if entry.dtype not in _FLOATS:
            raise UnsupportedModelError(f"{self.path}: tensor {name} has dtype {entry.dtype}; known: F32, F16, BF16")
        raw = self._bytes[entry.begin : entry.begin + entry.nbytes]
        data = np.frombuffer(raw, dtype=_FLOATS[entry.dtype]).reshape(entry.shape)
        return Tensor(name, entry.dtype, entry.shape, np.require(data, requirements="A"))

    def _parse(self, raw: bytes, data_start: int, size: int) -> dict[str, StoredTensor]:
        try:
            header = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._corrupt(f"the header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._corrupt("the header is not a JSON object")
        header.pop("__metadata__", None)
        return {name: self._entry(name, value, data_start, size) for name, value in header.items()}

    def _entry(self, name: str, value: Any, data_start: int, size: int) -> StoredTensor:
        if not isinstance(value, dict):
            raise self._corrupt(f"the entry of tensor {name[:200]!r} is not an object")
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if not isinstance(dtype, str):
            raise self._corrupt(f"tensor {name!r} has no dtype")
        if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > 8:
            raise self._corrupt(f"tensor {name!r} has shape {shape!r:.80}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise self._corrupt(f"tensor {name!r} has data_offsets {offsets!r:.80}")
        begin, end = offsets
        if not begin <= end <= size - data_start:
            raise self._corrupt(
                f"tensor {name!r} lies at bytes {begin} to {end}, but the file holds {size - data_start} bytes of data"
            )
        item_bytes = _ITEM_BYTES.get(dtype)
        if item_bytes is not None and math.prod(shape) * item_bytes != end - begin:
            raise self._corrupt(f"tensor {name!r} is {dtype} {shape}, but has {end - begin} bytes")
        return StoredTensor(dtype, tuple(shape), data_start + begin, end - begin)

    def _corrupt(self, reason: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is truncated or corrupt: {reason}; fetch it again")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
