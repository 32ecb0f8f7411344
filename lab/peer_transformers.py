"""transformers behind lab/engines.py's PipeEngine: `python peer_transformers.py FOLDER`, JSON lines in and out.

Static batches of `at_once`, left-padded, each run to its longest output; only tokens that were asked for count.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Clock:
    """Notes when the first and the last token came; `generate` gives it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def run(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all, and of each request its start, first and last token (those of its batch), and how many."""
    works, at_once = asked["works"], asked["at_once"]
    timed = []
    began = time.perf_counter()
    for start in range(0, len(works), at_once):
        batch = works[start : start + at_once]
        width = max(len(prompt) for prompt, _ in batch)
        longest = max(num_out for _, num_out in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        clock = Clock()
        sent = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                streamer=clock if len(batch) == 1 else None,
            )
        seen = clock.times[1:] or [time.perf_counter()]
        made = found.shape[1] - width
        timed += [[sent - began, seen[0] - began, seen[-1] - began, min(num_out, made)] for _, num_out in batch]
    return {"seconds": time.perf_counter() - began, "timed": timed}


def main() -> None:
    """Loads, says so, answers until the input ends."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
