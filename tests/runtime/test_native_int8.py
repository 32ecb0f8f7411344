"""int8 weights: every level gives the bits of the definition, for all numbers of rows, up to the largest values."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import INT8_LEVELS, Piece, RandomWeights, Steps, load, row_program, run, vector

from octavo.errors import UnsupportedError
from octavo.program.ops import Buffer, Linear, Weight
from octavo.program.program import Program, ProgramBuilder
from octavo.runtime.base import Tensor
from octavo.runtime.choose import choose
from octavo.runtime.native import NativeRuntime
from octavo.runtime.native.library import NativeError
from octavo.runtime.reference import ReferenceRuntime
from octavo.runtime.reference.int8 import norm, prime_factors, quantise, rotate

ROWS = [64, 33, 17, 9, 8, 7, 5, 3, 2, 1]

every_level = pytest.mark.parametrize("level", INT8_LEVELS)


def linear_program(depth: int, *part_rows: int, plain: bool = False, activation: str = "none") -> Program:
    parts = tuple(f"w{i}" for i in range(len(part_rows)))
    channels = sum(part_rows) // (2 if activation.endswith("_mul") else 1)

    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        out = build.tokens("y", channels)
        weight = Weight("w", parts, part_rows, (sum(part_rows), depth), "linear")
        epilogue = {} if plain else {"bias": vector("bias", sum(part_rows)), "scale": 0.37}
        build.add(Linear("linear", x=x, weight=weight, out=out, activation=activation, **epilogue))
        return out

    return row_program(depth, body)


def logits(runtime, program: Program, weights: RandomWeights, rows: list[int]) -> list[np.ndarray]:
    steps = Steps()
    loaded = load(runtime, program, weights, dtype="int8", steps=steps)
    found = [run(loaded, steps.inputs([Piece(0, 0, count)])) for count in rows]
    loaded.close()
    return found


def assert_bits(program: Program, weights: RandomWeights, level: str) -> np.ndarray:
    """Look-up, rotation, rounding, sums and scaling: the reference's bits, whatever the number of rows."""
    (expected,) = logits(ReferenceRuntime(), program, weights, [max(ROWS)])
    for threads in (1, 3):
        for rows, found in zip(ROWS, logits(NativeRuntime(threads, level), program, weights, ROWS), strict=True):
            np.testing.assert_array_equal(found.view(np.int32), expected[:rows].view(np.int32), f"{rows} rows")
    return expected


@every_level
@pytest.mark.parametrize(
    ("depth", "channels"), [(1, 1), (33, 17), (64, 16), (200, 95), (576, 33), (704, 70), (1536, 49)]
)
def test_every_size_has_the_bits_of_the_reference(level: str, depth: int, channels: int) -> None:
    program = linear_program(depth, channels)
    assert np.abs(assert_bits(program, RandomWeights(program), level)).max() > 0


@every_level
@pytest.mark.parametrize(("depth", "channels"), [(64, 5), (200, 95), (576, 128)])
def test_sums_that_nothing_is_done_to_have_the_bits_of_the_reference(level: str, depth: int, channels: int) -> None:
    program = linear_program(depth, channels, plain=True)
    assert np.abs(assert_bits(program, RandomWeights(program), level)).max() > 0


@every_level
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("depth", "channels"), [(64, 5), (200, 95), (576, 64)])
def test_gate_and_up(level: str, depth: int, channels: int, plain: bool) -> None:
    """Only the activation's exponential may differ from the reference's, and by no number of rows."""
    program = linear_program(depth, channels, channels, plain=plain, activation="silu_mul")
    weights = RandomWeights(program)
    (expected,) = logits(ReferenceRuntime(), program, weights, [max(ROWS)])
    found = logits(NativeRuntime(2, level), program, weights, ROWS)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    for rows, of_rows in zip(ROWS, found, strict=True):
        assert np.array_equal(of_rows.view(np.int32), found[0][:rows].view(np.int32)), f"bits of {rows} rows"


