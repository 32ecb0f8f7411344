"""Comparing the native runtime, at every level this machine can run, with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.errors import UnsupportedError
from octavo.program.program import Program
from octavo.runtime.native import NativeRuntime
from octavo.runtime.native.library import LEVELS as ALL_LEVELS
from octavo.runtime.native.library import resolve_level
from octavo.runtime.reference.runtime import ReferenceRuntime
from tests.runtime.programs import (
    MAX_LEN,
    MAX_TOKENS,
    MIXED,
    VOCAB,
    Piece,
    RandomWeights,
    Steps,
    attention_program,
    decoder_program,
    load,
    matrix,
    row_program,
    run,
    sampling,
    vector,
)

__all__ = [
    "INT8_LEVELS",
    "LEVELS",
    "MAX_LEN",
    "MAX_TOKENS",
    "MIXED",
    "VOCAB",
    "Piece",
    "RandomWeights",
    "Steps",
    "assert_same_logits",
    "attention_program",
    "decoder_program",
    "load",
    "matrix",
    "row_program",
    "run",
    "sampling",
    "vector",
]


def levels() -> list[str]:
    """The levels this machine can run."""
    found = []
    for level in ALL_LEVELS[1:]:
        try:
            found.append(resolve_level(level))
        except UnsupportedError:
            continue
    return found


INT8_LEVELS = levels()
LEVELS = [level for level in INT8_LEVELS if level not in ("avxvnni", "avx512vnni")]  # those have an int8 Linear alone
# Relative to the largest output. The narrow types round weights before the softmax's maximum is final, the reference
# after it; and a key a hair from the middle of two int8 numbers may fall on either.
KV_TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-3, "int8": 8e-3}


def assert_same_logits(
    program: Program,
    plan: Sequence[Sequence[Piece]],
    *,
    level: str,
    dtype: str = "float32",
    kv: str = "float32",
    steps: Steps | None = None,
    tolerance: float | None = None,
) -> None:
    """Runs the same steps on both runtimes; every step's logits must be close (relative to the largest)."""
    steps = steps or Steps()
    tolerance = tolerance or KV_TOLERANCE[kv]
    reference = load(ReferenceRuntime(), program, dtype=dtype, kv=kv, steps=steps)
    native = load(NativeRuntime(2, level), program, dtype=dtype, kv=kv, steps=steps)
    try:
        for pieces in plan:
            inputs = steps.inputs(pieces)
            expected, found = run(reference, inputs), run(native, inputs)
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(scale, 1e-3))
            assert np.isfinite(expected).all()
            assert scale > 0
    finally:
        native.close()


def same_bits(
    program: Program, weights: RandomWeights, level: str, dtype: str, steps: Steps, numbers: Sequence[int]
) -> np.ndarray:
    """Asserts that every number of rows, the largest first, has the same bits with one thread and with three."""
    first: np.ndarray | None = None
    for threads in (1, 3):
        native = load(NativeRuntime(threads, level), program, weights, dtype=dtype, steps=steps)
        for rows in numbers:
            found = run(native, steps.inputs([Piece(0, 0, rows)]))
            first = found if first is None else first
            assert np.array_equal(found.view(np.int32), first[:rows].view(np.int32)), f"bits of {rows} rows"
        native.close()
    assert first is not None
    return first
