"""Our own reader of a GGUF file's header: typed metadata and tensor places over a memory map.

A header is untrusted input: every count, length, offset, dimension and product is checked against the bytes that are
there before anything is read or allocated. Source: the format's specification, docs/gguf.md in ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from octavo.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ARRAY = 1 << 24  # elements; vocabularies have less than a million
MAX_NAME_BYTES = (1 << 16) - 1
MAX_DIMS = 4
MAX_NESTING = 4  # arrays of arrays
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

Scalar = int | float | bool | str
Value = Scalar | list[Any]

# Tensor types by id: name, elements a block, bytes a block. Source: enum ggml_type in ggml.h.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
FLOAT_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # BF16 as bit patterns

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {  # metadata value types by id, as struct names them
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_MIN_ENTRY_BYTES = 8 + 4 + 1  # key length, value type, a one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimensions, one of them, type, offset
_LENGTH = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in numpy order (slowest first), `offset` in bytes from the file's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """A mapped file: `metadata` by key, `tensors` by name."""

    def __init__(
        self, path: Path, mapped: mmap.mmap, metadata: dict[str, Value], tensors: dict[str, GGUFTensor]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._map = mapped

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Maps a file and parses its header. As long as what this gave is held, and the file has not changed, it gives
        the same again: a vocabulary takes long to read.

        Raises:
            ModelFileError: not a GGUF file, truncated or corrupt; names the field.
            UnsupportedModelError: one part of a split file, or a tensor type without a row here.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < len(MAGIC):
                    raise ModelFileError(f"{path} is not a GGUF file: it has fewer than {len(MAGIC)} bytes")
                state = os.fstat(file.fileno())
                key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
                if known := _OPEN.get(key):
                    return known
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
        metadata, tensors = _HeaderReader(path, mapped).read()
        return _OPEN.setdefault(key, cls(path, mapped, metadata, tensors))

    def data(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of a tensor's bytes, as runtime.base.Tensor wants them.

        Float types have the logical shape (BF16 as uint16); all others are uint8 [rows, bytes per row].
        """
        import numpy as np  # who needs the metadata alone, a tokenizer, starts without it

        tensor = self.tensors[name]
        raw = np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        if tensor.type in FLOAT_TYPES:
            return raw.view(FLOAT_TYPES[tensor.type]).reshape(tensor.shape)
        return raw.reshape(math.prod(tensor.shape[:-1]), -1)


_OPEN: WeakValueDictionary[tuple[int, ...], GGUFFile] = WeakValueDictionary()  # by what a changed file has not


