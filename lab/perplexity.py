"""`python -m lab.perplexity MODEL --dtype A --against B`: what an arithmetic costs, on public text.

Every dtype runs the same windows of tokens; the KV cache starts empty in each. Written to lab/results as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lab.arithmetic import ARITHMETICS, REQUANTIZABLE, RequantizedWeights, SimulatedRuntime, SimulatedWeights
from lab.divergence import Scores, perplexity_difference
from lab.machine import describe_machine
from lab.teacher import one_request
from lab.text import TEXTS, load_text
from octavo.errors import OctavoError
from octavo.models.decoder import record
from octavo.models.hub import cache_folder, resolve_model
from octavo.models.reader import read_spec
from octavo.models.spec import ModelSpec
from octavo.models.weights import open_weights
from octavo.program.program import Program
from octavo.runtime.base import Float32, Int32, Runtime, SamplingInputs, StepInputs, WeightSource
from octavo.runtime.choose import create
from octavo.text.tokenizer import Tokenizer, load_tokenizer

RESULTS = Path(__file__).parent / "results"
BLOCK_SIZE = 16
SLICE = 128  # tokens a step: logits of a whole window would take a gigabyte with large vocabularies
MAX_CHARACTERS_PER_TOKEN = 8  # how much text is tokenised for so many tokens


class Arm:
    """One arithmetic: a runtime with the model loaded, fed one window at a time.

    `name` is DTYPE or DTYPE+KV: how matrices are kept and computed with, and how the KV cache is kept (float32).
    """

    def __init__(
        self, name: str, runtime: str, threads: int, spec: ModelSpec, weights: WeightSource, window: int
    ) -> None:
        self.name = name
        dtype, _, kv_dtype = name.partition("+")
        self.scores = Scores()
        self._runtime, source, kept = _runtime_for(dtype, runtime, threads, weights)
        loaded = self._runtime.load(
            record(spec), source, dtype=kept, max_num_tokens=SLICE, max_num_logits=SLICE, max_num_requests=1
        )
        self._runtime.allocate_kv(-(-window // BLOCK_SIZE), BLOCK_SIZE, kv_dtype or "float32")
        simulated = ARITHMETICS.get(dtype)
        computed = f"simulated: {simulated.description}" if simulated else loaded
        self.description = f"{computed}, KV {kv_dtype}" if kv_dtype else computed

    def logits(self, window: Int32, start: int) -> Float32:
        """Logits [n, vocab] of what follows tokens start .. start + n - 1; slices of a window come in order."""
        inputs = slice_inputs(window, start)
        self._runtime.execute(inputs)
        self._runtime.sample(SamplingInputs.greedy(len(inputs.token_ids)))
        return self._runtime.logits()


def _runtime_for(dtype: str, runtime: str, threads: int, weights: WeightSource) -> tuple[Runtime, WeightSource, str]:
    """(runtime, weights, dtype to load them as)."""
    if simulated := ARITHMETICS.get(dtype):
        return SimulatedRuntime(simulated.activations), SimulatedWeights(weights, simulated.weights), "float32"
    return create(runtime, threads, dtype), weights, dtype


def slice_inputs(window: Int32, start: int) -> StepInputs:
    """Tokens start .. start + SLICE - 1 of a window as a step of one request whose KV lies in blocks 0, 1, 2, ..."""
    tokens = window[start : start + SLICE]
    return one_request(tokens, start=start, first_logits=start, block_size=BLOCK_SIZE)


def windows_of(text: str, tokenizer: Tokenizer, num_tokens: int, window: int) -> list[Int32]:
    """Windows of `window` tokens, enough to predict `num_tokens` (rounded up to whole windows).

    They do not overlap. Each begins with the model's own first token where its tokenizer adds one; else the first
    token of the text is what is not predicted.
    """
    first = tokenizer.encode("")
    body = window - len(first)
    num_windows = -(-num_tokens // (window - 1))
    characters = num_windows * body * MAX_CHARACTERS_PER_TOKEN
    ids = tokenizer.encode(text[:characters], add_special_tokens=False)[: num_windows * body]
    if len(ids) < num_windows * body:
        raise SystemExit(f"the text has {len(ids):,} tokens, {num_windows * body:,} are asked for: lower --tokens")
    return [np.array(first + ids[i * body : (i + 1) * body], np.int32) for i in range(num_windows)]


def measure(arms: list[Arm], windows: list[Int32], kept: Path | None = None) -> None:
    """Feeds every window to every arm; arms[0] is what the others are compared with.

    Where there is a file `kept`, windows whose scores it has are not computed; it is written after every other one.
    """
    against = arms[0]
    for index, window in _shown(windows, restore(kept, arms, len(windows), len(windows[0]) - 1) if kept else 0):
        for start in range(0, len(window), SLICE):
            targets = window[start + 1 : start + 1 + SLICE]  # the window's last token has none
            baseline = against.logits(window, start)
            against.scores.add(baseline, baseline, targets)
            for arm in arms[1:]:
                arm.scores.add(arm.logits(window, start), baseline, targets)
        if kept:
            keep(kept, arms, index + 1)


def _shown(windows: list[Int32], done: int) -> Iterator[tuple[int, Int32]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("windows", total=len(windows), completed=done)
        for index in range(done, len(windows)):
            yield index, windows[index]
            progress.update(task, completed=index + 1)


def keep(path: Path, arms: list[Arm], num_windows: int) -> None:
    """Writes the scores of the first windows in place of what the file had."""
    scores: dict[str, Any] = {
        f"{name}-{i}": np.concatenate(kept) for i, arm in enumerate(arms) for name, kept in arm.scores.lists()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".new.npz")
    np.savez(staged, num_windows=num_windows, **scores)
    staged.replace(path)


def restore(path: Path, arms: list[Arm], num_windows: int, window_scores: int) -> int:
    """Puts the scores that a file has of the first `num_windows` windows into the arms; returns of how many it has."""
    if not path.exists():
        return 0
    with np.load(path, allow_pickle=False) as kept:
        done = min(int(kept["num_windows"]), num_windows)
        for i, arm in enumerate(arms):
            for name, scores in arm.scores.lists():
                scores.append(kept[f"{name}-{i}"][: done * window_scores])
    return done


def kept_path(options: argparse.Namespace, arms: list[Arm]) -> Path:
    """Where the scores of a measurement are kept: its name says which, whatever its --tokens and --threads."""
    asked = (options.model, options.text, options.window, options.runtime, options.stored_as)
    computed = [(arm.name, arm.description.replace(f"{options.threads} threads, ", "")) for arm in arms]
    digest = hashlib.sha256(repr((asked, computed)).encode()).hexdigest()[:12]
    return cache_folder() / "perplexity" / f"{Path(options.model).stem}-{digest}.npz"


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured: a model, a text, how much of it."""

    model: str
    text: str
    window: int
    stored_types: dict[str, int]  # tensors of each type that a matrix is stored as


