"""`python -m lab.simulator`: is the simulator right? At several loads a trace runs on the real engine, again and again,
and in a simulation; lab/results/simulate-smollm2.json and the tables of docs/scheduling.md.

In real time it is `octavo simulate --validate`: ten minutes, on a machine that does nothing else, because what else
computes is measured, too. With --cpu-time the engine's clock is the processor time of its one thread, and idle time is
skipped: what others do hardly matters, and neither does what a machine does between steps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lab.machine import describe_machine
from lab.scheduling import RESULTS, fill_page
from octavo.cli.app import run
from octavo.config import EngineConfig
from octavo.engine.calibrate import timed_steps
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.models.hub import resolve_model
from octavo.simulate.costs import Costs
from octavo.simulate.real import run_real
from octavo.simulate.simulator import capacity, simulate
from octavo.simulate.trace import Workload, clipped
from octavo.simulate.validate import compare

LOADS = (0.4, 0.6, 0.8)
CALIBRATION_SECONDS = 45.0
CONFIG = EngineConfig(model="smollm2", max_num_seqs=32, max_model_len=2000, num_threads=1, record="off")
VERB = ["simulate", "--validate", CONFIG.model, "--max-num-seqs", "32", "--max-model-len", "2k"]


class CpuClock:
    """Seconds of processor time of this process, and what was waited for without waiting."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._skipped

    def wait(self, seconds: float) -> None:
        """Skips so long."""
        self._skipped += max(seconds, 1e-9)


def in_real_time(load: float, num_requests: int, num_runs: int) -> dict[str, Any]:
    """The verb's figures and costs. Raises SystemExit when it fails otherwise than by being far off."""
    flags = ["--load", f"{load:g}", "--num-requests", str(num_requests), "--repeat", str(num_runs)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        status = run([*VERB, *flags, "--costs", str(Path(folder) / "costs.json"), "--output", str(output)])
        if status not in (0, 1):
            raise SystemExit(status)
        return {"verb": " ".join(["octavo", *VERB, *flags]), **json.loads(output.read_text(encoding="utf-8"))}


def in_cpu_time(load: float, num_requests: int, num_runs: int) -> dict[str, Any]:
    """The same on the other clock."""
    clock = CpuClock()
    executor = LocalExecutor(CONFIG, resolve_model(CONFIG.model))
    core = EngineCore(CONFIG, executor, executor.start(), clock=clock)
    timed, measured = [], []
    arrivals, _ = clipped(Workload(num_requests=num_requests).generate(), core.info.spec.max_model_len)
    scaled = arrivals
    with tqdm(total=num_runs * len(arrivals), unit=" requests") as bar:
        for number in range(num_runs + 1):
            timed += timed_steps(core, seconds=CALIBRATION_SECONDS / (num_runs + 1))
            costs = Costs.of(CONFIG.model, core, timed)
            if not number:
                pace = load * capacity(arrivals, costs.machine(CONFIG), CONFIG)
                scaled = [replace(arrival, time=arrival.time / pace) for arrival in arrivals]
            if number < num_runs:
                measured.append(run_real(scaled, core, salt=f"run {number}", clock=clock, wait=clock.wait))
                bar.update(len(arrivals))
    core.close()
    rows = compare(simulate(scaled, costs.machine(CONFIG), CONFIG), *measured)
    figures = [{**asdict(r), "measured": r.measured, "error": r.error, "spread": r.spread} for r in rows]
    return {"costs": asdict(costs), "figures": figures}


def table(loads: dict[str, Any]) -> str:
    """Load by load: simulated, the mean of the real runs, and how far those are from it."""
    lines = ["| load | figure | simulated | measured | off by | runs differ |", "|---:|---|---:|---:|---:|---:|"]
    for load, found in loads.items():
        for row in found["figures"]:
            lines.append(
                f"| {100 * float(load):.0f} % | {row['name']} | {row['simulated']:,.1f} | {row['measured']:,.1f} | "
                f"{100 * row['error']:+.1f} % | {100 * row['spread']:.1f} % |"
            )
    origins = dict.fromkeys(f"`{found['command']}`, {found['machine']}, {found['date']}" for found in loads.values())
    return "\n".join([*lines, "", *origins])


def main() -> None:
    """Measures, or with --only-page takes the committed results; writes results and page."""
    parser = argparse.ArgumentParser(description="Simulations held against the real engine.")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="what is not named stays as it was")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3, help="of the same trace, at each load")
    parser.add_argument("--cpu-time", action="store_true", help="on a clock that other processes do not touch")
    parser.add_argument("--only-page", action="store_true", help="from the committed results")
    args = parser.parse_args()
    path = RESULTS / "simulate-smollm2.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    clock, validate = ("cpu", in_cpu_time) if args.cpu_time else ("real", in_real_time)
    flag = " --cpu-time" if args.cpu_time else ""
    for load in () if args.only_page else args.loads:
        origin = {
            "command": f"python -m lab.simulator{flag} --requests {args.requests} --runs {args.runs}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        loads = result.setdefault(clock, {})
        loads[f"{load:g}"] = origin | validate(load, args.requests, args.runs)
        result[clock] = {load: loads[load] for load in sorted(loads)}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    parts = {clock: table(result[clock]) if clock in result else "(Not measured yet.)" for clock in ("real", "cpu")}
    fill_page({f"validation-{clock}": part for clock, part in parts.items()})


if __name__ == "__main__":
    main()
