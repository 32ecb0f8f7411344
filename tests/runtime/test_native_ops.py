"""Every op at every level and weight type against the reference, over sizes that divide nothing."""

from __future__ import annotations

import pytest
from native_harness import (
    LEVELS,
    MIXED,
    Piece,
    Steps,
    assert_same_logits,
    decoder_program,
    matrix,
    row_program,
    vector,
)

from octavo.program.ops import Add, Buffer, Embedding, Linear, Norm
from octavo.program.program import Program, ProgramBuilder

ROWS = [[[Piece(0, 0, 1)]], [[Piece(0, 0, 3), Piece(1, 5, 1)]], [[Piece(0, 0, 37)]]]

every_level = pytest.mark.parametrize("level", LEVELS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])


def linear_program(depth: int, channels: int, **options: object) -> Program:
    gated = str(options.get("activation", "")).endswith("_mul")
    rows = 2 * channels if gated else channels
    bias = vector("bias", rows) if options.pop("bias", False) else None

    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        out = build.tokens("y", channels)
        build.add(Linear("linear", x=x, weight=matrix("w", rows, depth), out=out, bias=bias, **options))  # type: ignore[arg-type]
        return out

    return row_program(depth, body)


@every_level
@every_dtype
@pytest.mark.parametrize(("depth", "channels"), [(1, 1), (7, 3), (16, 16), (33, 17), (65, 100), (576, 35)])
def test_linear_sizes(level: str, dtype: str, depth: int, channels: int) -> None:
    for plan in ROWS:
        assert_same_logits(linear_program(depth, channels), plan, level=level, dtype=dtype)


@every_level
@every_dtype
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu_mul", "gelu_tanh_mul"])
def test_linear_epilogues(level: str, dtype: str, activation: str) -> None:
    program = linear_program(37, 21, activation=activation, bias=True, scale=0.75, softcap=1.5)
    for plan in ROWS:
        assert_same_logits(program, plan, level=level, dtype=dtype)


@every_level
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [1, 15, 64, 101])
def test_norm_with_residual_and_add(level: str, kind: str, width: int) -> None:
    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        other, kept, out, total = (build.tokens(name, width) for name in ("other", "kept", "out", "total"))
        build.add(Embedding("other", weight=matrix("other", 61, width, "embedding"), out=other))
        bias = vector("bias", width) if kind == "layer" else None
        build.add(
            Norm(
                "norm",
                x=x,
                weight=vector("norm", width),
                out=out,
                eps=1e-3,
                kind=kind,  # type: ignore[arg-type]
                bias=bias,
                residual=other,
                residual_out=kept,
            )
        )
        build.add(Add("add", x=out, y=kept, out=total))
        return total

    for plan in ROWS:
        assert_same_logits(row_program(width, body), plan, level=level)


@every_level
@every_dtype
def test_embedding_scale_and_positions(level: str, dtype: str) -> None:
    positions = matrix("positions", 402, 27, "embedding")
    program = row_program(27, lambda build, x: x, scale=3.5, position_weight=positions, position_offset=2)
    for plan in ROWS:
        assert_same_logits(program, plan, level=level, dtype=dtype)


def test_embedding_of_positions_alone() -> None:
    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        out, total = build.tokens("p", 9), build.tokens("t", 9)
        build.add(Embedding("p", weight=None, out=out, position_weight=matrix("p", 400, 9, "embedding")))
        build.add(Add("add", x=x, y=out, out=total))
        return total

    assert_same_logits(row_program(9, body), ROWS[2], level="auto")


@every_level
@every_dtype
def test_decoder(level: str, dtype: str) -> None:
    # An activation between two bf16 numbers may round to either one after sums of another order: 2^-9 of itself;
    # between two codes of int8, 1/127 of the largest.
    tolerance = {"float32": 1e-4, "int8": 1e-2}.get(dtype, 2e-3)
    assert_same_logits(decoder_program(), MIXED, level=level, dtype=dtype, tolerance=tolerance)


def test_kv_groups_follow_their_own_tables() -> None:
    assert_same_logits(decoder_program(groups=2), MIXED, level="auto", steps=Steps(groups=2), tolerance=1e-4)
