"""The Linear of packed weights: every stored type, level and number of rows against the reference, and its bits."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from native_harness import LEVELS, VOCAB, Piece, RandomWeights, Steps, load, matrix, row_program, run, same_bits, vector

from lab import linear as measurement
from octavo import LLM, SamplingParams
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.program.ops import Buffer, Linear, Weight
from octavo.program.program import Program, ProgramBuilder
from octavo.runtime.base import Tensor
from octavo.runtime.native import NativeRuntime
from octavo.runtime.reference import ReferenceRuntime

BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"]
SUPER_BLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
ROWS = [64, 33, 17, 9, 8, 5, 3, 2, 1]
TOLERANCE = 1e-5  # of the largest output: sums in another order; no value lies between two bf16 numbers

every_level = pytest.mark.parametrize("level", LEVELS)


def blocks(type_name: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Random blocks with scales below 2 in size."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    data = np.random.default_rng(seed).integers(0, 256, (rows, cols // block * size), dtype=np.uint8)
    return Tensor("t", type_name, (rows, cols), data & 0xBF)


def linear_program(depth: int, weight: Weight, channels: int, *, biased: bool = True, **options: object) -> Program:
    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        out = build.tokens("y", channels)
        bias = vector("bias", weight.shape[0]) if biased else None
        build.add(Linear("linear", x=x, weight=weight, out=out, bias=bias, **options))  # type: ignore[arg-type]
        return out

    return row_program(depth, body, scale=0.37)


def assert_rows(program: Program, weights: RandomWeights, level: str, dtype: str = "quantized") -> None:
    """All numbers of rows give the reference's values, and the same bits."""
    steps = Steps()
    reference = load(ReferenceRuntime(), program, weights, dtype=dtype, steps=steps)
    expected = run(reference, steps.inputs([Piece(0, 0, max(ROWS))]))
    first = same_bits(program, weights, level, dtype, steps, ROWS)
    scale = float(np.abs(expected).max())
    assert np.isfinite(expected).all()
    assert scale > 0
    np.testing.assert_allclose(first, expected, rtol=0, atol=TOLERANCE * scale)


@every_level
@pytest.mark.parametrize("type_name", BLOCKS + SUPER_BLOCKS)
def test_stored_types(level: str, type_name: str) -> None:
    block = 256 if type_name in SUPER_BLOCKS else 32
    for channels, depth in ((1, block), (37, 3 * block), (100, 2 * block)):
        program = linear_program(depth, matrix("w", channels, depth), channels)
        weights = RandomWeights(program)
        weights.tensors["w"] = blocks(type_name, channels, depth)
        assert_rows(program, weights, level)


@every_level
@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_floats_of_odd_depth_are_bf16(level: str, stored: str) -> None:
    for channels, depth in ((1, 1), (17, 33), (90, 95)):
        program = linear_program(depth, matrix("w", channels, depth), channels)
        weights = RandomWeights(program)
        if stored == "F16":
            half = weights.tensors["w"].data.astype(np.float16)
            weights.tensors["w"] = Tensor("w", "F16", half.shape, half)
        assert_rows(program, weights, level, "bfloat16")
        assert_rows(program, weights, level, "quantized")


@every_level
def test_parts_of_one_weight_keep_their_own_types(level: str) -> None:
    types, rows = ("Q4_K", "Q6_K", "Q8_0", "BF16"), (40, 16, 7, 33)
    weight = Weight("qkv", types, rows, (sum(rows), 512), "linear")
    program = linear_program(512, weight, sum(rows))
    weights = RandomWeights(program)
    for type_name, count in zip(types[:3], rows, strict=False):
        weights.tensors[type_name] = blocks(type_name, count, 512, count)
    assert_rows(program, weights, level)


@every_level
@pytest.mark.parametrize("channels", [16, 53, 80])
@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_sums_without_bias_or_scale(level: str, channels: int, activation: str) -> None:
    rows = channels * (2 if activation == "silu_mul" else 1)
    program = linear_program(96, matrix("w", rows, 96), channels, biased=False, activation=activation)
    assert_rows(program, RandomWeights(program), level, "bfloat16")


