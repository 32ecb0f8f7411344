"""float16 on a runtime that computes in float32: matrices are rounded to float16, then kept and computed in float32."""

import numpy as np

from octavo.errors import UnsupportedError
from octavo.runtime.base import Tensor, WeightSource
from octavo.runtime.reference.tensors import to_float32

LARGEST = float(np.finfo(np.float16).max)


class HalfWeights:
    """A WeightSource whose matrices hold float16 values (nearest, ties to even); vectors stay as they are."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def get(self, part: str) -> Tensor:
        """The tensor, a matrix as F16. Raises UnsupportedError for values that float16 cannot hold."""
        tensor = self._source.get(part)
        if len(tensor.shape) == 1 or tensor.type == "F16":
            return tensor
        values = to_float32(tensor)
        if (largest := float(np.abs(values).max(initial=0.0))) > LARGEST:
            raise UnsupportedError(
                f"tensor {part} holds {largest:g}; float16 ends at {LARGEST:g}: use --dtype bfloat16"
            )
        return Tensor(tensor.name, "F16", tensor.shape, values.astype(np.float16))

    def type_of(self, part: str) -> str:
        """Its stored type, before rounding."""
        return self._source.type_of(part)
