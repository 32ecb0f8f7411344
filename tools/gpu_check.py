"""One command for a machine with a card: checks the cuda runtime, then times it. Never stops at the first failure.

    python tools/gpu_check.py [STAGE ...]     all by default: tests kernels and the shapes, qwen3-0.6b llama-2-7b
                                              llama-3-8b (grouped heads) llama-3.2-1b (heads of 64)

`tests` runs tests/gpu there, `sanitizer` those of kernels under memcheck and racecheck; `model` compares the tokens of
`--model FILE` with the CPU's; `server` asks `octavo serve FILE`, and one of random weights, over HTTP; `kernels` times
each kernel against the card's limits, `sampler` those of sampling alone, `tiles` products of few rows in every tile,
`trace` when steps are launched and their tokens copied, `fusions` G2 and G4 without each fused kernel; the shapes run
the workloads of lab/gpu_workloads.py with random weights in a process of their own. `--workloads G2,G4` chooses; beside
G1 to G5 there are G6 (arrivals over time at 80 % of G1's rate), `sync` (G2 and G1 with one step in flight) and
`channel` (G1 through AsyncEngine). Of G1 to G3 eight requests are checked token by token. Prints RESULT lines, writes
them as JSON to $OUT (default: the current folder), and ends with status 1 where something failed. No stage but
`channel` and `server` needs a web package, none but `model` and `server` a tokenizer.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEVICE = "cuda"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
SHAPES = ("qwen3-0.6b", "llama-2-7b", "llama-3-8b", "llama-3.2-1b")
RESULTS: list[dict[str, Any]] = []
ENGINE = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.9,
    "runtime": "cuda",
}


def result(name: str, **values: Any) -> None:
    """Prints and keeps one line."""
    RESULTS.append({"name": name, **values})
    shown = "  ".join(f"{k}={v:,.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    print(f"RESULT {name:34} {shown}", flush=True)


def out_folder() -> Path:
    """Where files go."""
    return Path(os.environ.get("OUT", "."))


def guarded(name: str, function: Callable[[], None]) -> None:
    """A failure becomes a RESULT line and a traceback; the rest goes on."""
    try:
        function()
    except Exception as error:
        traceback.print_exc()
        result(name, failed=f"{type(error).__name__}: {str(error)[:300]}")


def stage_tests() -> None:
    """tests/gpu on the card, in several processes where pytest-xdist is there: most of their time is compilation."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
    options = ["-o", "addopts=", "-o", "filterwarnings=", "-W", "ignore", "--maxfail=25", "--durations=5"]
    options += ["-n", "8"] if find_spec("xdist") else []
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start, log = time.perf_counter(), out_folder() / "gpu-tests.txt"
    try:
        with log.open("w") as file:  # what was printed is there even if it takes too long
            done = subprocess.run([*command, *options], cwd=ROOT, env=env, stdout=file, stderr=file, timeout=240)
        is_ok = done.returncode == 0
    except subprocess.TimeoutExpired:
        is_ok = False
    text = log.read_text()
    if not is_ok:
        print(text[-9000:])
    lines = [line for line in text.splitlines() if line.strip()]
    result("tests/gpu", ok=is_ok, summary=lines[-1] if lines else "", s=time.perf_counter() - start)


def stage_model(model: str) -> None:
    """A checkpoint's tokens on the card and on the CPU."""
    from gpu_model import check_model

    check_model(model, result, guarded)


def stage_sanitizer() -> None:
    """tests/gpu's kernels under compute-sanitizer."""
    from gpu_sanitizer import check_kernels

    check_kernels(result, out_folder())


def stage_server(model: str) -> None:
    """`octavo serve` of a checkpoint, and of random weights."""
    from gpu_server import check_server

    shape = [str(ROOT / "lab" / "shapes" / SHAPES[0]), "--load-format", "dummy", "--skip-tokenizer-init"]
    guarded("server", lambda: check_server("checkpoint", [model], "The capital of France is", result, out_folder()))
    guarded("server", lambda: check_server("shape", shape, [*range(5, 105)], result, out_folder()))


def stage_kernels() -> None:
    """Each kernel alone, against the card's limits; then the sampler."""
    from gpu_kernels import time_kernels

    stage_sampler(time_kernels(result, guarded))


def stage_trace() -> None:
    """Whether a step is launched before the one in front of it has given its tokens; a file keeps when."""
    from gpu_trace import trace_shapes

    trace_shapes(SHAPES[:2], ENGINE, result, guarded, out_folder())


