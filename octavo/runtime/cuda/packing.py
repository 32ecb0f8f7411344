"""Weights on the device: matrices in the storage type, vectors in float32, RoPE tables.

A checkpoint's tensors cross the bus as stored where the device can read that type, else dequantised on the host.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from octavo.errors import ModelFileError
from octavo.program.ops import Rope, Weight
from octavo.runtime.base import RandomSource, RandomTensor, Tensor, WeightSource
from octavo.runtime.reference.tensors import to_float32

_DRAWN_ON_HOST = 1 << 19  # elements; random tensors up to here are the same numbers in every runtime


def storage_type(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """How a weight is kept: vectors and routers are always float32."""
    return torch.float32 if weight.is_exact else dtype


def packed_bytes(weight: Weight, dtype: torch.dtype) -> int:
    """Resident bytes of a weight."""
    return math.prod(weight.shape) * storage_type(weight, dtype).itemsize


def pack(weight: Weight, source: WeightSource, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A weight's parts, stacked, on the device.

    Raises:
        ModelFileError: a part whose shape is not the one the program was recorded for.
        UnsupportedModelError: a block type that cannot be dequantised.
    """
    packed = torch.empty(weight.shape, dtype=storage_type(weight, dtype), device=device)
    first = 0
    for part, rows in zip(weight.parts, weight.part_rows, strict=True):
        target = packed[first : first + rows]
        if isinstance(source, RandomSource) and target.numel() > _DRAWN_ON_HOST:
            _draw(source.random(part), target)
        else:
            _copy(source.get(part), part, target)
        first += rows
    return packed


def rope_tables(rope: Rope, max_positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, float32 [max_positions, half] each, in the roundings of the reference."""
    positions = np.arange(max_positions, dtype=np.float32)[:, None]
    angles = positions * np.asarray(rope.inv_freq, dtype=np.float32)
    scale = np.float32(rope.scale)
    return _to_device(np.cos(angles) * scale, device), _to_device(np.sin(angles) * scale, device)


def _draw(random: RandomTensor, target: torch.Tensor) -> None:
    """Draws on the device: seven billion numbers in well under a second. Not the numbers of another runtime."""
    generator = torch.Generator(target.device).manual_seed(random.seed & 0x7FFFFFFFFFFFFFFF)
    target.normal_(random.mean, random.standard_deviation, generator=generator)


def _copy(tensor: Tensor, part: str, target: torch.Tensor) -> None:
    if tensor.shape != tuple(target.shape):
        raise ModelFileError(f"tensor {tensor.name} has shape {tensor.shape}, but {part} must be {tuple(target.shape)}")
    if tensor.type == "BF16":
        target.copy_(_to_device(tensor.data.view(np.int16), target.device).view(torch.bfloat16))
    else:
        values = tensor.data if tensor.type in ("F32", "F16") else to_float32(tensor)
        target.copy_(_to_device(values, target.device))


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy on the device. By way of torch's own memory: a mapped file is not writable, which from_numpy warns of."""
    host = torch.empty(array.shape, dtype=_TORCH_TYPES[array.dtype.name])
    host.numpy()[...] = array
    return host.to(device)


_TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "int16": torch.int16}
