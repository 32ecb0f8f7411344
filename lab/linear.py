"""Checks and times the packed Linear, level by level: `python -m lab.linear`.

Needs the built library and numpy only. Every level that this machine has must agree with a float64 model of the
arithmetic (weights and activations rounded to bf16, exact sums), and int8 with its definition; then it prints bytes and
operations a second for each (level, store, rows). One line per result, `RESULT key=value ...`; exits with 1 when a
check fails.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from octavo.errors import UnsupportedError
from octavo.program.ops import Embedding, GatherRows, Linear, Weight
from octavo.program.program import Program, ProgramBuilder
from octavo.runtime.base import Float32, SamplingInputs, StepInputs, Tensor
from octavo.runtime.bfloat16 import round_to_bfloat16
from octavo.runtime.native.library import LEVELS, load_library, resolve_level
from octavo.runtime.native.runtime import NativeRuntime
from octavo.runtime.reference.int8 import Int8Matrix

STORES = ("BF16", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q8_0", "Q6_K", "INT8")
CHECK_ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 64)
TIMED_ROWS = (1, 2, 4, 8, 16, 32, 256)
CHECK_SHAPE = (83, 512)  # channels that fill no group, depth of whole blocks of every type
TOLERANCE = 1e-5  # of the largest output: float32 sums in another order
BARRIER_STEPS = 3000
_TOKENS = 61
_SCALE = 0.37  # makes activations that bf16 does not hold
_HALF_AT = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


class Blocks:
    """A WeightSource whose matrices "w..." are one random tensor of a stored type, and "x" random floats."""

    def __init__(self, type_name: str, shape: tuple[int, int]) -> None:
        random = np.random.default_rng(3)
        rows, cols = shape
        self._x = random.standard_normal((_TOKENS, cols)).astype(np.float32)
        if type_name in ("BF16", "INT8"):  # int8 is made at load
            type_name = "BF16"
            data = (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            row_bytes = load_library().octavo_row_bytes(type_name.encode(), 256)
            data = random.integers(0, 256, (rows, cols // 256, row_bytes), dtype=np.uint8)
            block = row_bytes if type_name.endswith("_K") else row_bytes // 8
            for at in _HALF_AT[type_name]:  # scales from 2^-5 to 2^-4, of either sign
                data[..., at + 1 :: block] = data[..., at + 1 :: block] & 0x83 | 0x28
            data = data.reshape(rows, -1)
        self._tensor = Tensor("w", type_name, shape, np.ascontiguousarray(data))

    def get(self, part: str) -> Tensor:
        """The tensor of a part."""
        return Tensor(part, "F32", self._x.shape, self._x) if part == "x" else self._tensor

    def type_of(self, part: str) -> str:
        """Its stored type name."""
        return self.get(part).type


def linear_program(shape: tuple[int, int], num_weights: int, role: str = "linear") -> Program:
    """Looks activations up and multiplies them with every weight; the last product is the logits.

    Role "embedding": looks up rows of the weight instead, which shows the values that are kept.
    """
    channels, depth = shape
    build = ProgramBuilder()
    x, rows = build.tokens("x", depth), build.logit_rows("rows", depth)
    if role == "embedding":
        table = Weight("w", ("w",), (channels,), shape, "embedding")
        build.add(Embedding("x", weight=table, out=x))
        build.add(GatherRows("rows", x=x, out=rows))
        return build.finish(hidden=rows, logits=rows, vocab_size=depth, max_len=1 << 16)
    build.add(
        Embedding("x", weight=Weight("x", ("x",), (_TOKENS,), (_TOKENS, depth), "embedding"), out=x, scale=_SCALE)
    )
    for n in range(num_weights):
        out = build.tokens("out", channels)
        build.add(Linear("w", x=x, weight=Weight(f"w{n}", (f"w{n}",), (channels,), shape, "linear"), out=out))
    logits = build.logit_rows("logits", channels)
    build.add(GatherRows("logits", x=out, out=logits))
    return build.finish(hidden=logits, logits=logits, vocab_size=channels, max_len=1 << 16)


def load(level: str, threads: int, program: Program, source: Blocks, dtype: str, rows: int) -> NativeRuntime:
    """A runtime that is ready to step."""
    runtime = NativeRuntime(threads, level)
    runtime.load(program, source, dtype=dtype, max_num_tokens=rows, max_num_logits=rows, max_num_requests=1)
    runtime.allocate_kv(rows, 1)  # no layer has any, but steps name slots
    return runtime


def step(runtime: NativeRuntime, rows: int, num_logits: int) -> None:
    """One step of `rows` tokens, of which the first `num_logits` want logits."""
    tokens = np.arange(rows, dtype=np.int32)
    inputs = StepInputs(
        token_ids=tokens % np.int32(_TOKENS),
        positions=tokens,
        slots=tokens.astype(np.int64)[None],
        query_start_loc=np.array([0, rows], np.int32),
        seq_lens=np.array([rows], np.int32),
        block_tables=np.zeros((1, 1, rows), np.int32),
        logits_indices=tokens[:num_logits],
    )
    runtime.execute(inputs)
    runtime.sample(SamplingInputs.greedy(num_logits))


def kept_values(source: Blocks, shape: tuple[int, int], dtype: str) -> Float32:
    """The first rows of the weight as a look-up gives them, [min(channels, tokens), depth]."""
    rows = min(shape[0], _TOKENS)
    runtime = load("portable", 1, linear_program(shape, 1, "embedding"), source, dtype, rows)
    step(runtime, rows, rows)
    values = runtime.logits()
    runtime.close()
    return values


def dtype_of(store: str) -> str:
    """What a store is loaded as."""
    return "int8" if store == "INT8" else "quantized"


def model(source: Blocks, store: str) -> tuple[Float32, npt.NDArray[np.float64]]:
    """Values of the first rows as they must be kept, and the outputs [tokens, rows] of the arithmetic of a store."""
    exact, x = kept_values(source, CHECK_SHAPE, "float32"), source.get("x").data
    if store == "INT8":
        matrix = Int8Matrix.of(exact)
        x = Int8Matrix.of(x).rows(np.arange(len(x))) * np.float32(_SCALE)
        return matrix.rows(np.arange(len(exact))), matrix.linear(x).astype(np.float64)
    exact = round_to_bfloat16(exact)
    x = round_to_bfloat16(round_to_bfloat16(x) * np.float32(_SCALE))
    return exact, x.astype(np.float64) @ exact.astype(np.float64).T


def check(level: str, type_name: str, threads: int) -> bool:
    """Compares every number of rows with the model; prints the largest error, as a share of the largest output."""
    source, dtype = Blocks(type_name, CHECK_SHAPE), dtype_of(type_name)
    exact, expected = model(source, type_name)
    worst = 0.0 if np.array_equal(kept_values(source, CHECK_SHAPE, dtype), exact) else float("inf")
    runtime = load(level, threads, linear_program(CHECK_SHAPE, 1), source, dtype, max(CHECK_ROWS))
    expected = expected[np.arange(max(CHECK_ROWS)) % _TOKENS]
    first: Float32 | None = None
    same_bits = True
    for rows in reversed(CHECK_ROWS):
        step(runtime, rows, rows)
        found = runtime.logits()
        first = found if first is None else first
        same_bits &= np.array_equal(found.view(np.int32), first[:rows].view(np.int32))
        error = np.abs(found[:, : exact.shape[0]] - expected[:rows]).max() / np.abs(expected).max()
        worst = max(worst, float(error)) if np.isfinite(error) else float("inf")
    runtime.close()
    passed = same_bits and worst <= TOLERANCE
    verdict = "passed" if passed else "FAILED"
    print(f"RESULT check={verdict} level={level} store={type_name} error={worst:.1e} same_bits={same_bits}", flush=True)
    return passed


def measure(level: str, type_name: str, options: argparse.Namespace) -> None:
    """Times a pass over many weights, more than caches hold; the best of some."""
    channels, depth = shape = tuple(options.shape)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    source = Blocks(type_name, shape)
    each = load_library().octavo_part_bytes(type_name.encode(), channels, depth)
    num_weights = max(2, -(-options.megabytes * 1_000_000 // each))
    runtime = load(
        level, options.threads, linear_program(shape, num_weights), source, dtype_of(type_name), max(TIMED_ROWS)
    )
    for rows in TIMED_ROWS:
        best = float("inf")
        for _ in range(options.repeats):
            start = clock()
            step(runtime, rows, 0)
            best = min(best, clock() - start)
        operations = 2 * rows * channels * depth * num_weights
        print(
            f"RESULT level={level} store={type_name} rows={rows} ms={best * 1e3:.2f} "
            f"GB/s={each * num_weights / best / 1e9:.1f} GFLOP/s={operations / best / 1e9:.0f}",
            flush=True,
        )
    runtime.close()


def barrier(level: str) -> None:
    """Prints what a node takes that has nearly nothing to compute, alone and handed to two threads: best of many steps.
    The second is a whole barrier: waking the other thread, sharing out, and waiting until all is done."""
    shape, num = (64, 64), 300
    took = []
    for threads in (1, 2):
        runtime = load(level, threads, linear_program(shape, num), Blocks("BF16", shape), "bfloat16", 1)
        best = float("inf")
        for _ in range(BARRIER_STEPS):
            start = time.perf_counter()
            step(runtime, 1, 0)
            best = min(best, time.perf_counter() - start)
        runtime.start_profile()
        step(runtime, 1, 0)
        barriers = sum(line.barriers for line in runtime.stop_profile().decode.lines.values())
        runtime.close()
        took.append(f"{best / num * 1e6:.2f} (barriers {barriers})")
    print(f"RESULT barrier level={level} us_a_node 1_thread={took[0]} 2_threads={took[1]}", flush=True)


def limits(level: str, threads: int, dtype: str) -> None:
    """Prints what the machine can do at most in the arithmetic of a dtype, measured."""
    runtime = load(level, threads, linear_program((32, 256), 1), Blocks("BF16", (32, 256)), dtype, 1)
    runtime.start_profile()
    found = runtime.stop_profile().limits
    runtime.close()
    print(
        f"RESULT limit level={level} dtype={dtype} threads={threads} GB/s={found.bytes_per_second / 1e9:.1f} "
        f"GFLOP/s={found.operations_per_second['int8' if dtype == 'int8' else 'bfloat16'] / 1e9:.0f}",
        flush=True,
    )


def available_levels() -> list[str]:
    """The levels that this machine and this build have, the plainest first."""
    found = []
    for level in LEVELS[1:]:
        try:
            found.append(resolve_level(level))
        except UnsupportedError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs checks, then measurements."""
    parser = argparse.ArgumentParser(prog="python -m lab.linear", description=__doc__)
    parser.add_argument("--levels", nargs="*", default=available_levels(), help="default: all of this machine")
    parser.add_argument("--stores", nargs="*", default=list(STORES), choices=STORES, help="stored types")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 1536), metavar=("CHANNELS", "DEPTH"))
    parser.add_argument("--megabytes", type=int, default=160, help="of weights in a pass; more than the caches hold")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument(
        "--barrier", action="store_true", help="what it takes to hand a node to two threads, and no more"
    )
    parser.add_argument("--cpu-time", action="store_true", help="one thread by its own time, for busy machines")
    options = parser.parse_args(arguments)
    if options.cpu_time:
        options.threads = 1
    print(f"machine: {platform.machine()}, numpy {np.__version__}, library ABI {_abi(load_library())}")
    if options.barrier:
        barrier(options.levels[-1])
        return 0
    failed = 0
    for level in options.levels:
        failed += sum(not check(level, store, options.threads) for store in options.stores)
    if options.check_only:
        return 1 if failed else 0
    for level in options.levels:
        for dtype in sorted({dtype_of(store) for store in options.stores}):
            limits(level, options.threads, dtype)
        for store in options.stores:
            measure(level, store, options)
    return 1 if failed else 0


def _abi(library: ctypes.CDLL) -> int:
    version: int = library.octavo_abi_version()
    return version


if __name__ == "__main__":
    sys.exit(main())
