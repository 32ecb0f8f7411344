"""Vectors of prompts: normalised, cut out of messages, compared."""

import numpy as np
import numpy.typing as npt

from octavo.errors import StepError
from octavo.outputs import RequestOutput

Vector = npt.NDArray[np.float32]


def vector_of(output: RequestOutput, *, normalize: bool = True) -> Vector:
    """What an embedded prompt became, float32 [hidden_size]; of length 1 with `normalize`. Raises StepError for NaN."""
    assert output.vector is not None, "the prompt was not embedded"
    vector = np.frombuffer(output.vector, "<f4")
    if not np.isfinite(vector).all():
        raise StepError("the model's states are not finite")
    return vector / max(np.linalg.norm(vector), np.float32(1e-12)) if normalize else vector


def cosine(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Of the angle between two vectors of length 1."""
    return float(np.clip(np.dot(one, other), -1.0, 1.0))
