"""Attention and the KV cache at every level and KV type against the reference; same bits however a context is cut."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import (
    LEVELS,
    MAX_LEN,
    MIXED,
    Piece,
    RandomWeights,
    Steps,
    assert_same_logits,
    attention_program,
    decoder_program,
    load,
    run,
)

from octavo.errors import UnsupportedError
from octavo.program.program import Program
from octavo.runtime.native import NativeRuntime
from octavo.runtime.native.library import KV_DTYPES

every_level = pytest.mark.parametrize("level", LEVELS)
every_kv = pytest.mark.parametrize("kv", KV_DTYPES)
# Past the end of a KV range (256 positions), at its borders, and one position behind.
LONG = [
    [Piece(0, 0, 130), Piece(1, 0, 20)],
    [Piece(0, 130, 126), Piece(2, 0, 34)],
    [Piece(0, 256, 1), Piece(1, 20, 1)],
    [Piece(0, 257, 100), Piece(1, 21, 1), Piece(2, 34, 2)],
    [Piece(0, 357, 1)],
]


@every_level
@every_kv
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1), (40, 1)])
@pytest.mark.parametrize("dim", [64, 11])
def test_heads(level: str, kv: str, heads: int, kv_heads: int, dim: int) -> None:
    assert_same_logits(attention_program(heads=heads, kv_heads=kv_heads, dim=dim), MIXED, level=level, kv=kv)


@every_level
@every_kv
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_contexts_longer_than_a_range(level: str, kv: str, dim: int) -> None:
    assert_same_logits(attention_program(heads=3, kv_heads=1, dim=dim), LONG, level=level, kv=kv)


@every_level
@every_kv
@pytest.mark.parametrize("window", [1, 7, 64, 100, 300])
def test_window(level: str, kv: str, window: int) -> None:
    program = attention_program(heads=6, kv_heads=2, dim=32, window=window)
    assert_same_logits(program, LONG if window >= 100 else MIXED, level=level, kv=kv)


@every_level
@every_kv
@pytest.mark.parametrize("block_size", [1, 8, 24, 32])
def test_block_sizes(level: str, kv: str, block_size: int) -> None:
    program = attention_program(heads=4, kv_heads=2, dim=32 if block_size == 24 else 18, window=40)
    assert_same_logits(program, MIXED, level=level, kv=kv, steps=Steps(block_size=block_size))


@every_level
@every_kv
def test_softcap_and_head_norms(level: str, kv: str) -> None:
    program = attention_program(heads=4, kv_heads=2, dim=96, softcap=2.0, qk_norm=True)
    assert_same_logits(program, MIXED, level=level, kv=kv)


@every_level
@pytest.mark.parametrize("rope", [0, 3])
def test_partial_and_absent_rotation(level: str, rope: int) -> None:
    assert_same_logits(attention_program(heads=4, kv_heads=2, dim=17, rope=rope), MIXED, level=level)


def bits_of(program: Program, plan: list[list[Piece]], level: str, kv: str, threads: int) -> np.ndarray:
    """The outputs for request 0, as bits, in order of position."""
    steps = Steps()
    runtime = load(NativeRuntime(threads, level), program, kv=kv, steps=steps)
    found = []
    for pieces in plan:
        logits, begin = run(runtime, steps.inputs(pieces)), 0
        for piece in pieces:
            found += [logits[begin : begin + piece.count]] * (piece.request == 0)
            begin += piece.count
    runtime.close()
    return np.concatenate(found).view(np.int32)


@every_level
@every_kv
@pytest.mark.parametrize(("window", "dim"), [(0, 64), (90, 64), (90, 33)])
def test_same_bits_alone_in_chunks_in_a_batch_and_on_threads(level: str, kv: str, window: int, dim: int) -> None:
    program = attention_program(heads=6, kv_heads=2, dim=dim, window=window, softcap=3.0)
    length = 330
    whole = bits_of(program, [[Piece(0, at, 110)] for at in range(0, length, 110)], level, kv, 1)
    chunks = [[Piece(0, at, min(7, length - at))] for at in range(0, length, 7)]
    tail = [[Piece(0, 0, 150)], [Piece(0, 150, 120)], *([Piece(0, at, 1)] for at in range(270, length))]
    batch = [
        [Piece(1, 0, 20), Piece(0, 0, 131), Piece(2, 0, 3)],
        [Piece(2, 3, 1), Piece(1, 20, 1), Piece(0, 131, 140)],
        *([Piece(0, at, 1), Piece(1, at - 250, 1)] for at in range(271, length)),
    ]
    for plan, threads in ((chunks, 2), (tail, 1), (tail, 3), (batch, 2)):
        assert np.array_equal(bits_of(program, plan, level, kv, threads), whole)


@every_level
def test_weights_are_exponentials_within_a_ten_thousandth(level: str) -> None:
    program, dim = attention_program(heads=1, kv_heads=1, dim=32, rope=0), 32
    weights, steps = RandomWeights(program), Steps()
    embed = weights.tensors["embed"].data  # of a token its query, key and value, all exact in bfloat16
    embed[:] = 0.0
    embed[:, 0], embed[1:, dim] = 1.0, -np.arange(1, len(embed)) / 8.0
    embed[0, 2 * dim :] = 1.0
    runtime = load(NativeRuntime(1, level), program, weights, kv="bfloat16", steps=steps)
    steps.ids[:, 0] = 0
    for first in range(1, len(embed) - 3, 4):
        steps.ids[:, 1] = np.arange(first, first + 4)
        found = run(runtime, steps.inputs([Piece(request, 0, 2) for request in range(4)]))[1::2, 0].astype(np.float64)
        other = np.exp(embed[first : first + 4, dim].astype(np.float64) / np.sqrt(dim))
        np.testing.assert_allclose((1.0 / found - 1.0) / other, 1.0, rtol=0, atol=1e-4)
    runtime.close()


def test_a_long_request_is_split_over_threads() -> None:
    steps = Steps()
    runtime = load(NativeRuntime(2), attention_program(heads=1, kv_heads=1, dim=16), kv="bfloat16", steps=steps)
    for at in range(0, MAX_LEN - 10, 130):
        run(runtime, steps.inputs([Piece(0, at, 130)], "none"))
    runtime.start_profile()
    run(runtime, steps.inputs([Piece(0, MAX_LEN - 10, 1)]))
    lines = runtime.stop_profile().decode.lines
    assert sum(line.barriers for (_, op), line in lines.items() if op == "Attention") == 1  # its two ranges
    runtime.close()


@every_kv
@pytest.mark.parametrize("block_size", [16, 24])
def test_copied_blocks_serve_another_request(kv: str, block_size: int) -> None:
    steps = Steps(block_size=block_size)
    runtime = load(NativeRuntime(2), decoder_program(dim=19), kv=kv, steps=steps)
    run(runtime, steps.inputs([Piece(0, 0, 100)]))
    expected = run(runtime, steps.inputs([Piece(0, 100, 1)]))
    steps.ids[3] = steps.ids[0]
    runtime.copy_blocks(list(zip(steps.tables[0].tolist(), steps.tables[3].tolist(), strict=True)))
    assert np.array_equal(run(runtime, steps.inputs([Piece(3, 100, 1)])), expected)
    runtime.close()


@every_level
@every_kv
@pytest.mark.parametrize("length", [1, 17, 20])
def test_what_another_request_left_in_a_block_harms_nobody(level: str, kv: str, length: int) -> None:
    program = attention_program(heads=2, kv_heads=1, dim=32)
    weights, steps = RandomWeights(program), Steps()
    steps.ids[steps.ids == 5] = 6
    weights.tensors["embed"].data[5] = np.nan
    runtime = load(NativeRuntime(1, level), program, weights, kv=kv, steps=steps)
    good = steps.inputs([Piece(0, 0, length)])
    expected = run(runtime, good)
    poison = steps.inputs([Piece(0, 0, 40)])
    poison.token_ids[:] = 5
    assert np.isnan(run(runtime, poison)).any() or kv == "int8"
    assert np.array_equal(run(runtime, good), expected)
    runtime.close()


def test_bytes_of_a_block_are_told_with_padding_and_scales() -> None:
    runtime = NativeRuntime(1)
    program = decoder_program(dim=19)  # 2 layers, 2 KV heads; V is padded to 32
    heads = 2 * 2
    assert runtime.kv_bytes_per_block(program, 16, "float32") == heads * 16 * (19 + 32) * 4
    assert runtime.kv_bytes_per_block(program, 16, "bfloat16") == heads * 16 * (20 + 32) * 2
    assert runtime.kv_bytes_per_block(program, 16, "int8") == heads * (16 * (20 + 32) + 2 * 16 * 4)
    assert runtime.kv_bytes_per_block(program, 8, "int8") * 2 == runtime.kv_bytes_per_block(program, 16, "int8")
    with pytest.raises(UnsupportedError, match="float8"):
        runtime.kv_bytes_per_block(program, 16, "float8")
    runtime.close()
