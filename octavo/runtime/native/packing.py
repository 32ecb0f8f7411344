"""Weights from a checkpoint's stored tensors into the library's memory.

Matrices are kept row-major as float32 or bfloat16, because one layout must serve an embedding lookup and a Linear when
they are tied. The library decodes the float types and the common GGUF blocks itself, with all threads; rarer blocks go
through the gguf package.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelFileError
from octavo.program.ops import Weight
from octavo.program.program import Program
from octavo.runtime.base import Tensor, WeightSource
from octavo.runtime.native.library import DTYPES, check
from octavo.runtime.reference.tensors import stack, to_float32

_BYTES = {"float32": 4, "bfloat16": 2}


def kept_dtype(weight: Weight, dtype: str) -> str:
    """How a weight is kept: vectors are always float32."""
    return "float32" if weight.role == "vector" else dtype


def packed_bytes(weight: Weight, dtype: str) -> int:
    """Resident bytes of a weight once packed."""
    return math.prod(weight.shape) * _BYTES[kept_dtype(weight, dtype)]


def pack_weights(
    library: ctypes.CDLL,
    engine: ctypes.c_void_p,
    program: Program,
    source: WeightSource,
    dtype: str,
    progress: Callable[[int], None] | None,
) -> dict[tuple[str, ...], int]:
    """Packs every weight of a program; returns their ids by parts, so that a tied one is there once.

    Raises:
        ModelFileError: a tensor whose shape is not the one the program was recorded for.
        UnsupportedModelError: a block type that nobody here can decode.
    """
    ids: dict[tuple[str, ...], int] = {}
    for weight in program.weights:
        ids[weight.parts] = len(ids)
        _pack(library, engine, ids[weight.parts], weight, source, kept_dtype(weight, dtype))
        if progress is not None:
            progress(len(ids))
    return ids


def _pack(
    library: ctypes.CDLL, engine: ctypes.c_void_p, index: int, weight: Weight, source: WeightSource, dtype: str
) -> None:
    rows, cols = (1, *weight.shape)[-2:]
    check(library, library.octavo_add_weight(engine, rows, cols, DTYPES[dtype]))

    def pack(first: int, count: int, type_name: str, data: npt.NDArray[Any]) -> None:
        code = library.octavo_pack(
            engine, index, first, count, type_name.encode(), data.ctypes.data, ctypes.c_int64(data.nbytes)
        )
        check(library, code)

    if len(weight.shape) == 1:
        pack(0, 1, "F32", stack(weight, source, "float32"))
        return
    first = 0
    for part, count in zip(weight.parts, weight.part_rows, strict=True):
        tensor = source.get(part)
        if tensor.shape != (count, cols):
            raise ModelFileError(f"tensor {tensor.name} has shape {tensor.shape}, but {part} must be {(count, cols)}")
        pack(first, count, *_decodable(library, tensor))
        first += count


def _decodable(library: ctypes.CDLL, tensor: Tensor) -> tuple[str, npt.NDArray[Any]]:
    """(type name, contiguous data) that the library can decode."""
    rows, cols = tensor.shape
    row_bytes = library.octavo_row_bytes(tensor.type.encode(), cols)
    if not row_bytes:
        return "F32", np.ascontiguousarray(to_float32(tensor))
    if tensor.nbytes != rows * row_bytes:
        raise ModelFileError(
            f"tensor {tensor.name} ({tensor.type}, {rows} x {cols}) has {tensor.nbytes} bytes, not {rows * row_bytes}"
        )
    return tensor.type, np.ascontiguousarray(tensor.data)