@every_level
@pytest.mark.parametrize("activation", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("types", [("Q5_0", "Q4_K"), ("Q4_1", "Q4_1"), ("F32", "Q8_0")])
def test_gate_and_up(level: str, activation: str, types: tuple[str, str]) -> None:
    channels, depth = 53, 256
    weight = Weight("gate_up", ("gate", "up"), (channels, channels), (2 * channels, depth), "linear")
    program = linear_program(depth, weight, channels, activation=activation, scale=1e-4, softcap=3.0)
    weights = RandomWeights(program)
    for part, type_name in zip(("gate", "up"), types, strict=True):
        if type_name != "F32":
            weights.tensors[part] = blocks(type_name, channels, depth, len(part))
    assert_rows(program, weights, level)


@every_level
def test_gate_and_up_in_one_tensor(level: str) -> None:
    channels, depth = 21, 64
    program = linear_program(depth, matrix("w", 2 * channels, depth), channels, activation="silu_mul", scale=1e-2)
    weights = RandomWeights(program)
    weights.tensors["w"] = blocks("Q8_0", 2 * channels, depth)
    assert_rows(program, weights, level)


@every_level
def test_not_a_number_and_infinity_pass_through(level: str) -> None:
    program = linear_program(32, matrix("w", 20, 32), 20)
    weights = RandomWeights(program)
    weights.tensors["w"] = blocks("Q8_0", 20, 32)
    steps = Steps()
    ids = steps.ids[0, :3]
    weights.tensors["embed"].data[ids[0], 5] = np.nan
    weights.tensors["embed"].data[ids[1], 5] = np.inf
    weights.tensors["embed"].data[ids[2]] = 3e38  # rounds to a finite bf16 number
    native = load(NativeRuntime(1, level), program, weights, dtype="quantized", steps=steps)
    found = run(native, steps.inputs([Piece(0, 0, 3)]))
    native.close()
    assert np.isnan(found[0]).all()
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[2]).any()


def test_the_bench_checks_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert measurement.main(["--check-only", "--stores", "BF16", "Q4_K", "--levels", LEVELS[-1]]) == 0
    assert capsys.readouterr().out.count("check=passed") == 2


@pytest.mark.model
def test_a_greedy_answer_as_stored() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    answers = []
    for dtype in ("float32", "quantized"):
        with LLM("smollm2", dtype=dtype, max_model_len=256) as llm:
            answers.append(llm.generate(["Once upon a time"], greedy, use_tqdm=False)[0].outputs[0].token_ids)
    assert answers[0] == answers[1]


@pytest.mark.model
def test_the_default_model_as_stored() -> None:
    """Quantised, its logits stay near those of float32, also where prompts are noise."""
    from octavo.models.decoder import record

    files = resolve_model("smollm2")
    spec = read_spec(files, max_model_len=256)
    program, weights = record(spec), open_weights(files, spec)
    random_ids = np.random.default_rng(1).integers(0, spec.vocab_size, 48).astype(np.int32)
    found = {}
    for dtype in ("float32", "quantized"):
        steps = Steps()
        steps.ids[0, :48] = random_ids
        runtime = load(NativeRuntime(2), program, weights, dtype=dtype, steps=steps)  # type: ignore[arg-type]
        found[dtype] = run(runtime, steps.inputs([Piece(0, 0, 48)]))
        runtime.close()
    exact, kept = found["float32"], found["quantized"]
    assert np.abs(kept - exact).max() < 0.03 * np.abs(exact).max()
    assert (kept.argmax(1) == exact.argmax(1)).mean() > 0.9
    assert spec.vocab_size > VOCAB  # ids of all of the vocabulary were used


@pytest.mark.parametrize(("level", "rounded_bytes"), [("portable", 4), (LEVELS[-1], 0)])
def test_arena_counts_the_rounded_input_of_the_widest_linear(level: str, rounded_bytes: int) -> None:
    program = measurement.linear_program((32, 256), 2)
    rounded_bytes = rounded_bytes or (2 if level in ("avx512bf16", "amx") else 4)
    arena = NativeRuntime(2, level).arena_bytes(program, 64, 4)
    assert arena == program.plan_buffers().elements(64, 4) * 4 + 64 * 256 * rounded_bytes
    in_blocks = NativeRuntime(1, level).arena_bytes(program, 64, 4)
    assert in_blocks == program.plan_buffers().elements(128, 4) * 4 + 128 * 256 * rounded_bytes
