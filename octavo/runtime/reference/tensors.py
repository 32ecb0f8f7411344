"""Stored tensors as float32 arrays: every float type, every GGUF block type."""

import numpy as np

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.program.ops import Weight
from octavo.runtime.base import Float32, Tensor, WeightSource
from octavo.runtime.bfloat16 import bfloat16_to_float32, round_to_bfloat16


def to_float32(tensor: Tensor) -> Float32:
    """Dequantises a stored tensor to its logical shape.

    Raises:
        UnsupportedModelError: a block type that the gguf package cannot dequantise.
    """
    if tensor.type == "BF16":
        return bfloat16_to_float32(tensor.data)
    if tensor.type in ("F32", "F16"):
        return tensor.data.astype(np.float32)
    import gguf  # only GGUF checkpoints need it

    try:
        values = gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.type])
    except (KeyError, NotImplementedError):
        raise UnsupportedModelError(f"tensor {tensor.name}: type {tensor.type} cannot be dequantised") from None
    return np.asarray(values, dtype=np.float32).reshape(tensor.shape)


def stack(weight: Weight, source: WeightSource, dtype: str) -> Float32:
    """A weight's parts as one float32 array of `weight.shape`; but for dtype "float32", matrices hold bf16 values.

    Raises:
        ModelFileError: a part whose shape is not the one the program was recorded for.
    """
    arrays = []
    for part, rows in zip(weight.parts, weight.part_rows, strict=True):
        tensor = source.get(part)
        expected = (rows, *weight.shape[1:])
        if tensor.shape != expected:
            raise ModelFileError(f"tensor {tensor.name} has shape {tensor.shape}, but {part} must be {expected}")
        arrays.append(to_float32(tensor))
    values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if dtype != "float32" and not weight.is_exact:
        values = round_to_bfloat16(values)
    return np.ascontiguousarray(values)