def result_of(subject: Subject, arms: list[Arm], command: str) -> dict[str, Any]:
    """The JSON result. Differences and standard errors are relative (0.01 is 1 %), divergences in nats a token."""
    against = arms[0]
    rows = []
    for arm in arms[1:]:
        difference, error = perplexity_difference(arm.scores, against.scores, subject.window - 1)
        rows.append(
            {
                "dtype": arm.name,
                "runtime": arm.description,
                "perplexity": arm.scores.perplexity,
                "difference": difference,
                "standard_error": None if math.isnan(error) else error,
                "kl": arm.scores.divergence,
                "kl_p99": arm.scores.divergence_p99,
                "top1_agreement": arm.scores.agreement,
            }
        )
    return {
        "what": f"Perplexity, {subject.model}",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "command": command,
        "model": subject.model,
        "stored_types": subject.stored_types,
        "text": {"name": subject.text, "sha256": TEXTS[subject.text].file.sha256},
        "window": subject.window,
        "num_tokens": sum(len(s) for s in against.scores.surprises),
        "against": {
            "dtype": against.name,
            "runtime": against.description,
            "perplexity": against.scores.perplexity,
        },
        "rows": rows,
    }


def stored_types(program: Program, weights: WeightSource) -> dict[str, int]:
    """How many matrices are stored as each type, most frequent first."""
    parts = [part for weight in program.weights if weight.role != "vector" for part in weight.parts]
    return dict(Counter(weights.type_of(part) for part in dict.fromkeys(parts)).most_common())


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    title = f"{result['model']}, {result['num_tokens']:,} tokens of {result['text']['name']}"
    table = Table(title=title, title_justify="left")
    for heading in ("dtype", "perplexity", "difference", "KL", "KL p99", "same top 1"):
        table.add_column(heading, justify="left" if heading == "dtype" else "right")
    table.add_row(result["against"]["dtype"], f"{result['against']['perplexity']:.4f}", "", "", "", "")
    for row in result["rows"]:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3%}"
        table.add_row(
            row["dtype"],
            f"{row['perplexity']:.4f}",
            f"{row['difference']:+.3%}{error}",
            f"{row['kl']:.6f}",
            f"{row['kl_p99']:.6f}",
            f"{row['top1_agreement']:.3%}",
        )
    Console(width=120).print(table)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    known = ", ".join(f"{name} ({a.description})" for name, a in ARITHMETICS.items())
    parser = argparse.ArgumentParser(prog="python -m lab.perplexity", description=__doc__)
    parser.add_argument("model", help="as for `octavo serve`")
    parser.add_argument(
        "--dtype",
        nargs="+",
        required=True,
        help=f"float32, bfloat16, quantized, or simulated; with +KV the cache is narrow too (quantized+int8): {known}",
    )
    parser.add_argument("--against", default="float32", help="what they are compared with")
    parser.add_argument("--tokens", type=int, default=100_000, help="to predict, rounded up to whole windows")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context")
    parser.add_argument("--text", choices=list(TEXTS), default="moby-dick")
    parser.add_argument("--runtime", choices=("native", "reference"), default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stored-as", choices=REQUANTIZABLE, help="quantise every matrix anew, as this type")
    parser.add_argument("--save-as", metavar="NAME", help="of the result; MODEL by default")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the scores in the cache after every window, and go on behind those kept before, by the same build",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measures, prints, and writes lab/results/perplexity-NAME.json."""
    options = parse(arguments)
    files = resolve_model(options.model)
    spec = read_spec(files, max_model_len=options.window)
    windows = windows_of(load_text(options.text), load_tokenizer(files), options.tokens, options.window)
    weights = open_weights(files, spec)
    if options.stored_as:
        weights = RequantizedWeights(weights, options.stored_as)
    arms = [
        Arm(name, options.runtime, options.threads, spec, weights, options.window)
        for name in (options.against, *options.dtype)
    ]
    measure(arms, windows, kept_path(options, arms) if options.resume else None)
    subject = Subject(options.model, options.text, options.window, stored_types(record(spec), weights))
    command = "python -m lab.perplexity " + " ".join(arguments)
    result = result_of(subject, arms, command)
    show(result)
    save(result, options.save_as or Path(options.model).stem)
    return 0


def save(result: dict[str, Any], name: str) -> None:
    """Writes lab/results/perplexity-NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"perplexity-{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OctavoError as error:
        sys.exit(f"error: {error}")