def stage_fusions() -> None:
    """One request, and prompts, without each fused kernel."""
    from lab.gpu_workloads import gpu_workloads
    from octavo import LLM
    from octavo.config import FUSIONS

    works = gpu_workloads()
    for name in ("", *FUSIONS):
        settings = {**ENGINE, "num_gpu_blocks_override": 4096, "disable_fusions": name}
        llm = LLM(str(ROOT / "lab" / "shapes" / SHAPES[0]), **settings)
        label = f"{SHAPES[0]} without {name or 'nothing'}"
        time_work(llm, label, works["warm"], 1, keep=False)
        for work, count in (("G2", 5), ("G4", 3)):
            guarded(label, lambda m=llm, n=label, w=works[work], c=count: time_work(m, n, w, c))
        llm.close()


def stage_tiles() -> None:
    """Products of few rows, tile by tile."""
    from gpu_kernels import time_tiles

    time_tiles(result)


def stage_sampler(limits: dict[str, float] | None = None) -> None:
    """From logits to tokens, alone."""
    from gpu_kernels import measure_limits

    tbs = (limits or measure_limits(result))["tbs"]
    for rows, vocab in [(1, 151936), (256, 151936), (256, 32000)]:
        guarded("sampler", lambda r=rows, v=vocab: time_sampler(r, v, tbs))


def time_sampler(rows: int, vocab: int, tbs: float) -> None:
    """From logits to tokens: greedy, top-k and top-p, and flat rows, which take the passes over all logits.

    `passes`: how often the logits could be read from memory in that time.
    """
    import torch
    from gpu_kernels import timed

    from octavo.runtime.cuda.sampler import Sampler, SamplerRows

    sampler = Sampler(rows, vocab, torch.device(DEVICE), num_rows_kept=rows)
    spread = torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
    index = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    for name, scale, temperature, top_k, top_p in (
        ("greedy", 1, 0.0, 0, 1.0),
        ("top-k 50, top-p 0.95", 1, 0.8, 50, 0.95),
        ("top-p 0.95, peaked", 4, 1.0, 0, 0.95),
        ("top-p 0.95, flat", 1, 1.0, 0, 0.95),
        ("temperature alone", 1, 1.0, 0, 1.0),
    ):
        numbers = [torch.full((rows,), v, device=DEVICE) for v in (temperature, top_p, 0.0)]
        how = SamplerRows(index, torch.full_like(index, top_k), *numbers, index.long())
        logits = spread * scale
        s = timed(lambda _, x=logits, h=how, d=temperature > 0: sampler.launch(x, h, draws=d))
        wide = sampler.num_wide if temperature else 0
        result(f"sampler {name} {rows}x{vocab}", us=s * 1e6, wide=wide, passes=s * tbs * 1e12 / (logits.numel() * 2))


def run_shape(shape: str, only: list[str], repetitions: int) -> None:
    """A model of random weights: start-up, then the workloads. Runs in a process of its own."""
    started = float(os.environ.get("GPU_CHECK_START", time.time()))
    from gpu_serving import poisson, through_the_channel

    from lab.gpu_workloads import gpu_workloads
    from octavo import LLM, SamplingParams

    imported = time.time()
    llm = LLM(str(ROOT / "lab" / "shapes" / shape), **ENGINE)
    loaded = time.time()
    llm.generate(None, SamplingParams(temperature=0.0, max_tokens=1), [[5] * 128], use_tqdm=False)
    result(
        f"{shape} start-up", first_token_s=time.time() - started, imports_s=imported - started,
        engine_s=loaded - imported, **{f"{k.replace(' ', '_')}_s": v for k, v in llm.core.info.timings.items()},
    )  # fmt: skip
    print(llm.core.info.plan.describe(), flush=True)
    works = gpu_workloads()
    time_work(llm, shape, works["warm"], 1, keep=False)
    counts = {"G2": 5, "G4": 3}
    if "G6" in only and "G1" not in only:
        only = [*only, "G1"]  # at whose rate it comes
    for name in [n for n in only if n in works]:
        guarded(f"{shape} {name}", lambda w=works[name], n=name: time_work(llm, shape, w, counts.get(n, repetitions)))
    if "G6" in only:
        g1 = works["G1"]

        def arrivals() -> None:
            whole = max(r["out_tok_s"] for r in RESULTS if r["name"] == f"{shape} G1 throughput")
            poisson(llm, shape, g1, 0.8 * whole / g1.num_out * len(g1.requests), result)

        guarded(f"{shape} G6", arrivals)
    if "sync" in only:
        llm.core._depth, llm.core.scheduler._budget.max_run_ahead = 1, 0
        for name in ("G2", "G1"):
            work = replace(works[name], name=f"{works[name].name}, one step in flight")
            guarded(f"{shape} {name} sync", lambda w=work, n=name: time_work(llm, shape, w, counts.get(n, 1)))
    llm.close()
    if "channel" in only:
        model, settings = str(ROOT / "lab" / "shapes" / shape), dict(ENGINE)
        guarded(f"{shape} channel", lambda: through_the_channel(model, settings, shape, works["G1"], result))


