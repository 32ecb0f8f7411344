"""OpenVINO GenAI behind lab/engines.py's PipeEngine: `python peer_openvino.py MODEL`, JSON lines in and out.

Runs in OpenVINO's own environment and imports nothing of ours. Requests are added while fewer than `at_once` run.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found,unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found,unused-ignore]


def load(model: str) -> Any:
    """The pipeline: bfloat16 arithmetic, two threads, 2 GB of KV, chunks of 512 tokens."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = 32
    scheduler.max_num_batched_tokens = 512
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    return genai.ContinuousBatchingPipeline(
        model, scheduler, "CPU", {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": "2"}
    )


def run(pipeline: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds for all, and of each request when it was added, its first and last token, and how many came."""
    waiting = list(enumerate(asked["works"]))[::-1]
    running: dict[int, Any] = {}
    timed = [[0.0, 0.0, 0.0, 0] for _ in waiting]
    began = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < asked["at_once"]:
            index, (prompt, num_out) = waiting.pop()
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = num_out, True, False
            timed[index][0] = time.perf_counter() - began
            ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
            running[index] = pipeline.add_request(index, ids, config)
        pipeline.step()
        now = time.perf_counter() - began
        for index, handle in list(running.items()):
            while handle.can_read():
                tokens = sum(len(output.generated_ids) for output in handle.read().values())
                timed[index][1] = timed[index][1] or now
                timed[index][2] = now
                timed[index][3] += tokens
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del running[index]
    return {"seconds": time.perf_counter() - began, "timed": timed}


def main() -> None:
    """Loads, says so, answers until the input ends."""
    pipeline = load(sys.argv[1])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(pipeline, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
