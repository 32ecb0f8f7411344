"""`python -m lab.sampling`: microseconds a row that the CPU sampler takes, by settings and by how flat the logits are.

A program that only looks rows up hands given logits to the sampler; its share of a step is what the profile says. The
rows are those of the default model over a public text, and normal noise, which is flatter than any trained model.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from lab.machine import describe_machine
from lab.perplexity import SLICE, Arm
from lab.teacher import one_request
from lab.text import load_text
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.program.ops import Embedding, GatherRows, Weight
from octavo.program.program import ProgramBuilder
from octavo.runtime.base import Float32, SamplingInputs, Tensor
from octavo.runtime.native import NativeRuntime
from octavo.text.tokenizer import load_tokenizer

ROWS, STEPS = 32, 25
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8": {"temperature": 0.8},
    "0.8, top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "1, top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "1, min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "greedy, 5 logprobs": {"num_logprobs": 5},
    "1, 5 logprobs": {"temperature": 1.0, "num_logprobs": 5},
}


class _Given:
    """A WeightSource of one matrix."""

    def __init__(self, values: Float32) -> None:
        self._tensor = Tensor("logits", "F32", values.shape, values)

    def get(self, part: str) -> Tensor:
        return self._tensor

    def type_of(self, part: str) -> str:
        return self._tensor.type


def model_logits(model: str) -> Float32:
    """Logits [ROWS, vocab] of the last tokens of a text's beginning."""
    files = resolve_model(model)
    spec = read_spec(files)
    tokenizer = load_tokenizer(files)
    ids = np.array(tokenizer.encode(load_text("moby-dick")[:4000])[:SLICE], np.int32)
    arm = Arm("quantized", "native", 1, spec, open_weights(files, spec), SLICE)
    return arm.logits(ids, 0)[-ROWS:]


def microseconds(logits: Float32, level: str) -> dict[str, float]:
    """Median time of one thread a row, by name of the settings."""
    rows, vocab = logits.shape
    build = ProgramBuilder()
    x, out = build.tokens("x", vocab), build.logit_rows("logits", vocab)
    table = Weight("logits", ("logits",), (rows,), (rows, vocab), "embedding")
    build.add(Embedding("embed", weight=table, out=x))
    build.add(GatherRows("gather", x=x, out=out))
    program = build.finish(hidden=out, logits=out, vocab_size=rows, max_len=rows)
    runtime = NativeRuntime(1, level)
    runtime.load(program, _Given(logits), dtype="float32", max_num_tokens=rows, max_num_logits=rows, max_num_requests=1)
    runtime.allocate_kv(rows // 16, 16)
    step = one_request(np.arange(rows, dtype=np.int32), first_logits=0, block_size=16)
    found = {}
    for name, settings in SETTINGS.items():
        sampling = SamplingInputs.greedy(rows)
        for field, value in settings.items():
            getattr(sampling, field)[:] = value
        runtime.start_profile()
        for number in range(STEPS):
            sampling.seeds[:] = np.arange(rows) + number * rows
            runtime.execute(step)
            runtime.sample(sampling)
        line = runtime.stop_profile().other.lines["sampler", "Sample"]
        found[name] = line.seconds / STEPS / rows * 1e6
    runtime.close()
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m lab.sampling", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="whose logits (default: %(default)s)")
    parser.add_argument("--level", default="auto", help="instruction level (default: the machine's best)")
    args = parser.parse_args(argv)
    real = model_logits(args.model)
    noise = np.random.default_rng(0).standard_normal(real.shape, dtype=np.float32)
    columns = {args.model: real, "normal, deviation 3": 3 * noise, "normal, deviation 1": noise}
    times = {name: microseconds(np.ascontiguousarray(logits), args.level) for name, logits in columns.items()}
    table = Table("us a row, one thread", *columns, title=f"{real.shape[1]:,} logits; {describe_machine()}")
    for name in SETTINGS:
        table.add_row(name, *(f"{found[name]:.1f}" for found in times.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
