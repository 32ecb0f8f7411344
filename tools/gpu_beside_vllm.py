"""Octavo beside vLLM on one card, in one run: the workloads of lab/gpu_workloads.py, random weights, token ids.

    python tools/gpu_beside_vllm.py [SHAPE ...] [--engine kv_cache_dtype=fp8] [--workloads G2,G1] [--vllm-path FOLDER]

Each engine has the card to itself, in a process of its own, at its own defaults but for what COMMON names; `--order`
says who follows whom, so that neither is always first. vLLM must be importable: `--vllm-path` is where, unless it is
installed beside Octavo. Prints RESULT lines and a table of medians with ratios, keeps every figure in
$OUT/gpu_beside_vllm.json as it comes, and ends with status 1 where an engine failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
COMMON = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "max_model_len": 4096,
    "gpu_memory_utilization": 0.9,
}
REPETITIONS = {"G2": 5, "G4": 3, "G3": 2}  # of a process; others: --repetitions
START = "new process to first token"
WARM_OUT = 16  # tokens a request before a workload is timed: whatever is compiled or loaded at first use is there
IDLE_MIB, IDLE_SECONDS, PROCESS_SECONDS = 2000, 30.0, 400.0
Generate = Callable[[list[list[int]], list[Any]], list[Any]]


def octavo_engine(model: str, settings: dict[str, Any]) -> tuple[str, Generate, Any]:
    """Version, generate(prompts, params), and the class of params."""
    from octavo import LLM, SamplingParams, __version__

    llm = LLM(model, **COMMON, runtime="cuda", **settings)
    return __version__, lambda prompts, params: llm.generate(None, params, prompts, use_tqdm=False), SamplingParams


def vllm_engine(model: str, settings: dict[str, Any]) -> tuple[str, Generate, Any]:
    """As octavo_engine."""
    import vllm  # type: ignore[import-not-found,unused-ignore]

    llm = vllm.LLM(model=model, **COMMON, **settings)

    def generate(prompts: list[list[int]], params: list[Any]) -> list[Any]:
        outputs: list[Any] = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return outputs

    def params(**values: Any) -> Any:
        return vllm.SamplingParams(**values, detokenize=False)

    return vllm.__version__, generate, params


ENGINES = {"octavo": octavo_engine, "vllm": vllm_engine}


def inside(engine: str, shape: str, workloads: Sequence[str], repetitions: int, settings: dict[str, Any]) -> None:
    """One engine over one shape: a JSON line a workload, so that what was measured is known if the rest fails."""
    from lab.gpu_workloads import Workload, gpu_workloads

    def say(**values: Any) -> None:
        print("JSON " + json.dumps({"engine": engine, "shape": shape, "settings": settings, **values}), flush=True)

    version, generate, make = ENGINES[engine](str(ROOT / "lab" / "shapes" / shape), settings)
    generate([[5] * 128], [make(temperature=0.0, max_tokens=1, ignore_eos=True)])
    seconds = time.time() - float(os.environ["BESIDE_START"])
    import torch

    card = torch.cuda.get_device_name()
    say(workload=START, seconds=[seconds], version=version, torch=torch.__version__, card=card)
    works = gpu_workloads()

    def timed(work: Workload) -> float:
        params = [make(**work.sampling, max_tokens=n, ignore_eos=True) for _, n in work.requests]
        prompts = [prompt for prompt, _ in work.requests]
        began = time.perf_counter()
        outputs = generate(prompts, params)
        seconds = time.perf_counter() - began
        assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in work.requests]
        return seconds

    timed(works["warm"])
    for name in workloads:
        timed(replace(works[name], requests=[(p, min(n, WARM_OUT)) for p, n in works[name].requests]))
        taken = [timed(works[name]) for _ in range(REPETITIONS.get(name, repetitions))]
        say(workload=name, seconds=taken, num_in=works[name].num_in, num_out=works[name].num_out)


def wait_for_idle_card() -> None:
    """Until the memory of the engine before is free again."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    deadline = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        used = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        if int(used.split()[0]) < IDLE_MIB:
            return
        time.sleep(0.2)


def run_engine(command: list[str], environment: dict[str, str], log: Path, keep: Callable[[Any], None]) -> bool:
    """One process to its end, nothing of it left behind; whether it ended well."""
    wait_for_idle_card()
    environment = {**environment, "BESIDE_START": str(time.time())}
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
        )
        too_late = threading.Timer(PROCESS_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        too_late.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"JSON "):
                keep(json.loads(line[5:]))
            else:
                errors.write(line)
                errors.flush()
    status = process.wait()
    too_late.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return status == 0


