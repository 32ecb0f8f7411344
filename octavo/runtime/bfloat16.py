"""bfloat16 in numpy, which has no such type: bit patterns in uint16."""

import numpy as np
import numpy.typing as npt

from octavo.runtime.base import Float32


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> Float32:
    """The float32 numbers whose upper halves are these bit patterns; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16 numbers, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def round_to_bfloat16(values: Float32) -> Float32:
    """The nearest bfloat16 numbers, ties to even, as float32."""
    return bfloat16_to_float32(float32_to_bfloat16(values))