@every_level
def test_parts_of_every_stored_type_are_rounded_from_their_values(level: str) -> None:
    program = linear_program(256, 40, 7, 33)
    weights = RandomWeights(program)
    blocks = np.random.default_rng(3).integers(0, 256, (40, 256 // 32 * 18), dtype=np.uint8) & 0xBF
    weights.tensors["w0"] = Tensor("w0", "Q4_0", (40, 256), blocks)
    weights.tensors["w1"] = Tensor("w1", "F16", (7, 256), weights.tensors["w1"].data.astype(np.float16))
    bits = (weights.tensors["w2"].data.view(np.uint32) >> 16).astype(np.uint16)
    weights.tensors["w2"] = Tensor("w2", "BF16", (33, 256), bits)
    assert_bits(program, weights, level)


@every_level
@pytest.mark.parametrize("depth", [64, 65536])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_largest_sums_are_exact(level: str, depth: int, signs: tuple[int, int]) -> None:
    """One value alone rotates into equal ones: all codes are 127 or -127, and no pair of products saturates."""
    program = linear_program(depth, 3)
    weights = RandomWeights(program)
    weights.tensors["bias"].data[:] = 0
    for name, sign in zip(("embed", "w0"), signs, strict=True):
        weights.tensors[name].data[:] = 0
        weights.tensors[name].data[:, 0] = sign
    assert set(np.abs(quantise(rotate(weights.tensors["w0"].data))[0]).ravel()) == {127}
    for found in logits(NativeRuntime(2, level), program, weights, [1, 9]):
        np.testing.assert_allclose(found, 0.37 * signs[0] * signs[1], rtol=1e-6)


@every_level
def test_zeros_are_exact_zeros(level: str) -> None:
    program = linear_program(96, 20)
    weights = RandomWeights(program)
    weights.tensors["bias"].data[:] = 0
    weights.tensors["w0"].data[5] = 0
    weights.tensors["embed"].data[Steps().ids[0, 1]] = 0
    found = assert_bits(program, weights, level)
    assert not found[1].any()
    assert not found[:, 5].any()
    assert found.any()


@every_level
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number_and_infinity_reach_every_output_of_their_row(level: str, value: float) -> None:
    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        first, out = build.tokens("first", 192), build.tokens("y", 20)
        square = Weight("square", ("square",), (192,), (192, 192), "linear")
        build.add(Linear("first", x=x, weight=square, out=first, bias=vector("spoil", 192)))  # look-ups are finite
        build.add(Linear("second", x=first, weight=Weight("w", ("w0",), (20,), (20, 192), "linear"), out=out))
        return out

    program = row_program(192, body)
    weights = RandomWeights(program)
    assert np.isfinite(logits(NativeRuntime(1, level), program, weights, [9])[0]).all()
    weights.tensors["spoil"].data[7] = value
    assert np.isnan(logits(NativeRuntime(1, level), program, weights, [9])[0]).all()


@every_level
def test_a_tiny_row_counts_as_zeros_and_a_huge_one_does_not_overflow(level: str) -> None:
    program = linear_program(64, 16)
    weights = RandomWeights(program)
    ids = Steps().ids[0]
    weights.tensors["embed"].data[ids[0]] *= np.float32(1e-35)
    weights.tensors["embed"].data[ids[1]] *= np.float32(1e30)
    found = assert_bits(program, weights, level)
    np.testing.assert_array_equal(found[0], weights.tensors["bias"].data)
    assert np.isfinite(found[1]).all()
    assert np.abs(found[1]).max() > 1e27


@every_level
def test_scales_whose_product_is_denormal_are_multiplied_as_such(level: str) -> None:
    program = linear_program(256, 16)
    weights = RandomWeights(program)
    for name, factor in (("embed", 1e-28), ("w0", 1e-8), ("bias", 0.0)):
        tensor = weights.tensors[name]
        weights.tensors[name] = Tensor(name, "F32", tensor.shape, (tensor.data * np.float32(factor)).astype(np.float32))
    found = np.abs(assert_bits(program, weights, level))
    assert 0 < found.max() < 1e-30


def test_rotation_keeps_products() -> None:
    random = np.random.default_rng(0)
    for k in (1, 24, 64, 100, 576, 640, 704, 1536):
        x, w = random.normal(size=(2, 3, k)).astype(np.float32)
        rotated = rotate(x)
        assert rotated.shape[-1] == -(-k // 64) * 64
        products = (rotated @ rotate(w).T) / norm(rotated.shape[-1])
        np.testing.assert_allclose(products, x @ w.T, atol=1e-4)


def test_rotation_spreads_an_outlier() -> None:
    for k in (576, 1536, 2048):
        x = np.zeros((1, k), np.float32)
        x[0, 100] = 1
        rotated = np.abs(rotate(x)) / np.sqrt(norm(k))
        assert rotated.max() < 4 / np.sqrt(k)  # 1 / sqrt(k) would be even


def test_prime_factors() -> None:
    assert [prime_factors(n) for n in (1, 2, 9, 24, 19, 70)] == [[], [2], [3, 3], [2, 2, 2, 3], [19], [2, 5, 7]]


def test_a_row_takes_a_byte_a_weight_and_a_scale() -> None:
    program = linear_program(576, 64)
    weights = RandomWeights(program)
    runtime = NativeRuntime(1)
    lookup = 64 * (576 + 4)  # 61 rows take four groups of 16
    assert runtime.weight_bytes(program, weights, "int8") == 64 * (576 + 4) + lookup + 4 * 64
    runtime.close()


def test_a_row_too_long_for_exact_sums_is_refused() -> None:
    program = linear_program(65537, 1)
    with pytest.raises(NativeError, match="INT8"):
        logits(NativeRuntime(1), program, RandomWeights(program), [1])


def test_a_runtime_without_it_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.runtime.choose.missing", lambda **_: None)
    with pytest.raises(
        UnsupportedError, match=r"--quantization int8: the cuda runtime computes in .* --runtime native"
    ):
        choose("cuda", "auto", "bfloat16", "int8")
    assert choose("native", "auto", "bfloat16", "int8")[1] == "bfloat16"
