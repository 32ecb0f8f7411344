"""Arithmetics that no runtime has, simulated in numpy: weights and inputs of every Linear rounded as stated.

Products are summed in float32. Everything between the Linears (norms, rotation, attention, KV) stays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np

from octavo.program.ops import AnyOp, Linear
from octavo.runtime.base import Float32, StepInputs, Tensor, WeightSource
from octavo.runtime.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from octavo.runtime.reference import ReferenceRuntime
from octavo.runtime.reference.int8 import BLOCK, norm, rotate
from octavo.runtime.reference.tensors import to_float32

Rounding = Callable[[Float32], Float32]  # of [..., k], to values that the narrow type has


def exact(values: Float32) -> Float32:
    """No rounding."""
    return values


def to_bf16(values: Float32) -> Float32:
    """To the nearest bfloat16, ties to even."""
    return bfloat16_to_float32(float32_to_bfloat16(values))


def to_int8(segment: int | None) -> Rounding:
    """To the nearest of 255 int8 levels, ties to even; one scale (largest magnitude / 127) per `segment` values of k.

    None: one scale for the whole of k, so per token (activations) or per output channel (weights).
    """

    def rounded(values: Float32) -> Float32:
        k = values.shape[-1]
        width = segment or k
        padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -k % width)])
        parts = padded.reshape(*values.shape[:-1], -1, width)
        scale = np.abs(parts).max(axis=-1, keepdims=True) / np.float32(127)
        codes = np.rint(np.divide(parts, scale, out=np.zeros_like(parts), where=scale > 0))
        out: Float32 = (codes * scale).reshape(padded.shape)[..., :k]
        return out

    return rounded


def in_hadamard_blocks(rounding: Rounding) -> Rounding:
    """Rounds in the basis in which every 64 of k are multiplied by the Hadamard matrix; --quantization int8 goes on."""

    def rounded(values: Float32) -> Float32:
        k = values.shape[-1]
        padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -k % BLOCK)])
        blocks = (*padded.shape[:-1], -1, BLOCK)
        there = rounding(rotate(padded.reshape(blocks)).reshape(padded.shape))
        back = rotate(there.reshape(blocks)) / np.float32(norm(BLOCK))
        out: Float32 = back.reshape(padded.shape)[..., :k]
        return out

    return rounded


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How matrices and the activations that meet them are rounded."""

    weights: Rounding
    activations: Rounding
    description: str


ARITHMETICS = {
    "sim:bf16": Arithmetic(to_bf16, to_bf16, "weights bf16, activations bf16"),
    "sim:bf16-weights": Arithmetic(to_bf16, exact, "weights bf16, activations float32"),
    "sim:int8-weights": Arithmetic(to_int8(None), exact, "weights int8 per output channel, activations float32"),
    "sim:int8-act-32": Arithmetic(exact, to_int8(32), "weights as stored, activations int8 per 32 of k"),
    "sim:int8-act-64": Arithmetic(exact, to_int8(64), "weights as stored, activations int8 per 64 of k"),
    "sim:int8-64": Arithmetic(to_int8(64), to_int8(64), "weights int8 per 64 of k, activations int8 per 64 of k"),
    "sim:int8-channel": Arithmetic(
        to_int8(None), to_int8(None), "weights int8 per output channel, activations int8 per token"
    ),
    "sim:int8-hadamard": Arithmetic(
        in_hadamard_blocks(to_int8(None)),
        in_hadamard_blocks(to_int8(None)),
        "Hadamard blocks of 64, weights int8 per output channel, activations int8 per token",
    ),
    "sim:int8-hadamard-64": Arithmetic(
        in_hadamard_blocks(to_int8(None)),
        in_hadamard_blocks(to_int8(64)),
        "Hadamard blocks of 64, weights int8 per output channel, activations int8 per 64 of k",
    ),
}


REQUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # what the gguf package can make


class SimulatedWeights:
    """A WeightSource whose matrices are rounded; vectors pass."""

    def __init__(self, source: WeightSource, rounding: Rounding) -> None:
        self._source = source
        self._rounding = rounding

    def get(self, part: str) -> Tensor:
        """The tensor, dequantised and rounded."""
        tensor = self._source.get(part)
        if len(tensor.shape) < 2:
            return tensor
        return Tensor(tensor.name, "F32", tensor.shape, self._rounding(to_float32(tensor)))

    def type_of(self, part: str) -> str:
        """Its stored type name."""
        return self._source.type_of(part)


class RequantizedWeights:
    """A WeightSource whose matrices are stored as another GGUF block type, so that one model shows every type."""

    def __init__(self, source: WeightSource, stored_type: str) -> None:
        self._source = source
        self._stored_type = stored_type

    def get(self, part: str) -> Tensor:
        """The tensor, dequantised and quantised again; vectors as they are."""
        tensor = self._source.get(part)
        if len(tensor.shape) < 2:
            return tensor
        data = gguf.quantize(to_float32(tensor), gguf.GGMLQuantizationType[self._stored_type])
        return Tensor(tensor.name, self._stored_type, tensor.shape, data)

    def type_of(self, part: str) -> str:
        """The type that get() gives."""
        tensor = self._source.get(part)
        return tensor.type if len(tensor.shape) < 2 else self._stored_type


class SimulatedRuntime(ReferenceRuntime):
    """The reference runtime, with the input of every Linear rounded."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self._rounding = rounding

    def _run(self, node: AnyOp, inputs: StepInputs) -> None:
        if not isinstance(node, Linear):
            super()._run(node, inputs)
            return
        x = self._read(node.x)
        self._write(node.x, self._rounding(x))
        super()._run(node, inputs)
        self._write(node.x, x)  # others may read it unrounded
