"""`python -m lab.swap`: what preemption wastes, with KV in host memory and without, counted on the real engine.

All requests wait from the start and greedy answers have a fixed length, so that every decision, and with it every
count, is the same on any machine; only times are this one's. Writes lab/results/swap.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lab.machine import describe_machine
from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.messages import AddRequest
from octavo.models.hub import resolve_model
from octavo.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "lab" / "results" / "swap.json"
NUM_REQUESTS, NUM_BLOCKS, MAX_NUM_SEQS = 32, 64, 12
COUNTS = ("num_preempted", "num_preempted_tokens", "num_recomputed_tokens", "num_saved_blocks", "num_loaded_blocks")


def requests() -> list[AddRequest]:
    """Prompts of 32 shared and 32 to 160 own tokens, answers of 32 to 96."""
    draw = random.Random(0)
    shared = [draw.randrange(1000, 20_000) for _ in range(32)]
    made = []
    for number in range(NUM_REQUESTS):
        prompt = shared + [draw.randrange(1000, 20_000) for _ in range(draw.randint(32, 160))]
        length = draw.randint(32, 96)
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length)
        made.append(AddRequest(str(number), prompt, params, length, seed=number))
    return made


def measure(swap_space: float) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Counts of one run, and the tokens of every request."""
    config = EngineConfig(
        model="smollm2",
        max_model_len=512,
        max_num_seqs=MAX_NUM_SEQS,
        num_gpu_blocks_override=NUM_BLOCKS,
        admission_headroom=0.0,  # for pressure
        swap_space=swap_space,
    )
    executor = LocalExecutor(config, resolve_model("smollm2"))
    core = EngineCore(config, executor, executor.start())
    for request in requests():
        core.handle(request)
    tokens: dict[str, list[int]] = {}
    totals = dict.fromkeys((*COUNTS, "num_tokens"), 0)
    began = time.monotonic()
    with tqdm(total=NUM_REQUESTS, unit=" requests", desc=f"--swap-space {swap_space:g}") as bar:
        while core.has_work:
            outputs = core.step()
            for delta in outputs.deltas:
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                bar.update(delta.finish_reason is not None)
            for record in outputs.records:
                for name in totals:
                    totals[name] += getattr(record, name)
    row = {"swap_space": swap_space, "seconds": round(time.monotonic() - began, 1), **totals}
    row["recomputed %"] = round(100 * totals["num_recomputed_tokens"] / totals["num_tokens"], 2)
    core.close()
    return row, tokens


def main() -> None:
    """Prints the table and writes it; raises SystemExit where a token differs."""
    argparse.ArgumentParser(prog="python -m lab.swap", description=__doc__).parse_args()
    rows, answers = [], []
    for swap_space in (0.0, 0.25):
        row, tokens = measure(swap_space)
        rows.append(row)
        answers.append(tokens)
    if any(tokens != answers[0] for tokens in answers):
        raise SystemExit("the tokens differ")
    names = ("swap_space", *COUNTS, "recomputed %", "seconds")
    for line in [dict(zip(names, names, strict=True)), *rows]:
        print("  ".join(f"{line[name]!s:>22}" for name in names))
    result = {
        "what": "preemption waste with and without KV in host memory; the same tokens in every run",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "command": "python -m lab.swap",
        "model": "smollm2",
        "load": {"requests": NUM_REQUESTS, "blocks": NUM_BLOCKS, "max_num_seqs": MAX_NUM_SEQS},
        "rows": rows,
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
