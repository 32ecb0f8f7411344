"""`python -m lab.nodes`: what the nodes of a step reach of what this machine can do, for several models and types.

A step of 1 row (one request decoding), of 32 rows (32 requests) and of 256 rows (a prompt), each timed by the
runtime's own profile. A node's limit is the roofline (Williams et al. 2009) of rates measured here: bytes read from
memory by all threads, and multiply-adds of the level in what the node computes in (float32, bfloat16, int8). What stays
under OPEN of it is listed. Machines that are shared change their speed within seconds: limits and steps are measured in
turns, and the round in the middle counts.

    python -m lab.nodes                                    the default model and three others, at the best level
    python -m lab.nodes --models smollm2 --levels all --save-as levels      every op, type and level

Stopped and called again with --resume, it goes on behind what was measured of the same build of the library.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lab.linear import available_levels
from lab.machine import describe_machine
from lab.perplexity import BLOCK_SIZE
from octavo.models.decoder import record
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.program.profile import Profile
from octavo.runtime.base import SamplingInputs, StepInputs
from octavo.runtime.native import library
from octavo.runtime.native.library import LIBRARY, resolve_level
from octavo.runtime.native.runtime import NativeRuntime

RESULTS = Path(__file__).parent / "results"
SHAPES = Path(__file__).parent / "shapes"
PACKAGE = Path(library.__file__).parent
CASES = {"1": (1, 1), "32": (32, 1), "256": (1, 256)}  # rows: (requests, tokens of each)
RATES = {"1": ("gb_s", "GB/s"), "32": ("gflop_s", "GFLOP/s"), "256": ("gflop_s", "GFLOP/s")}  # what decides
BARS = {"1": 0.75, "32": 0.60, "256": 0.75}  # of the limit, whole step
CONTEXT = 192  # tokens before a decoding one
ROUNDS, STEPS = 3, {"1": 12, "32": 4, "256": 2}  # limits are measured anew before each round
OPEN, WORTH = 0.40, 0.02  # cells under OPEN of their limit are listed; in a step's table, from this share of it
MODELS = (
    ("smollm2", "int8"),  # the default of a GGUF file in blocks
    ("smollm2", "quantized"),
    ("smollm2", "bfloat16"),
    ("tinyllama", "int8"),
    ("tinyllama", "quantized"),
    ("gemma3-270m", "int8"),
    ("gemma3-270m", "quantized"),
    ("qwen3-0.6b", "bfloat16"),
)
KV = {"float32": "float32"}  # of a dtype; bfloat16 beside all others


def measure(model: str, dtype: str, kv_dtype: str, level: str, threads: int) -> dict[str, Any]:
    """The profile of each case, as numbers."""
    shape = SHAPES / model
    files = resolve_model(str(shape) if shape.is_dir() else model, load_format="dummy" if shape.is_dir() else "auto")
    spec = read_spec(files, max_model_len=512)
    program = record(spec)
    runtime = NativeRuntime(threads, level)
    weights = open_weights(files, spec, load_format="dummy" if shape.is_dir() else "auto")
    runtime.load(program, weights, dtype=dtype, max_num_tokens=256, max_num_logits=32, max_num_requests=32)
    blocks = 32 * (CONTEXT // BLOCK_SIZE + 1)
    runtime.allocate_kv(blocks, BLOCK_SIZE, kv_dtype)
    found: dict[str, Any] = {"model": model, "dtype": dtype, "kv": kv_dtype, "level": runtime.level}
    found |= {"build": build_digest(), "rows": {}}
    random = np.random.default_rng(0)
    for rows, (num_requests, num_tokens) in CASES.items():
        case = (num_requests, CONTEXT if num_tokens == 1 else 0, num_tokens)
        steps = [
            step_inputs(random, case, vocab_size=spec.vocab_size, num_groups=program.num_kv_groups)
            for _ in range(STEPS[rows])
        ]
        run(runtime, steps[0])
        rounds = []
        for _ in range(ROUNDS):
            runtime.start_profile()
            for inputs in steps:
                run(runtime, inputs)
            rounds.append(numbers(runtime.stop_profile(), decode=num_tokens == 1))
        found["rows"][rows] = sorted(rounds, key=lambda numbers: numbers["of_limit"])[ROUNDS // 2]
    runtime.close()
    limits = [step["limits"] for step in found["rows"].values()]
    found["limits"] = {name: max(each[name] for each in limits) for name in limits[0]}
    return found


def build_digest() -> str:
    """Which library was measured."""
    return hashlib.sha256((PACKAGE / LIBRARY).read_bytes()).hexdigest()[:12]


def step_inputs(
    random: np.random.Generator,
    case: tuple[int, int, int],
    *,
    vocab_size: int,
    num_groups: int,
    length: int | None = None,
) -> StepInputs:
    """A step in which each of so many requests computes tokens behind so many others: `case` is (requests, tokens
    before, tokens). Each has blocks of its own, for `length` tokens; by default, those that it has then."""
    num_requests, begin, num_tokens = case
    end = begin + num_tokens
    num_blocks = -(-(length or end) // BLOCK_SIZE)
    tables = np.arange(num_requests * num_blocks, dtype=np.int32).reshape(num_requests, num_blocks)
    positions = np.tile(np.arange(begin, end, dtype=np.int32), num_requests)
    of_request = np.repeat(np.arange(num_requests), num_tokens)
    slots = tables[of_request, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    return StepInputs(
        token_ids=random.integers(0, vocab_size, len(positions), dtype=np.int32),
        positions=positions,
        slots=np.ascontiguousarray(np.broadcast_to(slots, (num_groups, len(slots)))),
        query_start_loc=np.arange(0, len(positions) + 1, num_tokens, dtype=np.int32),
        seq_lens=np.full(num_requests, end, np.int32),
        block_tables=np.ascontiguousarray(np.broadcast_to(tables, (num_groups, *tables.shape))),
        logits_indices=np.arange(num_tokens - 1, len(positions), num_tokens, dtype=np.int32),
    )


def run(runtime: NativeRuntime, inputs: StepInputs) -> None:
    """One step, greedy."""
    runtime.execute(inputs)
    runtime.sample(SamplingInputs.greedy(len(inputs.logits_indices)))


def numbers(profile: Profile, *, decode: bool) -> dict[str, Any]:
    """Per kind of node, and for the whole step: microseconds, GB/s, GFLOP/s, share of the limit; and the limits."""
    steps = profile.decode if decode else profile.other
    seconds = sum(line.seconds for line in steps.lines.values())
    nodes = {
        name: {
            "op": op,
            "us": round(line.seconds / steps.count * 1e6, 1),
            "share": round(line.seconds / seconds, 4),
            "gb_s": round(line.cost.moved / line.seconds / 1e9, 2),
            "gflop_s": round(line.cost.operations / line.seconds / 1e9, 1),
            "of_limit": round(line.least_seconds / line.seconds, 3),
        }
        for (name, op), line in steps.lines.items()
        if line.seconds
    }
    least = sum(line.least_seconds for line in steps.lines.values())
    rates = {"bytes": profile.limits.bytes_per_second, **profile.limits.operations_per_second}
    limits = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    us = round(seconds / steps.count * 1e6, 1)
    return {"us": us, "of_limit": round(least / seconds, 3), "limits": limits, "nodes": nodes}


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    """A table a model and type: a line a node; then what is open."""
    for found in results:
        title = f"{found['model']}, {found['dtype']}, KV {found['kv']}, {found['level']}; {limits_of(found)}"
        table = Table(title=title, title_justify="left")
        for heading in ("node", "op"):
            table.add_column(heading)
        for rows in CASES:
            for heading in (f"us @ {rows}", RATES[rows][1], "limit"):
                table.add_column(heading, justify="right")
        names = dict.fromkeys(name for rows in CASES for name in found["rows"][rows]["nodes"])
        for name in names:
            op = next(step["nodes"][name]["op"] for step in found["rows"].values() if name in step["nodes"])
            table.add_row(
                name, op, *(cell for rows in CASES for cell in cells(found["rows"][rows]["nodes"], name, rows))
            )
        whole = [found["rows"][rows] for rows in CASES]
        table.add_row("step", "", *(c for w in whole for c in (f"{w['us']:,.0f}", "", f"{w['of_limit']:.0%}")))
        console.print(table)
    for line in open_cells(results):
        console.print(line, markup=False, highlight=False)


def limits_of(found: dict[str, Any]) -> str:
    """What its nodes were held against, at most: each case has its own."""
    limits = found["limits"]
    if isinstance(limits, list):  # measured until the morning of 2026-11-26: held against one arithmetic
        return f"limits {limits[0]:.1f} GB/s, {limits[1]:.0f} GFLOP/s"
    rates = [f"{limits[name]:.0f} in {name}" for name in ("float32", "bfloat16", "int8")]
    return f"limits {limits['bytes']:.1f} GB/s, {', '.join(rates)} GFLOP/s"


def cells(nodes: dict[str, Any], name: str, rows: str) -> tuple[str, str, str]:
    """Of one node in one case: microseconds, the rate that decides there, share of the limit."""
    if name not in nodes:
        return "", "", ""
    node = nodes[name]
    return f"{node['us']:,.0f}", f"{node[RATES[rows][0]]:,.1f}", f"{node['of_limit']:.0%}"


def open_cells(results: Sequence[dict[str, Any]]) -> list[str]:
    """Steps under their bar, and nodes that matter and are under OPEN."""
    lines = []
    for found in results:
        where = f"{found['model']}, {found['dtype']}, KV {found['kv']}, {found['level']}"
        for rows, step in found["rows"].items():
            if step["of_limit"] < BARS[rows]:
                lines.append(f"open: {where}, {rows} rows: {step['of_limit']:.0%} of the limit, bar {BARS[rows]:.0%}")
            lines += [
                f"open: {where}, {rows} rows: {name} at {node['of_limit']:.0%}, {node['share']:.0%} of the step"
                for name, node in step["nodes"].items()
                if node["of_limit"] < OPEN and node["share"] >= WORTH
            ]
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.nodes", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="aliases, paths, or folders of lab/shapes; default: four of them")
    parser.add_argument("--dtypes", nargs="+", help="float32, bfloat16, quantized, int8; default: of each model")
    parser.add_argument("--kv", nargs="+", help="types of the KV cache; default: bfloat16, float32 beside float32")
    parser.add_argument("--levels", nargs="+", default=["auto"], help="instruction levels, or all; default: the best")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-as", default="models", metavar="NAME", help="lab/results/nodes-NAME.json")
    parser.add_argument("--resume", action="store_true", help="keep what the file has of this build of the library")
    options = parser.parse_args(arguments)
    if options.dtypes and not options.models:
        parser.error("--dtypes needs --models: which models are to be measured in these types?")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measures, prints, and writes lab/results/nodes-NAME.json."""
    options = parse(arguments)
    known = MODELS if options.models is None else [(m, d) for m in options.models for d in types_of(m, options.dtypes)]
    levels = available_levels() if options.levels == ["all"] else options.levels
    console, status = Console(width=150), Console(stderr=True)
    build, saved = build_digest(), saved_results(RESULTS / f"nodes-{options.save_as}.json")
    done = {case_of(result): result for result in saved if options.resume and result.get("build") == build}
    results: list[dict[str, Any]] = []
    failed = 0
    for level in map(resolve_level, levels):
        for model, dtype in known:
            for kv_dtype in options.kv or [KV.get(dtype, "bfloat16")]:
                if result := done.get((model, dtype, kv_dtype, level)):
                    results.append(result)
                    continue
                status.print(f"{level}: {model}, {dtype}, KV {kv_dtype}", style="dim")
                try:
                    results.append(measure(model, dtype, kv_dtype, level, options.threads))
                except Exception as error:  # the others go on
                    status.print(f"failed: {type(error).__name__}: {error}", style="red", markup=False)
                    failed += 1
                else:
                    save(results, options.save_as, arguments)
    show(results, console)
    return 1 if failed else 0


def save(results: Sequence[dict[str, Any]], name: str, arguments: Sequence[str]) -> None:
    """Writes lab/results/nodes-NAME.json: these in place of older ones of the same case on the same machine."""
    path = RESULTS / f"nodes-{name}.json"
    command = "python -m lab.nodes " + " ".join(arguments)
    merged = {case_of(result): result for result in saved_results(path)}
    merged |= {case_of(result): {"command": command.rstrip()} | result for result in results}
    results = list(merged.values())
    saved = {
        "what": "Nodes of a step against the limits of the machine",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "open": open_cells(results),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


def case_of(result: dict[str, Any]) -> tuple[str, str, str, str]:
    """What was measured."""
    return result["model"], result["dtype"], result["kv"], result["level"]


def saved_results(path: Path) -> list[dict[str, Any]]:
    """What was saved before on this machine."""
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    return list(saved["results"]) if saved["machine"] == describe_machine() else []


def types_of(model: str, asked: list[str] | None) -> list[str]:
    """Types to measure a model in."""
    return asked or [dtype for name, dtype in MODELS if name == model] or ["bfloat16"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
