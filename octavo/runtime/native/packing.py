"""Weights from a checkpoint's stored tensors into the library's memory.

Vectors, and all weights of dtype "float32", are row-major float32. Other matrices are packed (native/stores.h): dtype
"bfloat16" keeps every part as bf16, "int8" as int8 (native/int8.h), "quantized" as its own GGUF type (float types, and
rare block types that only the gguf package can read, as bf16). The library converts with all threads.
"""

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelFileError
from octavo.program.ops import Linear, Weight
from octavo.program.program import Program
from octavo.runtime.base import Tensor, WeightSource
from octavo.runtime.native import codes
from octavo.runtime.native.library import check
from octavo.runtime.reference.tensors import stack, to_float32

_BFLOAT16 = "BF16"  # the store of floats
_INT8 = "INT8"


class Packer:
    """Puts the weights of one program into the library's memory.

    Raises:
        ModelFileError: a tensor whose shape is not the one the program was recorded for.
        UnsupportedModelError: a block type that nobody here can decode.
    """

    def __init__(self, library: ctypes.CDLL, program: Program, source: WeightSource, dtype: str) -> None:
        self._library = library
        self._program = program
        self._source = source
        self._dtype = dtype
        self._gated = {
            node.weight.parts for node in program.nodes if isinstance(node, Linear) and node.activation.endswith("_mul")
        }

    def bytes(self) -> dict[tuple[str, ...], int]:
        """Bytes that pack() makes resident for each weight, by its parts; from shapes and types alone."""
        return {weight.parts: self._bytes(weight) for weight in self._program.weights}

    def pack(self, engine: ctypes.c_void_p) -> dict[tuple[str, ...], int]:
        """Packs every weight; returns their ids by parts, so that a tied one is there once."""
        ids: dict[tuple[str, ...], int] = {}
        for weight in self._program.weights:
            index = ids[weight.parts] = len(ids)
            if self._is_packed(weight):
                self._pack_parts(engine, index, weight)
            else:
                self._pack_floats(engine, index, weight)
        return ids

    def _is_packed(self, weight: Weight) -> bool:
        return self._dtype != "float32" and not weight.is_exact

    def _bytes(self, weight: Weight) -> int:
        if not self._is_packed(weight):
            return 4 * math.prod(weight.shape)
        return sum(
            self._library.octavo_part_bytes(self._store(part, weight.shape[1]).encode(), rows, weight.shape[1])
            for part, _, rows in self._pieces(weight)
        )

    def _store(self, part: str, cols: int) -> str:
        """The GGUF type that a part is kept as, or int8."""
        if self._dtype == "int8":
            return _INT8
        stored = self._source.type_of(part) if self._dtype == "quantized" else _BFLOAT16
        if stored == codes.SOURCE_TYPE:
            stored = codes.CODED_TYPE
        return stored if self._library.octavo_row_bytes(stored.encode(), cols) else _BFLOAT16

    def _pieces(self, weight: Weight) -> Iterator[tuple[str, int, int]]:
        """(part, its first row, rows): the parts, cut in half where a gated activation takes gate and up apart."""
        half = weight.shape[0] // 2 if weight.parts in self._gated else 0
        start = 0
        for part, rows in zip(weight.parts, weight.part_rows, strict=True):
            first = half - start if start < half < start + rows else rows
            yield part, 0, first
            if first < rows:
                yield part, first, rows - first
            start += rows

    def _pack_floats(self, engine: ctypes.c_void_p, index: int, weight: Weight) -> None:
        rows, cols = (1, *weight.shape)[-2:]
        check(self._library, self._library.octavo_add_weight(engine, rows, cols))
        if len(weight.shape) == 1:
            self._convert(engine, index, 0, 1, ("F32", stack(weight, self._source, "float32")))
            return
        first = 0
        for part, count in zip(weight.parts, weight.part_rows, strict=True):
            self._convert(engine, index, first, count, self._stored(part, (count, cols)))
            first += count

    def _pack_parts(self, engine: ctypes.c_void_p, index: int, weight: Weight) -> None:
        cols = weight.shape[1]
        check(self._library, self._library.octavo_add_packed(engine, cols))
        at, sizes = 0, dict(zip(weight.parts, weight.part_rows, strict=True))
        for part, first, rows in self._pieces(weight):
            store = self._store(part, cols).encode()
            check(self._library, self._library.octavo_add_part(engine, index, rows, store))
            type_name, data = self._stored(part, (sizes[part], cols))
            self._convert(engine, index, at, rows, (type_name, data[first : first + rows]))
            at += rows

    def _convert(
        self, engine: ctypes.c_void_p, index: int, first: int, rows: int, stored: tuple[str, npt.NDArray[Any]]
    ) -> None:
        type_name, data = stored
        code = self._library.octavo_pack(
            engine, index, first, rows, type_name.encode(), data.ctypes.data, ctypes.c_int64(data.nbytes)
        )
        check(self._library, code)

    def _stored(self, part: str, shape: tuple[int, int]) -> tuple[str, npt.NDArray[Any]]:
        tensor = self._source.get(part)
        if tensor.shape != shape:
            raise ModelFileError(f"tensor {tensor.name} has shape {tensor.shape}, but {part} must be {shape}")
        return _decodable(self._library, tensor)


def _decodable(library: ctypes.CDLL, tensor: Tensor) -> tuple[str, npt.NDArray[Any]]:
    """(type name, contiguous data) that the library can decode."""
    rows, cols = tensor.shape
    if tensor.type == codes.SOURCE_TYPE:
        return codes.CODED_TYPE, codes.to_codes(tensor.data)
    row_bytes = library.octavo_row_bytes(tensor.type.encode(), cols)
    if not row_bytes:
        return "F32", np.ascontiguousarray(to_float32(tensor))
    if tensor.nbytes != rows * row_bytes:
        raise ModelFileError(
            f"tensor {tensor.name} ({tensor.type}, {rows} x {cols}) has {tensor.nbytes} bytes, not {rows * row_bytes}"
        )
    return tensor.type, np.ascontiguousarray(tensor.data)
