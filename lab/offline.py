"""`python -m lab.offline MODEL`: the CPU workloads through the offline `LLM`, where no HTTP client fits (numpy alone).

Prints one RESULT line per figure, one value a repetition. W1 counts engine steps; the others count wall time.
"""

from __future__ import annotations

import argparse
import time

from lab.machine import describe_machine
from lab.workloads import Work, w1, w2, w3, w4
from octavo import LLM, SamplingParams

LIMITS = {"max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory_bytes": 400 << 20}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}


def run(llm: LLM, works: list[Work], **sampling: float) -> float:
    """Seconds for all of them at once; end-of-sequence is ignored."""
    options = {"temperature": 0.0, **sampling}
    params = [SamplingParams(max_tokens=w.num_out, ignore_eos=True, **options) for w in works]  # type: ignore[arg-type]
    began = time.perf_counter()
    llm.generate([{"prompt_token_ids": work.prompt} for work in works], params, use_tqdm=False)
    return time.perf_counter() - began


def one_stream(llm: LLM, works: list[Work]) -> tuple[float, float]:
    """Decode tokens a second and seconds of the prompt, from the StepRecords of one request."""
    steps_before = llm.core.log.num_steps
    run(llm, works)
    records = list(llm.core.log)[steps_before - llm.core.log.num_steps :]
    seconds = [r.schedule_seconds + r.execute_seconds + r.update_seconds for r in records]
    return (works[0].num_out - 1) / sum(seconds[1:]), seconds[0]


def tokens(works: list[Work]) -> int:
    """Tokens generated for them."""
    return sum(work.num_out for work in works)


def say(name: str, figure: str, unit: str, values: list[float]) -> None:
    """One RESULT line."""
    print(f"RESULT {name} {figure} {unit}:", " ".join(f"{value:.4g}" for value in values), flush=True)


def open_llm(model: str, runtime: str, weights: str) -> LLM:
    """Loads the model with a dtype, or with "int8" weights."""
    how = {"quantization": weights} if weights == "int8" else {"dtype": weights}
    return LLM(model, runtime=runtime, **how, **LIMITS)


def main() -> None:
    """Measures every kind of weights that was asked for, taking turns, so that a slow minute hits all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "bfloat16"], help="of --dtype, or int8")
    parser.add_argument("--only", nargs="+", default=["W1", "W2", "W3", "W4"], metavar="W", help="workloads")
    parser.add_argument("--runtime", default="native")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    print(f"machine: {describe_machine()}")
    llms = {weights: open_llm(options.model, options.runtime, weights) for weights in options.dtypes}
    for weights, llm in llms.items():
        print(f"RESULT {weights} runtime: {llm.core.info.runtime}")
        run(llm, w1(-1))
    figures: dict[tuple[str, str], dict[str, list[float]]] = {}
    for i in range(options.repetitions):
        for workload in options.only:
            for weights, llm in llms.items():
                for named, value in measure(llm, workload, i).items():
                    figures.setdefault(named, {}).setdefault(weights, []).append(value)
    for (figure, unit), of in figures.items():
        for weights, values in of.items():
            say(weights, figure, unit, values)
    for llm in llms.values():
        llm.close()


def measure(llm: LLM, workload: str, i: int) -> dict[tuple[str, str], float]:
    """(figure, unit) and value of one repetition of a workload."""
    match workload:
        case "W1":
            rate, first = one_stream(llm, w1(i))
            return {("W1 decode", "tok/s"): rate, ("W1 prompt of 128", "ms"): 1e3 * first}
        case "W2":
            greedy, sampled = tokens(w2(i)) / run(llm, w2(i)), tokens(w2(i)) / run(llm, w2(100 + i), **SAMPLED)
            return {("W2", "tok/s"): greedy, ("W2 sampled", "tok/s"): sampled}
        case "W3":
            return {("W3", "tok/s"): 1024 / run(llm, w3(i))}
        case "W4":
            return {("W4", "s"): run(llm, w4(i))}
        case _:
            raise SystemExit(f"there is no workload {workload}: W1, W2, W3, W4")


if __name__ == "__main__":
    main()