def time_work(llm: Any, shape: str, work: Any, repetitions: int, keep: bool = True) -> None:
    """Median seconds of a workload, and where a step's time goes on the host."""
    from gpu_serving import check_tokens, host_times

    from octavo import SamplingParams

    params = [
        SamplingParams(**work.sampling, max_tokens=n, ignore_eos=True, seed=i) for i, (_, n) in enumerate(work.requests)
    ]
    prompts = [p for p, _ in work.requests]
    seconds = []
    for _ in range(repetitions):
        steps = llm.core.log.num_steps
        start = time.perf_counter()
        outputs = llm.generate(None, params, prompts, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in work.requests]
    if not keep:
        return
    s = statistics.median(seconds)
    num_steps = llm.core.log.num_steps - steps
    records = list(llm.core.log)[-min(num_steps, len(llm.core.log)) :]
    middle = {
        name: statistics.median(getattr(r, f"{name}_seconds") for r in records) * 1e3
        for name in ("schedule", "launch", "execute", "update")
    }
    decodes = [r.execute_seconds * 1e3 for r in records if not r.num_prefill_tokens]
    result(
        f"{shape} {work.name}", s=s, out_tok_s=work.num_out / s, in_tok_s=work.num_in / s, runs=repetitions,
        spread=(max(seconds) - min(seconds)) / s, steps=num_steps, **{f"{k}_ms": v for k, v in middle.items()},
        decode_step_ms=statistics.median(decodes) if decodes else 0.0, wall_step_ms=s / num_steps * 1e3,
        distinct=len({t for o in outputs for t in o.outputs[0].token_ids}), **host_times(records),
    )  # fmt: skip
    if work.sampling["temperature"] == 0 and work.requests[0][1] > 1:
        check_tokens(llm, f"{shape} {work.name}", work, outputs, result)


def stage_shape(shape: str, args: argparse.Namespace) -> None:
    """Runs `run_shape` in a new process and takes over its results."""
    command = [sys.executable, __file__, "--inside", shape, "--workloads", args.workloads]
    command += ["--repetitions", str(args.repetitions), "--engine", args.engine]
    env = {**os.environ, "GPU_CHECK_START": str(time.time())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("JSON "):
            RESULTS.extend(json.loads(line[5:]))
    if process.wait():
        result(shape, failed=f"exit status {process.returncode}")


def engine_settings(text: str) -> dict[str, Any]:
    """`kv_cache_dtype=fp8,fuse_ops=False`: what is no literal of Python is a string."""
    settings: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def has_failed() -> bool:
    """Whether one of the results says so."""
    return any("failed" in line or not line.get("ok", True) for line in RESULTS)


def main() -> None:
    """Parses, runs the stages, writes the JSON; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=["tests", "kernels", *SHAPES])
    parser.add_argument("--workloads", default="G2,G4,G3,G1,G5")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--engine", default="", help="settings of the engine, such as kv_cache_dtype=fp8,cuda_ops=cuda")
    parser.add_argument("--model", default="smollm2", help="of the stages `model` and `server`")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    ENGINE.update(engine_settings(args.engine))
    if args.inside:
        guarded(args.inside, lambda: run_shape(args.inside, args.workloads.split(","), args.repetitions))
        print("JSON " + json.dumps(RESULTS), flush=True)
        return
    start = time.perf_counter()
    for stage in args.stages:
        print(f"---- {stage} ({time.perf_counter() - start:.0f} s)", flush=True)
        if stage == "tests":
            guarded(stage, stage_tests)
        elif stage == "model":
            guarded(stage, lambda: stage_model(args.model))
        elif stage == "server":
            guarded(stage, lambda: stage_server(args.model))
        elif stage == "sanitizer":
            guarded(stage, stage_sanitizer)
        elif stage == "fusions":
            guarded(stage, stage_fusions)
        elif stage == "trace":
            guarded(stage, stage_trace)
        elif stage == "kernels":
            guarded(stage, stage_kernels)
        elif stage == "sampler":
            guarded(stage, stage_sampler)
        elif stage == "tiles":
            guarded(stage, stage_tiles)
        else:
            guarded(stage, lambda s=stage: stage_shape(s, args))
    out = out_folder() / "gpu_check.json"
    out.write_text(json.dumps({"when": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "results": RESULTS}, indent=1))
    print(f"wrote {out} after {time.perf_counter() - start:.0f} s")
    sys.exit(has_failed())


if __name__ == "__main__":
    main()
