"""`python -m lab.swap`: what preemption wastes, with KV in host memory and without, counted on the real engine.

All requests wait from the start and greedy answers have a fixed length, so that every decision, and with it every
count, is the same on any machine (where the choice to copy or compute is off: "always"); only times are this one's. On
a card (`--runtime cuda`) copies are also timed there, alone and in the run. Merges into lab/results/NAME.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lab.machine import describe_machine
from octavo.config import EngineConfig
from octavo.engine.calibrate import prepare
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.messages import AddRequest
from octavo.models.hub import resolve_model_of
from octavo.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ("num_preempted", "num_preempted_tokens", "num_recomputed_tokens", "num_saved_blocks", "num_loaded_blocks")
SWAPS = ("none", "always", "by cost")
AT_A_TIME = 64  # blocks of the copies that are timed alone


def requests(count: int, scale: int) -> list[AddRequest]:
    """Prompts of 32 shared and 32 to 160 own tokens, answers of 32 to 96, all times `scale`."""
    draw = random.Random(0)
    shared = [draw.randrange(1000, 20_000) for _ in range(32 * scale)]
    made = []
    for number in range(count):
        prompt = shared + [draw.randrange(1000, 20_000) for _ in range(draw.randint(32, 160) * scale)]
        length = draw.randint(32, 96) * scale
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length)
        made.append(AddRequest(str(number), prompt, params, length, seed=number))
    return made


def measure(args: argparse.Namespace, swap: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Counts and times of one run, and the tokens of every request."""
    config = EngineConfig(
        model=args.model,
        runtime=args.runtime,
        dtype=args.dtype,
        load_format=args.load_format,
        skip_tokenizer_init=True,
        max_model_len=512 * args.scale,
        max_num_seqs=args.seqs,
        num_gpu_blocks_override=args.blocks * args.scale,
        admission_headroom=0.0,  # for pressure
        swap_space=0.0 if swap == "none" else args.swap_space,
    )
    executor = LocalExecutor(config, resolve_model_of(config))
    core = EngineCore(config, executor, executor.start())
    if swap == "by cost":
        prepare(core)
    copies = TimedCopies(executor.worker.runtime, core.info.plan) if args.runtime == "cuda" else None
    todo = requests(args.requests, args.scale)
    for request in todo:
        core.handle(request)
    tokens: dict[str, list[int]] = {}
    totals = dict.fromkeys((*COUNTS, "num_tokens"), 0)
    began = time.monotonic()
    with tqdm(total=len(todo), unit=" requests", desc=f"swap: {swap}") as bar:
        while core.has_work:
            outputs = core.step()
            for delta in outputs.deltas:
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                bar.update(delta.finish_reason is not None)
            for record in outputs.records:
                for name in totals:
                    totals[name] += getattr(record, name)
    seconds = time.monotonic() - began
    row = {"swap": swap, "seconds": round(seconds, 2), **totals}
    row["out_tok_s"] = round(sum(map(len, tokens.values())) / seconds, 1)
    row["recomputed %"] = round(100 * totals["num_recomputed_tokens"] / totals["num_tokens"], 2)
    if core.copies is not None:
        row["choice"] = str(core.copies)
    if copies is not None:
        row |= copies.figures()
    core.close()
    return row, tokens


class TimedCopies:
    """What the copies of a run took on the card, by events around those of each step; and of host blocks alone."""

    def __init__(self, runtime: Any, plan: Any) -> None:
        import torch

        self._plan, self._copy, self._torch = plan, runtime.copy_blocks, torch
        self._spans: list[tuple[Any, Any, int]] = []
        num = min(AT_A_TIME, plan.num_blocks, plan.num_host_blocks)
        out = [(block, plan.num_blocks + block) for block in range(num)]
        self._alone = {
            name: max((self._timed(pairs) for _ in range(5)), default=0.0)
            for name, pairs in (("save", out), ("load", [(host, block) for block, host in out]))
            if pairs
        }
        runtime.copy_blocks = self

    def __call__(self, pairs: list[tuple[int, int]]) -> None:
        """Stands for runtime.copy_blocks()."""
        before, after = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        self._copy(pairs)
        after.record()
        self._spans.append((before, after, len(pairs)))

    def _timed(self, pairs: list[tuple[int, int]]) -> float:
        """GB/s of these alone."""
        self(pairs)
        self._torch.cuda.synchronize()
        before, after, count = self._spans.pop()
        return float(count * self._plan.block_bytes / before.elapsed_time(after) / 1e6)

    def figures(self) -> dict[str, Any]:
        """GB/s alone, and in the run; the run's milliseconds."""
        figures: dict[str, Any] = {f"{name} GB/s alone": round(rate, 1) for name, rate in self._alone.items()}
        self._torch.cuda.synchronize()
        ms = sum(before.elapsed_time(after) for before, after, _ in self._spans)
        if ms:
            size = sum(count for _, _, count in self._spans) * self._plan.block_bytes
            figures |= {"copied ms": round(ms, 1), "copied GB": round(size / 1e9, 3), "GB/s": round(size / ms / 1e6, 1)}
        return figures


def main() -> None:
    """Prints the table and writes it; raises SystemExit where a token differs though float32 was computed in."""
    parser = argparse.ArgumentParser(prog="python -m lab.swap", description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=64, help="of the pool, times SCALE")
    parser.add_argument("--seqs", type=int, default=12, help="requests that may run at once")
    parser.add_argument("--scale", type=int, default=1, help="of lengths and of the pool")
    parser.add_argument("--swap-space", type=float, default=0.25, help="GiB")
    parser.add_argument("--save-as", default="swap", help="name of the result")
    args = parser.parse_args()
    rows, answers = [], []
    for swap in SWAPS:
        row, tokens = measure(args, swap)
        rows.append(row)
        answers.append(tokens)
    same = sum(all(tokens[name] == answers[0][name] for tokens in answers) for name in answers[0])
    if same < len(answers[0]) and args.dtype == "float32":
        raise SystemExit(f"the tokens of {len(answers[0]) - same} requests differ")
    names = ("swap", *COUNTS, "recomputed %", "seconds", "out_tok_s", "GB/s")
    for line in [dict(zip(names, names, strict=True)), *rows]:
        print("  ".join(f"{line.get(name, '')!s:>21}" for name in names))
    for row in rows:
        print("RESULT", args.model, args.dtype, json.dumps(row))
    case = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.runtime),
        "command": "python -m lab.swap " + " ".join(sys.argv[1:]),
        "same tokens": f"{same} of {len(answers[0])} requests",
        "rows": rows,
    }
    path = ROOT / "lab" / "results" / f"{args.save_as}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    result["what"] = (
        "preemption waste with KV in host memory (none, always copied, by measured cost), under forced pressure"
    )
    result["cases"][f"{Path(args.model).name} {args.dtype}"] = case
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine(runtime: str) -> str:
    """This machine, and its card where that computed."""
    if runtime != "cuda":
        return describe_machine()
    import torch

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {describe_machine()}"


if __name__ == "__main__":
    main()
