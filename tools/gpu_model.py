"""A checkpoint on the card and on the CPU: the same greedy tokens, however requests are batched. Part of gpu_check.

The CPU's tokens are those of the reference runtime in float32; on the card float32 means without TF32. In bfloat16
products are rounded otherwise in a batch than alone, so an answer may turn where two tokens are nearly as likely: the
reference says how near they were.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Report = Callable[..., None]
NUM_TOKENS = 32
TEXTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a village at the foot of a mountain,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to you because",
    "In 1969, two men",
    "A recipe for pancakes: take two eggs,",
    "Shakespeare wrote many plays, among them",
    "The square of the hypotenuse of a right triangle is equal to",
    "Photosynthesis is the process by which plants",
    "import numpy as np\n\n# the mean of each column\n",
    "The longest river of the world is the Nile, which flows through",
    "Q: What is the difference between a virus and a bacterium?\nA:",
    "To be, or not to be: that is the question. What is meant by this line is that",
    "An octave is the interval between one musical pitch and another with",
    "The cat sat on the mat, and the dog",
    "SELECT name, age FROM people WHERE",
    "Il était une fois",
    "Paris is the capital of France, Rome that of Italy, Madrid that of Spain, and Berlin",
]
SETTINGS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "num_gpu_blocks_override": 1024,
    "admission_headroom": 0.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "graphs and overlap": {},
    "no graphs": {"enforce_eager": True},
    "no overlap": {"async_scheduling": False},
    "one request at a time": {"max_num_seqs": 1},
    "preemption": {"num_gpu_blocks_override": 40, "enable_prefix_caching": False},
    "host memory": {"num_gpu_blocks_override": 40, "swap_space": 1.0},
    "chunks": {"max_num_batched_tokens": 64},
    "unfused": {"fuse_ops": False},
    **{  # two at a time: what is fused into products of few rows is there
        f"without {name}": {"disable_fusions": name, "max_num_seqs": 2}
        for name in ("norm", "residual", "activation", "rope", "pdl")
    },
}
MARGIN = 0.03  # of the largest logit: what bfloat16 may turn around
EVENTS = {"preemption": "num_preempted", "host memory": "num_loaded_blocks", "chunks": "num_chunked"}


def check_model(model: str, report: Report, guarded: Callable[[str, Callable[[], None]], None]) -> None:
    """Reports for each way how many of the answers are the CPU's, and whether what it is named for happened."""
    start = time.perf_counter()
    expected = generate(model, TEXTS, runtime="reference")[0]
    report("model on the CPU", requests=len(TEXTS), tokens=NUM_TOKENS, s=time.perf_counter() - start)
    for name, settings in WAYS.items():
        guarded(f"model {name}", lambda n=name, s=settings: check_way(model, n, s, expected, report))
    guarded("model bfloat16", lambda: check_ties(model, report))


def check_way(model: str, name: str, settings: dict[str, Any], expected: list[list[int]], report: Report) -> None:
    """Four times the prompts, so that batches of 64 are full.

    Raises:
        AssertionError: other tokens, or what the way is named for did not happen.
    """
    found, core = generate(model, TEXTS * 4, runtime="cuda", **settings)
    events = {field: int(core.log.total(field)) for field in EVENTS.values()}
    widest = max(record.num_running for record in core.log)
    replays = core._executor.worker.runtime.num_replays
    same = sum(tokens == expected[i % len(TEXTS)] for i, tokens in enumerate(found))
    core.close()
    report(f"model {name}", same=same, of=len(found), widest=widest, replays=replays, **events)
    for i, tokens in enumerate(found):
        if tokens != expected[i % len(TEXTS)]:
            at = next(
                n for n, pair in enumerate(zip(tokens, expected[i % len(TEXTS)], strict=True)) if len(set(pair)) > 1
            )
            print(f"answer {i} differs from token {at} on: {tokens[at]} for {expected[i % len(TEXTS)][at]}")
    assert same == len(found), f"{len(found) - same} of {len(found)} answers are not the CPU's"
    assert name not in EVENTS or events[EVENTS[name]] > 0, f"no {EVENTS[name]}"
    assert (replays == 0) == (name == "no graphs")
    assert (widest == 1) == (name == "one request at a time")
    assert widest == 64 or settings, "no full batch"


def check_ties(model: str, report: Report) -> None:
    """Answers in bfloat16, 64 together and one at a time: where they part, by how much of the largest logit.

    Raises:
        AssertionError: by more than bfloat16's roundings.
    """
    from lab.teacher import one_request
    from octavo import LLM, SamplingParams
    from octavo.runtime.base import SamplingInputs

    together, core = generate(model, TEXTS * 4, runtime="cuda", dtype="bfloat16")
    core.close()
    alone, core = generate(model, TEXTS, runtime="cuda", dtype="bfloat16", max_num_seqs=1)
    core.close()
    llm = LLM(model, **{**SETTINGS, "runtime": "reference"})
    reference = llm.core._executor.worker.runtime
    usual, parted = [], []
    for i, text in enumerate(TEXTS):
        prompt = llm.generate([text], SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_token_ids
        ids = np.array([*prompt, *alone[i][:-1]], np.int32)
        reference.execute(one_request(ids, first_logits=len(prompt) - 1, block_size=llm.config.block_size))
        reference.sample(SamplingInputs.greedy(NUM_TOKENS))
        logits = reference.logits()
        best = np.sort(logits, axis=1)[:, -2:]
        usual += list((best[:, 1] - best[:, 0]) / np.abs(logits).max(1))
        for other in together[i :: len(TEXTS)]:
            at = next((n for n in range(NUM_TOKENS) if other[n] != alone[i][n]), None)
            if at is not None:
                gap = abs(float(logits[at, other[at]] - logits[at, alone[i][at]])) / float(np.abs(logits[at]).max())
                parted.append(gap)
    llm.close()
    report(
        "model bfloat16, 64 together and one at a time", same=len(together) - len(parted), of=len(together),
        largest_gap=max(parted, default=0.0), gap=statistics.median(parted or [0.0]),
        usual_gap=float(np.median(usual)), nearer=float(np.mean(np.array(usual) < max(parted, default=0.0))),
    )  # fmt: skip
    assert max(parted, default=0.0) < MARGIN


def generate(model: str, texts: list[str], **settings: Any) -> tuple[list[list[int]], Any]:
    """Greedy answers to all at once, and the engine's core, still open."""
    from octavo import LLM, SamplingParams

    llm = LLM(model, **{**SETTINGS, **settings})
    llm.core.copies, llm.core.scheduler.kv.host.saves = None, True  # whatever copying costs
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate(texts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], llm.core
