"""Experts at every level and weight type against the reference: values, bits, and which weights are read at all."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from native_harness import LEVELS, MAX_TOKENS, Piece, RandomWeights, Steps, load, row_program, run, same_bits

from octavo.program.ops import Buffer, Experts, Linear, Weight
from octavo.program.program import Program, ProgramBuilder
from octavo.runtime.base import Tensor
from octavo.runtime.native import NativeRuntime
from octavo.runtime.native.library import NativeError
from octavo.runtime.native.runtime import _expert_places
from octavo.runtime.reference import ReferenceRuntime

ROWS = [MAX_TOKENS, 64, 33, 17, 9, 8, 5, 3, 2, 1]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "quantized": 1e-2, "int8": 5e-2}  # of the largest: roundings may flip

every_level = pytest.mark.parametrize("level", LEVELS)


def experts_program(
    *,
    width: int = 37,
    inner: int = 21,
    out: int = 29,
    count: int = 5,
    top_k: int = 2,
    renormalize: bool = False,
    shared: bool = False,
    activation: str = "silu_mul",
) -> Program:
    def linear(build: ProgramBuilder, x: Buffer, name: str, rows: tuple[int, ...], role: str) -> Buffer:
        y = build.tokens(name, sum(rows))
        parts = tuple(f"{name}.{i}" for i in range(len(rows)))
        weight = Weight(name, parts, rows, (sum(rows), x.width), role)  # type: ignore[arg-type]
        build.add(Linear(name, x=x, weight=weight, out=y))
        return y

    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        scores = linear(build, x, "router", (count, 1) if shared else (count,), "router")
        pairs = tuple(f"{e}.{name}" for e in range(count) for name in ("gate", "up"))
        downs = tuple(f"{e}.down" for e in range(count))
        result = build.tokens("experts", out)
        build.add(
            Experts(
                "experts",
                x=x,
                scores=scores,
                gate_up=Weight("pairs", pairs, (inner,) * 2 * count, (2 * count * inner, width), "linear"),
                down=Weight("down", downs, (out,) * count, (count * out, inner), "linear"),
                out=result,
                num_experts=count,
                top_k=top_k,
                renormalize=renormalize,
                activation=activation,  # type: ignore[arg-type]
                shared=linear(build, x, "shared", (out,), "linear") if shared else None,
            )
        )
        return result

    return row_program(width, body)


def assert_rows(program: Program, weights: RandomWeights, level: str, dtype: str) -> np.ndarray:
    """All numbers of rows give the reference's values, and the same bits; returns those of the largest step."""
    steps = Steps()
    reference = load(ReferenceRuntime(), program, weights, dtype=dtype, steps=steps)
    expected = run(reference, steps.inputs([Piece(0, 0, MAX_TOKENS)]))
    first = same_bits(program, weights, level, dtype, steps, ROWS)
    scale = float(np.abs(expected).max())
    assert scale > 0
    np.testing.assert_allclose(first, expected, rtol=0, atol=TOLERANCE[dtype] * scale)
    return first


@every_level
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True, "shared": True},
        {"count": 3, "top_k": 3, "activation": "gelu_tanh_mul"},
        {"width": 1, "inner": 1, "out": 1, "count": 1, "top_k": 1},
        {"width": 70, "inner": 65, "out": 100, "count": 40, "top_k": 4},
    ],
)
def test_sizes(level: str, dtype: str, options: dict[str, object]) -> None:
    program = experts_program(**options)  # type: ignore[arg-type]
    assert_rows(program, RandomWeights(program), level, dtype)


@every_level
@pytest.mark.parametrize("type_name", ["Q4_1", "Q5_0", "Q4_K"])
def test_stored_types(level: str, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    program = experts_program(width=block, inner=2 * block, out=block + 7, top_k=3)
    weights = RandomWeights(program)
    random = np.random.default_rng(3)
    for part, tensor in weights.tensors.items():
        if part[0].isdigit() and part != "1.up":  # one part keeps another type
            rows, cols = tensor.shape
            data = random.integers(0, 256, (rows, cols // block * size), dtype=np.uint8) & 0xBF  # scales below 2
            weights.tensors[part] = Tensor(part, type_name, tensor.shape, data)
    assert_rows(program, weights, level, "quantized")


@every_level
def test_more_rows_than_one_pass_holds(level: str) -> None:
    program = experts_program(count=4, top_k=4)
    node = next(n for n in program.nodes if isinstance(n, Experts))
    assert 2 * _expert_places(node, MAX_TOKENS) < 4 * MAX_TOKENS, "three passes at least"
    assert_rows(program, RandomWeights(program), level, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_all_rows_on_one_expert_and_the_others_are_not_read(dtype: str) -> None:
    """Equal scores choose the first experts; what the others hold could not stay hidden."""
    program = experts_program(top_k=1)
    weights = RandomWeights(program)
    weights.tensors["router.0"].data[:] = 0
    for expert in range(1, 5):
        for name in ("gate", "up", "down"):
            weights.tensors[f"{expert}.{name}"].data[:] = np.nan
    for level in LEVELS:
        assert np.isfinite(assert_rows(program, weights, level, dtype)).all()


@every_level
def test_scores_that_are_not_numbers_spoil_their_row_alone(level: str) -> None:
    program = experts_program(shared=True)
    weights, steps = RandomWeights(program), Steps()
    native = load(NativeRuntime(2, level), program, weights, steps=steps)
    expected = run(native, steps.inputs([Piece(0, 0, 9)]))
    native.close()
    ids = steps.ids[0, :9]
    weights.tensors["embed"].data[ids[4]] = np.nan
    native = load(NativeRuntime(2, level), program, weights, steps=steps)
    found = run(native, steps.inputs([Piece(0, 0, 9)]))
    native.close()
    spoilt = ids == ids[4]
    assert np.isnan(found[spoilt]).all()
    assert np.array_equal(found[~spoilt], expected[~spoilt])


@pytest.mark.parametrize(("change", "what"), [({"top_k": 6}, "top_k"), ({"activation": "relu"}, "activation")])
def test_an_inconsistent_node_is_refused(change: dict[str, object], what: str) -> None:
    with pytest.raises(NativeError, match=what):
        load(NativeRuntime(1), experts_program(**change))  # type: ignore[arg-type]


def test_the_arena_counts_what_experts_need() -> None:
    small, large = experts_program(top_k=1), experts_program(top_k=1, inner=2100)
    arenas = [NativeRuntime(1).arena_bytes(program, 64, 4) for program in (small, large)]
    assert arenas[1] - arenas[0] >= (64 + 5 * 16) * (2100 - 21) * 4
