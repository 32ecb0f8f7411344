"""Stored types become the numbers that the gguf package's own dequantiser gives, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from native_harness import RandomWeights, load, row_program

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.runtime.base import StepInputs, Tensor
from octavo.runtime.bfloat16 import bfloat16_to_float32, float32_to_bfloat16, round_to_bfloat16
from octavo.runtime.native import NativeRuntime
from octavo.runtime.native.library import load_library

BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
OTHERS = ["IQ2_XXS", "TQ1_0"]
WIDTH, ROWS = 512, 61


def random_blocks(type_name: str) -> np.ndarray:
    """Random bytes, with the half-precision scales kept finite by clearing their top exponent bit."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    data = np.random.default_rng(len(type_name)).integers(0, 256, (ROWS, WIDTH // block, size), dtype=np.uint8)
    return np.ascontiguousarray((data & 0xBF).reshape(ROWS, -1))


def packed(tensor: Tensor, dtype: str = "float32") -> np.ndarray:
    """The matrix as the runtime keeps it, read back through an embedding lookup of every row."""
    program = row_program(WIDTH, lambda build, x: x)
    weights = RandomWeights(program)
    weights.tensors["embed"] = tensor
    runtime = load(NativeRuntime(2), program, weights, dtype=dtype)
    rows = np.arange(ROWS, dtype=np.int32)
    runtime.execute(
        StepInputs(
            token_ids=rows,
            positions=rows,
            slots=rows.astype(np.int64)[None],
            query_start_loc=np.array([0, ROWS], np.int32),
            seq_lens=np.array([ROWS], np.int32),
            block_tables=np.zeros((1, 1, 4), np.int32),
            logits_indices=rows,
        )
    )
    from native_harness import sampling

    runtime.sample(sampling(ROWS))
    values = runtime.logits()
    runtime.close()
    return values


@pytest.mark.parametrize("type_name", BLOCKS + OTHERS)
def test_blocks(type_name: str) -> None:
    data = random_blocks(type_name)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[type_name])
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 100
    found = packed(Tensor("t", type_name, (ROWS, WIDTH), data))
    assert np.array_equal(found, expected + np.float32(0))  # a lookup adds to 0, which turns -0 into 0


@pytest.mark.parametrize("type_name", BLOCKS + OTHERS)
def test_blocks_that_are_kept_as_stored(type_name: str) -> None:
    data = random_blocks(type_name)
    expected = round_to_bfloat16(gguf.dequantize(data, gguf.GGMLQuantizationType[type_name]))
    found = packed(Tensor("t", type_name, (ROWS, WIDTH), data), "quantized")
    assert np.array_equal(found, expected + np.float32(0))


# Bits of memory for a weight, scales included: what decides the speed of decoding.
KEPT_BITS = {"Q4_0": 4.5, "Q4_1": 5, "IQ4_NL": 4.5, "Q5_0": 8.5, "Q5_1": 9, "Q8_0": 8.5, "Q2_K": 5.25, "Q3_K": 4.625}
KEPT_BITS |= {"Q4_K": 4.75, "IQ4_XS": 4.375, "Q5_K": 8.75, "Q6_K": 8.625, "IQ2_XXS": 4.375}
KEPT_BITS |= {"F32": 16, "BF16": 16, "TQ1_0": 16}


@pytest.mark.parametrize("type_name", KEPT_BITS)
def test_bits_a_weight(type_name: str) -> None:
    program = row_program(WIDTH, lambda build, x: x)
    weights = RandomWeights(program)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    data = np.zeros((64, WIDTH // block * size), np.uint8)
    weights.tensors["embed"] = Tensor("t", type_name, (64, WIDTH), data)
    runtime = NativeRuntime(1)
    padded = 64 * WIDTH  # 61 rows take four groups of 16
    assert runtime.weight_bytes(program, weights, "quantized") * 8 == KEPT_BITS[type_name] * padded
    runtime.close()


@pytest.mark.parametrize("type_name", BLOCKS)
def test_common_blocks_are_decoded_natively(type_name: str) -> None:
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert load_library().octavo_row_bytes(type_name.encode(), 512) == 512 // size[0] * size[1]
    assert load_library().octavo_row_bytes(type_name.encode(), 513) == 0


def test_every_half_and_bfloat16() -> None:
    bits = np.arange(ROWS * WIDTH, dtype=np.uint16).reshape(ROWS, WIDTH)  # 31,232: all positive finite halves and more
    half = bits.view(np.float16)
    assert np.array_equal(packed(Tensor("t", "F16", half.shape, half)), half.astype(np.float32))
    negative = (bits | 0x8000).view(np.float16)
    assert np.array_equal(packed(Tensor("t", "F16", half.shape, negative)), negative.astype(np.float32) + np.float32(0))
    assert np.array_equal(packed(Tensor("t", "BF16", bits.shape, bits)), bfloat16_to_float32(bits))


def test_special_halves() -> None:
    half = np.full((ROWS, WIDTH), np.inf, np.float16)
    half[1], half[2] = -np.inf, np.nan
    assert np.array_equal(packed(Tensor("t", "F16", half.shape, half)), half.astype(np.float32), equal_nan=True)


def test_bfloat16_rounds_to_nearest_even() -> None:
    random = np.random.default_rng(5)
    values = random.integers(0, 1 << 32, (ROWS, WIDTH), dtype=np.uint32)
    values[:, ::2] = (values[:, ::2] & 0xFFFF0000) | 0x8000  # ties
    values = values.view(np.float32)
    values[~np.isfinite(values)] = 1.0
    found = packed(Tensor("t", "F32", values.shape, values), "bfloat16")
    assert np.array_equal(found, bfloat16_to_float32(float32_to_bfloat16(values)) + np.float32(0))


def test_wrong_lengths_and_unknown_types_are_refused() -> None:
    data = random_blocks("Q4_0")
    with pytest.raises(ModelFileError, match="bytes"):
        packed(Tensor("t", "Q4_0", (ROWS, WIDTH), data[:, :-1]))
    with pytest.raises(UnsupportedModelError, match="Q9_9"):
        packed(Tensor("t", "Q9_9", (ROWS, WIDTH), data))
