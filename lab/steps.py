"""`python -m lab.steps`: whole steps by node on random weights of SmolLM2-135M's shape, numpy alone (no model file).

For machines that have nothing but numpy. Prints `RESULT` lines: the best and the median step of each case, then what
each node of the program took. To compare two builds on a machine that changes speed, run them in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab.machine import describe_machine
from lab.nodes import step_inputs
from lab.perplexity import BLOCK_SIZE
from octavo.models.decoder import record
from octavo.models.dummy import DummyWeights
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.spec import ModelSpec
from octavo.program.program import Program
from octavo.runtime.base import SamplingInputs, StepInputs, Tensor
from octavo.runtime.native.library import load_library
from octavo.runtime.native.runtime import NativeRuntime

SHAPE = Path(__file__).parent / "shapes" / "smollm2-135m"
MAX_TOKENS = 1024
# (requests, tokens computed before, tokens of a step, steps that follow each other)
CASES = {
    "decode-1": (1, 192, 1, 1),
    "decode-32": (32, 224, 1, 1),
    "prompt-128": (1, 0, 128, 1),
    "prompt-1024": (1, 0, 512, 2),
    "prompt-1024-by-256": (1, 0, 256, 4),
    "prompt-1024-whole": (1, 0, 1024, 1),
}
_HALVES = {"Q4_0": (0x1C00,), "Q4_1": (0x1C00, 0xA400), "Q8_0": (0x0C00,)}  # scale, minimum: weights of about 0.02


class StoredWeights(DummyWeights):
    """Random weights of a shape whose matrices are random blocks of `store`, as files have them."""

    def __init__(self, spec: ModelSpec, store: str) -> None:
        super().__init__(spec, 0)
        self._store = store

    def get(self, part: str) -> Tensor:
        """A matrix of blocks (the embedding Q8_0), or a float32 vector."""
        shape, store = self._shapes[part], self.type_of(part)
        if store == "F32":
            return super().get(part)
        row_bytes = load_library().octavo_row_bytes(store.encode(), shape[1])
        data = np.random.default_rng(0).integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)
        halves = data.view(np.uint16).reshape(shape[0], shape[1] // 32, -1)
        for i, half in enumerate(_HALVES[store]):
            halves[..., i] = half
        return Tensor(part, store, shape, data)

    def type_of(self, part: str) -> str:
        """The stored type of a part."""
        if len(self._shapes[part]) == 1:
            return "F32"
        return "Q8_0" if "embed" in part else self._store


def inputs(case: tuple[int, int, int, int], index: int, spec: ModelSpec, groups: int) -> StepInputs:
    """Step `index` of a case; each request has blocks of its own."""
    num_requests, past, num_tokens, num_steps = case
    begin = past + index * num_tokens
    return step_inputs(
        np.random.default_rng(index),
        (num_requests, begin, num_tokens),
        vocab_size=spec.vocab_size,
        num_groups=groups,
        length=past + num_steps * num_tokens,
    )


def load(store: str, spec: ModelSpec, program: Program, options: argparse.Namespace) -> NativeRuntime:
    """A runtime with random weights, as bf16, int8, or blocks of a GGUF type."""
    runtime = NativeRuntime(options.threads, options.level)
    blocks = store in _HALVES
    source = StoredWeights(spec, store) if blocks else DummyWeights(spec, 0)
    dtype = "quantized" if blocks else store
    runtime.load(program, source, dtype=dtype, max_num_tokens=MAX_TOKENS, max_num_logits=32, max_num_requests=32)
    runtime.allocate_kv(1024, BLOCK_SIZE, options.kv)
    return runtime


def run(runtime: NativeRuntime, steps: Sequence[StepInputs]) -> float:
    """Seconds of some steps, greedy."""
    start = time.perf_counter()
    for step in steps:
        runtime.execute(step)
        runtime.sample(SamplingInputs.greedy(len(step.logits_indices)))
    return time.perf_counter() - start


def measure(store: str, spec: ModelSpec, program: Program, options: argparse.Namespace) -> None:
    """Times the cases, then profiles them."""
    runtime = load(store, spec, program, options)
    for name in options.cases:
        case = CASES[name]
        steps = [inputs(case, i, spec, program.num_kv_groups) for i in range(case[3])]
        run(runtime, steps)
        seconds: list[float] = []
        end = time.perf_counter() + options.seconds
        while len(seconds) < 3 or time.perf_counter() < end:
            seconds.append(run(runtime, steps))
        tokens = case[0] * case[2] * case[3]
        best, median = min(seconds), statistics.median(seconds)
        print(
            f"RESULT {options.label} {store} {name} best {best * 1e3:.2f} ms {tokens / best:.0f} tok/s, "
            f"median {median * 1e3:.2f} ms {tokens / median:.0f} tok/s, {len(seconds)} times",
            flush=True,
        )
        if not options.nodes:
            continue
        runtime.start_profile()
        for _ in range(min(8, len(seconds))):
            run(runtime, steps)
        profile = runtime.stop_profile()
        kind = profile.decode if case[2] == 1 else profile.other
        limits = profile.limits
        rates = [f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits.operations_per_second.items()]
        print(f"limits {limits.bytes_per_second / 1e9:.1f} GB/s {', '.join(rates)}")
        for (node, op), line in kind.lines.items():
            us = line.seconds / kind.count * 1e6 * case[3]
            if us > 20:
                rate = line.cost.operations / line.seconds / 1e9
                print(f"  {node:12} {op:22} {us:10.1f} us {line.cost.moved / line.seconds / 1e9:7.1f} GB/s {rate:8.1f}")
    runtime.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every store in turn."""
    parser = argparse.ArgumentParser(prog="python -m lab.steps", description=__doc__)
    parser.add_argument("--stores", nargs="+", default=["Q4_1", "bfloat16", "int8"], help="Q4_0, Q4_1, Q8_0 or a dtype")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--kv", default="bfloat16")
    parser.add_argument("--level", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case, three times at least")
    parser.add_argument("--nodes", action="store_true", help="what each node took, too")
    parser.add_argument("--label", default="", help="before each line")
    options = parser.parse_args(arguments)
    spec = read_spec(resolve_model(str(SHAPE), load_format="dummy"), max_model_len=2048)
    program = record(spec)
    print(f"machine: {describe_machine()}", flush=True)
    for store in options.stores:
        measure(store, spec, program, options)


if __name__ == "__main__":
    main()
