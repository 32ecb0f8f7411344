"""What a step promises: same bits however it is cut, one foreign call, and errors that harm nobody."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from native_harness import (
    LEVELS,
    MAX_TOKENS,
    VOCAB,
    Piece,
    RandomWeights,
    Steps,
    attention_program,
    decoder_program,
    load,
    run,
    sampling,
)

from octavo.errors import MemoryPlanError, ModelFileError, StepError, UnsupportedError
from octavo.program.program import Program
from octavo.runtime.native import NativeRuntime
from octavo.runtime.native.library import NativeError

LENGTH = 150


def logits_of(
    program: Program, plan: list[list[Piece]], level: str, threads: int, dtype: str = "float32"
) -> np.ndarray:
    """Logits of all tokens of request 0, in order of position, whatever ran beside it."""
    steps = Steps()
    runtime = load(NativeRuntime(threads, level), program, dtype=dtype, steps=steps)
    found = []
    for pieces in plan:
        logits = run(runtime, steps.inputs(pieces))
        begin = 0
        for piece in pieces:
            if piece.request == 0:
                found.append(logits[begin : begin + piece.count])
            begin += piece.count
    runtime.close()
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["decoder", "window"])
def test_bits_do_not_depend_on_the_batch(level: str, dtype: str, kind: str) -> None:
    window = attention_program(heads=6, kv_heads=2, dim=36, window=50, softcap=3.0, qk_norm=True)
    program = decoder_program() if kind == "decoder" else window
    whole = logits_of(program, [[Piece(0, 0, LENGTH)]], level, 1, dtype)
    chunks = [[Piece(0, at, min(7, LENGTH - at))] for at in range(0, LENGTH, 7)]
    one_by_one = [[Piece(0, at, 1)] for at in range(LENGTH)]
    batch = [
        [Piece(1, 0, 20), Piece(0, 0, 61), Piece(2, 0, 3)],
        [Piece(2, 3, 1), Piece(1, 20, 1), Piece(0, 61, LENGTH - 61)],
    ]
    for plan, threads in ((chunks, 2), (one_by_one, 1), (batch, 2), (batch, 3)):
        assert np.array_equal(logits_of(program, plan, level, threads, dtype).view(np.int32), whole.view(np.int32))


def test_many_threads_give_the_bits_of_one() -> None:
    plan = [[Piece(0, 0, 64), Piece(1, 0, 64)], *([Piece(0, at, 1), Piece(1, at, 1)] for at in range(64, 100))]
    one = logits_of(decoder_program(), plan, "auto", 1)
    for threads in (2, 7):
        assert np.array_equal(logits_of(decoder_program(), plan, "auto", threads), one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_many_rows_in_blocks_give_the_bits_of_node_by_node(dtype: str) -> None:
    program, steps, length = decoder_program(), Steps(), 240
    runtime = load(NativeRuntime(2), program, dtype=dtype, steps=steps, max_tokens=length + 100)
    runtime.start_profile()
    blocks = run(runtime, steps.inputs([Piece(0, 0, length), Piece(1, 0, 100)]))[:length]
    lines = runtime.stop_profile().other.lines
    runtime.close()
    assert all(line.seconds > 0 for line in lines.values())
    attentions, of_logits, sampler = len(program.kv_layers), 2, 1
    barriers = sum(line.barriers for line in lines.values())
    assert barriers <= (attentions + 1) + 2 * attentions + of_logits + sampler, "one a run of nodes, not some a node"
    chunks = [[Piece(0, at, 60)] for at in range(0, length, 60)]
    assert np.array_equal(logits_of(program, chunks, "auto", 2, dtype).view(np.int32), blocks.view(np.int32))


def test_one_foreign_call_a_step() -> None:
    steps = Steps()
    runtime = load(NativeRuntime(1), decoder_program(), steps=steps)
    for count, pieces in enumerate(([Piece(0, 0, 5)], [Piece(0, 5, 1), Piece(1, 0, 9)], [Piece(0, 6, 1)]), start=1):
        run(runtime, steps.inputs(pieces))
        assert runtime.num_foreign_calls == count
    runtime.close()


def test_step_without_logits_still_writes_kv() -> None:
    steps = Steps()
    program = decoder_program()
    expected = logits_of(program, [[Piece(0, 0, 9)]], "auto", 1)[-1]
    runtime = load(NativeRuntime(1), program, steps=steps)
    assert run(runtime, steps.inputs([Piece(0, 0, 8)], "none")).shape == (0, VOCAB)
    assert np.array_equal(run(runtime, steps.inputs([Piece(0, 8, 1)]))[0], expected)
    runtime.close()


BAD = {
    "token_ids": ("token_ids", 2, VOCAB),
    "token_ids below": ("token_ids", 0, -1),
    "positions": ("positions", 1, 400),
    "slots": ("slots", (0, 3), 1 << 40),
    "slots below": ("slots", (0, 3), -1),
    "query_start_loc": ("query_start_loc", 1, 9),
    "seq_lens": ("seq_lens", 0, 1),
    "seq_lens above": ("seq_lens", 0, 1 << 30),
    "block_tables": ("block_tables", (0, 0, 0), 1 << 30),
    "logits_indices": ("logits_indices", 0, 5),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_inputs_are_refused_and_the_runtime_goes_on(case: str) -> None:
    steps = Steps()
    runtime = load(NativeRuntime(2), decoder_program(), steps=steps)
    good = steps.inputs([Piece(0, 0, 5)])
    expected = run(runtime, good)
    field, where, value = BAD[case]
    array = getattr(good, field).copy()
    array[where] = value
    with pytest.raises(NativeError, match=field.split("_")[0]):
        run(runtime, dataclasses.replace(good, **{field: array}))
    assert np.array_equal(run(runtime, good), expected)
    runtime.close()


def test_wrong_array_types_and_shapes_are_refused() -> None:
    steps = Steps()
    runtime = load(NativeRuntime(1), decoder_program(), steps=steps)
    good = steps.inputs([Piece(0, 0, 5)])
    for field, array in {
        "token_ids": good.token_ids.astype(np.int64),
        "positions": good.positions[:-1],
        "slots": good.slots[0],
        "seq_lens": np.repeat(good.seq_lens, 2)[::2].astype(np.int64),
    }.items():
        with pytest.raises(StepError, match=field):
            run(runtime, dataclasses.replace(good, **{field: array}))
    too_many = sampling(4)
    runtime.execute(good)
    with pytest.raises(StepError, match="temperature"):
        runtime.sample(too_many)
    with pytest.raises(StepError, match="without execute"):
        runtime.sample(too_many)
    runtime.close()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("bias_ids", {"bias_start": [0, 1], "bias_ids": [VOCAB], "bias_values": [1.0]}),
        ("bias_start", {"bias_start": [1, 1], "bias_ids": [0], "bias_values": [1.0]}),
        ("seen_ids", {"seen_start": [0, 1], "seen_ids": [-1], "seen_counts": [1]}),
        ("seen_start", {"seen_start": [0, 2], "seen_ids": [1], "seen_counts": [1]}),
        ("mask_of", {"mask_of": [1], "masks": [[0] * -(-VOCAB // 32)]}),
        ("mask_of", {"mask_of": [-2], "masks": [[0] * -(-VOCAB // 32)]}),
    ],
)
def test_wrong_sampling_is_refused(field: str, changes: dict[str, list[float]]) -> None:
    steps = Steps()
    runtime = load(NativeRuntime(1), decoder_program(), steps=steps)
    runtime.execute(steps.inputs([Piece(0, 0, 5)], "last"))
    dtypes = {"bias_values": np.float32, "masks": np.uint32}
    arrays = {k: np.array(v, dtypes.get(k, np.int32)) for k, v in changes.items()}
    with pytest.raises(NativeError, match=field):
        runtime.sample(sampling(1, **arrays))
    runtime.close()


def test_a_step_above_the_limits_is_refused() -> None:
    steps = Steps()
    runtime = load(NativeRuntime(1), decoder_program(), steps=steps)
    with pytest.raises(NativeError, match=f"at most {MAX_TOKENS}"):
        run(runtime, steps.inputs([Piece(0, 0, MAX_TOKENS + 1)]))
    runtime.close()


def test_loading_refuses_what_it_cannot_do() -> None:
    program = decoder_program()
    weights = RandomWeights(program)
    with pytest.raises(UnsupportedError, match="float16"):
        load(NativeRuntime(1), program, weights, dtype="float16")
    with pytest.raises(UnsupportedError, match="level"):
        NativeRuntime(1, "sse9")
    weights.tensors["1.q"].shape = (1, 2)
    with pytest.raises(ModelFileError, match=r"1\.q"):
        load(NativeRuntime(1), program, weights)
    runtime = load(NativeRuntime(1), program)
    with pytest.raises(MemoryPlanError, match="reserve"):
        runtime.allocate_kv(1 << 34, 16)
    runtime.close()
    with pytest.raises(StepError, match="closed"):
        runtime.logits()


def test_memory_is_what_was_announced() -> None:
    program = decoder_program()
    runtime = NativeRuntime(1)
    matrices = sum(int(np.prod(w.shape)) for w in program.weights if w.role != "vector")
    padded = sum(
        -(-rows // 16) * 16 * -(-w.shape[1] // 32) * 32
        for w in program.weights
        if w.role != "vector"
        for rows in w.part_rows
    )
    vectors = sum(w.shape[0] for w in program.weights if w.role == "vector")
    weights = RandomWeights(program)
    assert runtime.weight_bytes(program, weights, "float32") == 4 * (matrices + vectors)
    assert runtime.weight_bytes(program, weights, "bfloat16") == 2 * padded + 4 * vectors
    assert runtime.kv_bytes_per_block(program, 16) == 2 * 16 * 2 * (20 + 32) * 4  # layers, slots, heads, K + padded V
    runtime.close()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_end_with_the_runtime() -> None:
    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = num_threads()
    for _ in range(5):
        runtime = load(NativeRuntime(4), decoder_program())
        run(runtime, Steps().inputs([Piece(0, 0, 5)]))
        runtime.close()
        runtime.close()
    assert num_threads() < before + 5, "each of the five had three"


def test_a_profile_has_a_time_for_every_node() -> None:
    steps = Steps()
    program = decoder_program()
    runtime = load(NativeRuntime(2), program, steps=steps)
    expected = run(runtime, steps.inputs([Piece(0, 0, 40), Piece(1, 0, 9)]))
    runtime.start_profile()
    assert np.array_equal(run(runtime, steps.inputs([Piece(0, 0, 40), Piece(1, 0, 9)])), expected)
    run(runtime, steps.inputs([Piece(0, 40, 1), Piece(1, 9, 1)]))
    profile = runtime.stop_profile()
    with pytest.raises(StepError, match="start_profile"):
        runtime.stop_profile()
    assert (profile.decode.count, profile.other.count) == (1, 1)
    assert min(profile.limits.bytes_per_second, *profile.limits.operations_per_second.values()) > 1e8
    lines = profile.other.lines.values()
    assert all(line.seconds > 0 for line in lines)
    assert sum(line.barriers for line in lines) >= 8  # two threads share at least the linears
    assert sum(line.barriers for line in profile.decode.lines.values()) < sum(line.barriers for line in lines)
    runtime.close()