class _HeaderReader:
    """A cursor over the header. Errors name the field being read."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path = path
        self._map = mapped
        self._size = len(mapped)
        self._at = 0
        self._field = "the file header"

    def read(self) -> tuple[dict[str, Value], dict[str, GGUFTensor]]:
        self._read_magic()
        num_tensors, num_entries = self._integer("<u8"), self._integer("<u8")
        self._check_count("the tensor count", num_tensors, _MIN_TENSOR_BYTES)
        self._check_count("the metadata count", num_entries, _MIN_ENTRY_BYTES)
        metadata: dict[str, Value] = {}
        for index in range(num_entries):
            self._field = f"metadata key {index}"
            key = self._name()
            if key in metadata:
                raise self._corrupt(f"metadata key {key!r:.80} occurs twice")
            self._field = f"metadata {key!r:.80}"
            metadata[key] = self._value(self._integer("<u4"))
        self._refuse_split(metadata)
        return metadata, self._read_tensors(num_tensors, self._alignment(metadata))

    def _read_magic(self) -> None:
        if self._map[:4] != MAGIC:
            raise ModelFileError(f"{self._path} is not a GGUF file: it begins with {self._map[:4]!r}, not {MAGIC!r}")
        self._at = 4
        version = self._integer("<u4")
        if version and not version & 0xFFFF:
            raise ModelFileError(f"{self._path} is a big-endian GGUF file; only little-endian ones are read")
        if version not in VERSIONS:
            raise ModelFileError(f"{self._path} is GGUF version {version}; versions 2 and 3 are read: convert it again")

    def _refuse_split(self, metadata: dict[str, Value]) -> None:
        count = metadata.get("split.count", 1)
        if count not in (0, 1):
            raise UnsupportedModelError(
                f"{self._path} is one of {count} parts of a split GGUF file; "
                "join them first: llama-gguf-split --merge FIRST_PART JOINED"
            )

    def _alignment(self, metadata: dict[str, Value]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._corrupt(f"general.alignment must be a power of two up to {MAX_ALIGNMENT}, not {value!r:.80}")
        return value

    def _read_tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        relative: dict[str, GGUFTensor] = {}  # offsets count from the data section
        for index in range(count):
            self._field = f"the entry of tensor {index}"
            tensor = self._tensor(alignment)
            if tensor.name in relative:
                raise self._corrupt(f"tensor {tensor.name!r:.80} occurs twice")
            relative[tensor.name] = tensor
        start = -(-self._at // alignment) * alignment
        end, last = start, "the header"
        tensors = dict(relative)
        for tensor in sorted(relative.values(), key=lambda t: t.offset):
            placed = GGUFTensor(tensor.name, tensor.type, tensor.shape, start + tensor.offset, tensor.nbytes)
            if placed.offset < end:
                raise self._corrupt(f"tensor {tensor.name!r} overlaps {last}")
            end, last = placed.offset + placed.nbytes, f"tensor {tensor.name!r}"
            if end > self._size:
                raise self._corrupt(f"{last} ends at byte {end}, but the file has {self._size}")
            tensors[tensor.name] = placed
        return tensors

    def _tensor(self, alignment: int) -> GGUFTensor:
        name = self._name()
        self._field = f"tensor {name!r:.80}"
        num_dims = self._integer("<u4")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._corrupt(f"{self._field} has {num_dims} dimensions, not 1 to {MAX_DIMS}")
        shape = tuple(self._integer("<u8") for _ in range(num_dims))[::-1]
        type_id, offset = self._integer("<u4"), self._integer("<u8")
        if type_id not in TENSOR_TYPES:
            raise UnsupportedModelError(
                f"{self._path}: {self._field} has type number {type_id}, which is damage or newer than this reader; "
                f"known types: {', '.join(known for known, _, _ in TENSOR_TYPES.values())}"
            )
        type_name, block, block_bytes = TENSOR_TYPES[type_id]
        nbytes = math.prod(shape) // block * block_bytes
        if not 0 < nbytes <= self._size:
            raise self._corrupt(f"{self._field} has shape {list(shape)}, {nbytes} bytes in a file of {self._size}")
        if shape[-1] % block:
            raise self._corrupt(f"{self._field} has rows of {shape[-1]}, but {type_name} comes in blocks of {block}")
        if offset % alignment:
            raise self._corrupt(f"{self._field} has offset {offset}, not a multiple of the alignment {alignment}")
        return GGUFTensor(name, type_name, shape, offset, nbytes)

    def _value(self, type_id: int, nesting: int = 0) -> Value:
        if type_id == _STRING:
            return self._strings(1)[0]
        if type_id == _ARRAY:
            return self._array(nesting + 1)
        return self._numbers(type_id, 1)[0]

    def _array(self, nesting: int) -> list[Any]:
        if nesting > MAX_NESTING:
            raise self._corrupt(f"{self._field} nests arrays more than {MAX_NESTING} deep")
        type_id, count = self._integer("<u4"), self._integer("<u8")
        if count > MAX_ARRAY:
            raise self._corrupt(f"{self._field} claims {count} elements; the limit is {MAX_ARRAY}")
        if type_id == _STRING:
            return self._strings(count)
        if type_id == _ARRAY:
            self._check_count(self._field, count, 4 + 8)
            return [self._array(nesting + 1) for _ in range(count)]
        return self._numbers(type_id, count)

    def _numbers(self, type_id: int, count: int) -> list[Scalar]:
        if type_id not in _NUMBERS:
            raise self._corrupt(f"{self._field} has value type {type_id}, which does not exist")
        numbers = struct.Struct(f"<{count}{_NUMBERS[type_id]}")
        values = list(numbers.unpack(self._take(numbers.size)))
        if type_id == _BOOL:
            if (largest := max(values, default=0)) > 1:
                raise self._corrupt(f"{self._field} is a boolean of {largest}, not 0 or 1")
            values = list(map(bool, values))
        return values

    def _strings(self, count: int) -> list[str]:
        """The hot loop: a vocabulary has hundreds of thousands of strings, so it works on locals."""
        self._check_count(self._field, count, 8)
        mapped, at, last = self._map, self._at, self._size - 8
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                begin = at + 8
                if at > last or (at := begin + _LENGTH(mapped, at)[0]) > self._size:
                    raise self._truncated(at)
                append(mapped[begin:at].decode())
        except UnicodeDecodeError as error:
            raise self._corrupt(f"{self._field} is not UTF-8 ({error.reason})") from None
        self._at = at
        return strings

    def _name(self) -> str:
        begin = self._at
        name = self._strings(1)[0]
        if not name or self._at - begin - 8 > MAX_NAME_BYTES:
            raise self._corrupt(f"{self._field} has a name of {self._at - begin - 8} bytes, not 1 to {MAX_NAME_BYTES}")
        return name

    def _integer(self, dtype: str) -> int:
        return int.from_bytes(self._take(int(dtype[-1])), "little")

    def _take(self, count: int) -> bytes:
        begin, end = self._at, self._at + count
        if end > self._size:
            raise self._truncated(end)
        self._at = end
        return self._map[begin:end]

    def _check_count(self, what: str, count: int, min_bytes: int) -> None:
        """Refuses a count whose elements, at their smallest, cannot fit into the rest of the file."""
        if count * min_bytes > self._size - self._at:
            raise self._corrupt(f"{what} claims {count} elements, but only {self._size - self._at} bytes are left")

    def _truncated(self, end: int) -> ModelFileError:
        return self._corrupt(f"{self._field} runs to byte {end}, but the file has {self._size}")

    def _corrupt(self, reason: str) -> ModelFileError:
        return ModelFileError(f"{self._path} is truncated or corrupt: {reason}; fetch or convert it again")