def rate(row: dict[str, Any], seconds: float) -> tuple[float, str]:
    """The figure that counts for a workload, larger is better but for start-up."""
    if row["workload"] == START:
        return seconds, "s"
    return (row["num_in"] / seconds, "in tok/s") if row["workload"] == "G4" else (row["num_out"] / seconds, "out tok/s")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over all repetitions of all processes of an engine, and what Octavo's is of vLLM's (above 1: ahead)."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        shape = ", ".join([row["shape"], *(f"{k}={v}" for k, v in row["settings"].items())])
        found.setdefault((shape, row["workload"]), {}).setdefault(row["engine"], []).append(row)
    lines = []
    for (shape, workload), engines in found.items():
        line: dict[str, Any] = {"shape": shape, "workload": workload}
        for engine, of_engine in engines.items():
            seconds = [s for row in of_engine for s in row["seconds"]]
            median = seconds[0] if workload == START else statistics.median(seconds)  # later ones find things compiled
            line[engine], line["unit"] = rate(of_engine[0], median)
            line[f"{engine}_runs"] = len(seconds)
            line[f"{engine}_range"] = [rate(of_engine[0], s)[0] for s in (max(seconds), min(seconds))]
        if len(engines) == len(ENGINES):
            ratio = line["octavo"] / line["vllm"]
            line["ratio"] = 1 / ratio if workload == START else ratio
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'':38} {'':26} {'Octavo':>11} {'vLLM':>11}  {'Octavo is':>9}")
    for line in lines:
        cells = [f"{line[e]:>11,.5g}" if e in line else f"{'':>11}" for e in ENGINES]
        ratio = f"{line['ratio']:>8.2f}x" if "ratio" in line else ""
        name = f"{line['workload']}, {line['unit']}"
        print(f"{line['shape']:38} {name:38} {' '.join(cells)}  {ratio}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["qwen3-0.6b", "llama-2-7b"], help="folders of lab/shapes")
    parser.add_argument("--order", default="octavo,vllm,octavo", help="of processes (default: %(default)s)")
    parser.add_argument("--workloads", default="G2,G4,G3,G1,G5", help="of an engine's first process")
    parser.add_argument("--again", default="G2,G4", help="of an engine's later processes")
    parser.add_argument("--repetitions", type=int, default=1, help="of G1 and G5 in a process")
    parser.add_argument("--engine", default="", help="settings of both engines, such as kv_cache_dtype=fp8")
    parser.add_argument("--vllm-path", default="", help="folders before PYTHONPATH for vLLM, with ':' between")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which no further process is started")
    parser.add_argument("--inside", choices=list(ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Processes in order, figures kept as they come."""
    from gpu_check import engine_settings

    args, began = parse(), time.monotonic()
    if args.inside:
        settings = engine_settings(args.engine)
        inside(args.inside, args.shapes[0], args.workloads.split(","), args.repetitions, settings)
        return 0
    folder, rows = Path(os.environ.get("OUT", ".")), []
    log = folder / "gpu_beside_vllm.log"
    saved = {"when": time.strftime("%Y-%m-%d"), "argv": sys.argv[1:], "rows": rows}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        (folder / "gpu_beside_vllm.json").write_text(json.dumps(saved | {"summary": summary(rows)}, indent=1) + "\n")
        figures = [f"{rate(row, s)[0]:,.5g}" for s in row["seconds"]]
        print(f"RESULT {time.monotonic() - began:4.0f} s {row['shape']} {args.engine} {row['engine']} "
              f"{row['workload']}: {' '.join(figures)} {rate(row, 1)[1]}", flush=True)  # fmt: skip

    for shape in args.shapes:
        seen: set[str] = set()
        for engine in args.order.split(","):
            if time.monotonic() - began > args.seconds:
                break
            path = [args.vllm_path] if engine == "vllm" and args.vllm_path else []
            environment = os.environ | {"PYTHONPATH": ":".join([*path, os.environ.get("PYTHONPATH", "")]).rstrip(":")}
            command = [sys.executable, __file__, shape, "--inside", engine, "--engine", args.engine]
            command += ["--workloads", args.again if engine in seen else args.workloads]
            command += ["--repetitions", str(args.repetitions)]
            seen.add(engine)
            if not run_engine(command, environment, log, keep):
                print("\n".join([*log.read_text(errors="replace").splitlines()[-60:], f"{engine} failed: see {log}"]))
                show(summary(rows))
                return 1
    show(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
