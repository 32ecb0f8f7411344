"""Each op of the reference runtime against an independent formulation in torch."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octavo.errors import ModelFileError, UnsupportedError, UnsupportedModelError
from octavo.program.ops import (
    Activation,
    Add,
    Attention,
    Embedding,
    GatherRows,
    Linear,
    Norm,
    Rope,
    RopeKVWrite,
    Weight,
)
from octavo.program.program import KVLayer, Program, ProgramBuilder
from octavo.runtime.base import Float32, StepInputs, Tensor
from octavo.runtime.bfloat16 import bfloat16_to_float32, float32_to_bfloat16
from octavo.runtime.reference import ReferenceRuntime, compute
from octavo.runtime.reference.tensors import to_float32

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Float32:
    return RANDOM.standard_normal(shape, dtype=np.float32)


def close(ours: Float32, expected: torch.Tensor) -> bool:
    return np.allclose(ours, expected.float().numpy(), rtol=1e-5, atol=2e-6)


def test_norms() -> None:
    x, weight, bias = normal(5, 24), normal(24), normal(24)
    tx, tw, tb = map(torch.from_numpy, (x, weight, bias))
    assert close(compute.rms_norm(x, weight, 1e-5), F.rms_norm(tx, (24,), tw, 1e-5))
    assert close(compute.layer_norm(x, weight, bias, 1e-5), F.layer_norm(tx, (24,), tw, tb, 1e-5))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu_mul", "gelu_tanh_mul"])
def test_activations(activation: Activation) -> None:
    x = normal(6, 20) * 4
    t = torch.from_numpy(x)
    gate, up = t.chunk(2, dim=-1)
    expected = {
        "none": t,
        "relu": F.relu(t),
        "gelu": F.gelu(t),
        "gelu_tanh": F.gelu(t, approximate="tanh"),
        "silu_mul": F.silu(gate) * up,
        "gelu_tanh_mul": F.gelu(gate, approximate="tanh") * up,
    }[activation]
    assert close(compute.activate(x, activation), expected)


def test_activations_of_huge_values_stay_finite() -> None:
    x = np.array([[-1e30, 1e30, 1.0, 1.0]], dtype=np.float32)
    with np.errstate(over="ignore"):  # the cube inside GELU overflows to infinity, whose tanh is 1
        assert np.isfinite(compute.activate(x, "silu_mul")).all()
        assert np.isfinite(compute.activate(x, "gelu_tanh")).all()


def test_linear_scale_bias_softcap() -> None:
    x, weight, bias = normal(3, 8), normal(5, 8), normal(5)
    expected = torch.from_numpy(x) @ torch.from_numpy(weight).T * 0.5 + torch.from_numpy(bias)
    assert close(compute.scale_and_bias(x @ weight.T, bias, 0.5), expected)
    assert close(compute.softcap(x, 2.0), 2.0 * torch.tanh(torch.from_numpy(x) / 2.0))
    assert compute.softcap(x, 0.0) is x


def test_rotation_turns_pairs_and_leaves_the_rest() -> None:
    x, positions = normal(4, 2, 10), np.array([0, 1, 5, 900], dtype=np.int32)
    rope = Rope((1.0, 0.1, 0.01), scale=1.5)
    out = compute.rotate(x, positions, rope)
    pairs = torch.complex(torch.from_numpy(x[..., :3].copy()), torch.from_numpy(x[..., 3:6].copy()))
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * torch.tensor(rope.inv_freq)
    turned = pairs * torch.polar(torch.full_like(angles, 1.5), angles)[:, None]
    assert close(out[..., :3], turned.real)
    assert close(out[..., 3:6], turned.imag)
    assert np.array_equal(out[..., 6:], x[..., 6:])


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_paged_attention_equals_dense(heads: tuple[int, int], cap: float, window: int) -> None:
    num_heads, num_kv_heads = heads
    block_size, head_dim = 4, 6
    lengths, queries = [9, 1, 13], [4, 1, 13]  # a chunk, a first token, a whole prompt
    tables = np.array([[7, 2, 9, 0], [5, 0, 0, 0], [1, 8, 3, 6]], dtype=np.int32)
    keys, values = normal(40, num_kv_heads, head_dim), normal(40, num_kv_heads, head_dim)
    q = normal(sum(queries), num_heads, head_dim)
    inputs = step_inputs(lengths, queries, tables, block_size)
    out = compute.attention(q, keys, values, inputs, group=0, block_size=block_size, scale=0.3, window=window, cap=cap)
    start = 0
    for b, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        slots = [int(tables[b, p // block_size]) * block_size + p % block_size for p in range(length)]
        k, v = (
            torch.from_numpy(pool[slots]).repeat_interleave(num_heads // num_kv_heads, dim=1) for pool in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", torch.from_numpy(q[start : start + count]), k) * 0.3
        scores = cap * torch.tanh(scores / cap) if cap else scores
        distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= window if window else torch.zeros_like(distance, dtype=torch.bool))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        assert close(out[start : start + count], torch.einsum("hqk,khd->qhd", weights, v))
        start += count


def step_inputs(lengths: list[int], queries: list[int], tables: np.ndarray, block_size: int) -> StepInputs:
    positions = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, queries, strict=True)])
    owners = np.repeat(np.arange(len(lengths)), queries)
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return StepInputs(
        token_ids=np.zeros(len(positions), dtype=np.int32),
        positions=positions.astype(np.int32),
        slots=slots[None],
        query_start_loc=np.concatenate(([0], np.cumsum(queries))).astype(np.int32),
        seq_lens=np.array(lengths, dtype=np.int32),
        block_tables=tables[None],
        logits_indices=np.cumsum(queries).astype(np.int32) - 1,
    )


class Source:
    """A weight source over a dictionary of float32 arrays."""

    def __init__(self, arrays: dict[str, Float32]) -> None:
        self.arrays = arrays

    def get(self, part: str) -> Tensor:
        return Tensor(part, "F32", self.arrays[part].shape, self.arrays[part])

    def type_of(self, part: str) -> str:
        return "F32"


def small_program() -> tuple[Program, dict[str, Float32]]:
    """One attention with q/k norms over a stacked qkv, a residual norm, a sum, tied logits."""
    arrays = {"embed": normal(11, 8), "q": normal(8, 8), "k": normal(4, 8), "v": normal(4, 8), "b": normal(16)}
    arrays |= {"n": normal(8), "qn": normal(4), "kn": normal(4), "pos": normal(20, 8)}

    def vector(name: str) -> Weight:
        return Weight(name, (name,), arrays[name].shape, arrays[name].shape, "vector")

    build = ProgramBuilder()
    embed = Weight("embed", ("embed",), (11,), (11, 8), "embedding")
    positions = Weight("pos", ("pos",), (20,), (20, 8), "embedding")
    qkv_weight = Weight("qkv", ("q", "k", "v"), (8, 4, 4), (16, 8), "linear")
    x, place, qkv, q = (build.tokens(n, w) for n, w in (("x", 8), ("place", 8), ("qkv", 16), ("q", 8)))
    mixed, normed, kept, out = (build.tokens(n, 8) for n in ("mixed", "normed", "kept", "out"))
    last, logits = build.logit_rows("last", 8), build.logit_rows("logits", 11)
    layer = build.kv_layer(KVLayer(1, 4))
    build.add(Embedding("embed", embed, x, 2.0, positions, 3))
    build.add(Embedding("place", None, place, 1.0, positions, 1))
    build.add(Linear("qkv", x, qkv_weight, qkv, vector("b")))
    build.add(RopeKVWrite("rope", qkv, q, layer, 2, 1, 4, Rope((1.0, 0.5)), vector("qn"), vector("kn"), 1e-6))
    build.add(Attention("attention", q, mixed, layer, 2, 1, 4, scale=0.5))
    build.add(Norm("norm", mixed, vector("n"), normed, 1e-6, residual=x, residual_out=kept))
    build.add(Add("sum", normed, kept, out))
    build.add(GatherRows("gather", out, last))
    build.add(Linear("head", last, embed, logits))
    program = build.finish(hidden=last, logits=logits, vocab_size=11, max_len=16)
    return program, arrays


def loaded(program: Program, arrays: dict[str, Float32], dtype: str = "float32") -> ReferenceRuntime:
    runtime = ReferenceRuntime()
    sizes = {"max_num_tokens": 16, "max_num_logits": 4, "max_num_requests": 4}
    runtime.load(program, Source(arrays), dtype=dtype, **sizes)
    runtime.allocate_kv(4, 4)
    return runtime


def test_program_equals_torch_written_out() -> None:
    program, arrays = small_program()
    runtime = loaded(program, arrays)
    inputs = step_inputs([6], [6], np.array([[2, 1]], dtype=np.int32), 4)
    inputs.token_ids[:] = [3, 1, 4, 1, 5, 9]
    runtime.execute(inputs)

    w = {name: torch.from_numpy(array) for name, array in arrays.items()}
    x = w["embed"][inputs.token_ids] * 2 + w["pos"][3:9]
    qkv = x @ torch.cat((w["q"], w["k"], w["v"])).T + w["b"]
    q, k, v = qkv[:, :8].reshape(6, 2, 4), qkv[:, 8:12].reshape(6, 1, 4), qkv[:, 12:].reshape(6, 1, 4)
    q, k = (F.rms_norm(t, (4,), w[n], 1e-6).numpy() for t, n in ((q, "qn"), (k, "kn")))
    q, k = (torch.from_numpy(compute.rotate(t, inputs.positions, Rope((1.0, 0.5)))) for t in (q, k))
    scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * 0.5
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mixed = torch.einsum("hqk,kd->qhd", scores.masked_fill(mask, float("-inf")).softmax(-1), v[:, 0]).reshape(6, 8)
    kept = mixed + x
    expected = (F.rms_norm(kept, (8,), w["n"], 1e-6) + kept)[-1:] @ w["embed"].T
    assert np.allclose(runtime.logits(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_copied_blocks_answer_like_their_source() -> None:
    program, arrays = small_program()
    runtime = loaded(program, arrays)
    table = np.array([[2, 1]], dtype=np.int32)
    runtime.execute(step_inputs([4], [4], table, 4))
    decode = step_inputs([5], [1], table, 4)
    runtime.execute(decode)
    expected = runtime.logits()
    runtime.copy_blocks([(2, 0)])
    moved = step_inputs([5], [1], np.array([[0, 3]], dtype=np.int32), 4)
    runtime.execute(moved)
    assert np.array_equal(runtime.logits(), expected)


def test_bfloat16_rounds_matrices_and_leaves_vectors() -> None:
    program, arrays = small_program()
    runtime = loaded(program, arrays, "bfloat16")
    assert np.array_equal(runtime._weights[("b",)], arrays["b"])
    rounded = torch.from_numpy(arrays["embed"]).bfloat16().float().numpy()
    assert np.array_equal(runtime._weights[("embed",)], rounded)


def test_load_refuses_wrong_shapes_and_types() -> None:
    program, arrays = small_program()
    with pytest.raises(UnsupportedError, match="float16"):
        loaded(program, arrays, "float16")
    with pytest.raises(ModelFileError, match=r"tensor k has shape \(5, 8\).*\(4, 8\)"):
        loaded(program, {**arrays, "k": normal(5, 8)})


def test_bfloat16_rounding_equals_torch() -> None:
    values = np.concatenate((normal(1000) * 1e3, [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-40, 1.00390625]))
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    bits = float32_to_bfloat16(values)
    numbers = ~np.isnan(values)
    assert np.array_equal(bits[numbers], expected.view(torch.int16).numpy().view(np.uint16)[numbers])
    assert np.array_equal(bfloat16_to_float32(bits), expected.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q5_0"])
def test_gguf_blocks(name: str) -> None:
    values = normal(3, 64)
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quantize(values, kind)
    out = to_float32(Tensor("t", name, (3, 64), blocks))
    assert out.shape == (3, 64)
    assert 0 < np.abs(out - values).max() < 0.3


def test_unknown_block_type_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"tensor t: type Q9_9"):
        to_float32(Tensor("t", "Q9_9", (1, 32), np.zeros((1, 18), dtype=np.uint8)))
