"""`python -m lab.scheduling`: the policies against each other, simulated, as lab/results/scheduling.json, the tables of
docs/scheduling.md and its plot.

The scheduler is the engine's own; what a step costs was measured (octavo simulate --calibrate). Every figure is a mean
over traces that differ in their seed alone, with a 95 % interval of Student's t; differences are paired by trace.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from lab.plot import Panel, Series, draw
from octavo.config import EngineConfig, SchedulingPolicy
from octavo.simulate.costs import Costs
from octavo.simulate.simulator import Machine, capacity, simulate
from octavo.simulate.trace import Workload, clipped

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "lab" / "results"
PAGE = ROOT / "docs" / "scheduling.md"
PLOT = ROOT / "docs" / "scheduling.svg"
POLICIES: tuple[SchedulingPolicy, ...] = get_args(SchedulingPolicy)
LOADS = (0.6, 0.8, 1.0, 1.2)
NUM_TRACES = 32
T_95 = 2.040  # Student's t, 31 degrees of freedom
NUM_BLOCKS = 250  # 4,000 tokens of KV: short enough for preemptions
CONFIG = EngineConfig(max_num_seqs=32, slo_ttft_ms=2000, slo_itl_ms=150)
WORKLOAD = Workload(num_requests=300, num_tenants=4, tenant_skew=1.5, num_priorities=3, shared_prefix=32)
OWN = {  # policy -> the figures it is for
    "priority": ("TTFT of priority 0 ms",),
    "fair": ("Jain fairness", "TTFT of light users ms"),
    "slo": ("goodput requests/s",),
}
NOTICED = 0.01  # relative
MORE_IS_BETTER = ("output tokens/s", "goodput requests/s", "Jain fairness")
SHOWN = {  # figure -> digits
    "output tokens/s": 0,
    "goodput requests/s": 2,
    "TTFT p50 ms": 0,
    "TTFT p99 ms": 0,
    "ITL p50 ms": 1,
    "ITL p99 ms": 0,
    "TTFT of priority 0 ms": 0,
    "TTFT of light users ms": 0,
    "Jain fairness": 3,
    "recomputed %": 2,
}
PANELS = {
    "output tokens/s": "Output tokens/s",
    "goodput requests/s": "Goodput, requests/s",
    "TTFT p50 ms": "First token, median, ms",
    "TTFT p99 ms": "First token, 99 %, ms",
    "ITL p50 ms": "Between tokens, median, ms",
    "ITL p99 ms": "Between tokens, 99 %, ms",
    "TTFT of priority 0 ms": "First token of priority 0, mean, ms",
    "Jain fairness": "Jain fairness of four users",
    "recomputed %": "Tokens computed again, %",
}
Figures = dict[str, float]


def run(seed: int, load: float, machine: Machine, config: EngineConfig) -> Figures:
    """One trace at one load under one config. Load 1.0 is what the machine does under the default one."""
    longest = min(machine.max_model_len, machine.num_blocks * config.block_size)
    trace, _ = clipped(replace(WORKLOAD, seed=seed).generate(), longest)
    slower = WORKLOAD.rate / (load * capacity(trace, machine, CONFIG))
    trace = [replace(arrival, time=arrival.time * slower) for arrival in trace]
    outcome = simulate(trace, machine, config)
    first = [seen.ttft for seen in outcome.seen if seen.arrival.priority == 0]
    light = [seen.ttft for seen in outcome.seen if seen.arrival.tenant != "t0"]  # t0 sends most
    figures = outcome.figures(ttft=config.slo_ttft_ms / 1000, itl=config.slo_itl_ms / 1000)
    return figures | {
        "TTFT of priority 0 ms": 1000 * statistics.mean(first),
        "TTFT of light users ms": 1000 * statistics.mean(light),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    return statistics.mean(values), T_95 * statistics.stdev(values) / len(values) ** 0.5


def measure(machine: Machine) -> dict[str, dict[str, list[Figures]]]:
    """load -> policy (and "fcfs, no headroom") -> figures of each trace."""
    variants: dict[str, EngineConfig] = {p: replace(CONFIG, scheduling_policy=p) for p in POLICIES}
    variants["fcfs, no headroom"] = replace(CONFIG, admission_headroom=0.0)
    found: dict[str, dict[str, list[Figures]]] = {}
    with tqdm(total=len(LOADS) * len(variants) * NUM_TRACES, unit=" runs") as bar:
        for load in LOADS:
            for name, config in variants.items():
                runs = found.setdefault(f"{load:g}", {}).setdefault(name, [])
                for seed in range(NUM_TRACES):
                    runs.append(run(seed, load, machine, config))
                    bar.update()
    return found


def column(found: dict[str, dict[str, list[Figures]]], load: str, name: str, figure: str) -> list[float]:
    """One figure of all traces."""
    return [figures[figure] for figures in found[load][name]]


def table(found: dict[str, dict[str, list[Figures]]], load: str) -> str:
    """All figures at one load, a policy in a column."""
    lines = [f"| {100 * float(load):.0f} % load | {' | '.join(POLICIES)} |", "|---|" + "---:|" * len(POLICIES)]
    for figure, digits in SHOWN.items():
        cells = []
        for policy in POLICIES:
            mean, half = interval(column(found, load, policy, figure))
            cells.append(f"{mean:,.{digits}f} ± {half:,.{digits}f}")
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(found: dict[str, dict[str, list[Figures]]], load: str, policy: str, figure: str) -> tuple[str, str]:
    """Against fcfs on the same traces: both means and their difference as cells, and the verdict."""
    digits = SHOWN[figure]
    ours, theirs = column(found, load, policy, figure), column(found, load, "fcfs", figure)
    mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    verdict = "no difference"
    if abs(mean) > half:
        verdict = "better" if (mean > 0) == (figure in MORE_IS_BETTER) else "worse"
    cells = f"{statistics.mean(theirs):,.{digits}f} | {statistics.mean(ours):,.{digits}f}"
    return f"{cells} | {mean:+,.{digits}f} ± {half:,.{digits}f}", verdict


def own_table(found: dict[str, dict[str, list[Figures]]]) -> str:
    """What each policy changes in the figures it is for."""
    lines = [
        "| policy | its figure | load | fcfs | policy | difference (95 %) | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for policy, figures in OWN.items():
        for figure in figures:
            for load in found:
                cells, verdict = difference(found, load, policy, figure)
                lines.append(f"| {policy} | {figure} | {100 * float(load):.0f} % | {cells} | {verdict} |")
    return "\n".join(lines)


def loss_table(found: dict[str, dict[str, list[Figures]]]) -> str:
    """Where each policy is worse than fcfs by more than NOTICED, in any figure."""
    lines = ["| policy | loses in | load | fcfs | policy | difference (95 %) |", "|---|---|---:|---:|---:|---:|"]
    for policy in OWN:
        for figure in SHOWN:
            for load in found:
                cells, verdict = difference(found, load, policy, figure)
                theirs, ours = (statistics.mean(column(found, load, name, figure)) for name in ("fcfs", policy))
                if verdict == "worse" and abs(ours - theirs) > NOTICED * theirs:
                    lines.append(f"| {policy} | {figure} | {100 * float(load):.0f} % | {cells} |")
    return "\n".join(lines)


def headroom_table(found: dict[str, dict[str, list[Figures]]]) -> str:
    """What leaving blocks free at admission changes."""
    lines = [
        "| load | recomputed %, none | with | preemptions, none | with | output tokens/s, difference (95 %) |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for load in found:
        cells = []
        for figure, digits in (("recomputed %", 2), ("preemptions", 1)):
            for name in ("fcfs, no headroom", "fcfs"):
                cells.append(f"{statistics.mean(column(found, load, name, figure)):.{digits}f}")
        pairs = zip(*(column(found, load, n, "output tokens/s") for n in ("fcfs", "fcfs, no headroom")), strict=True)
        mean, half = interval([a - b for a, b in pairs])
        lines.append(f"| {100 * float(load):.0f} % | {' | '.join(cells)} | {mean:+.1f} ± {half:.1f} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, list[Figures]]]) -> str:
    """The figures over the load."""
    panels = []
    for figure, title in PANELS.items():
        series = []
        for policy in POLICIES:
            points = [(100 * float(load), *interval(column(found, load, policy, figure))) for load in found]
            series.append(Series(policy, points))
        panels.append(Panel(title, series, log="TTFT" in figure))
    return draw(panels, columns=3, x_label="load, %")


def fill_page(parts: dict[str, str]) -> None:
    """Puts the generated parts between their marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(start)
        _, mark, after = rest.partition(end)
        if not mark:
            raise SystemExit(f"{PAGE} lacks {start} ... {end}")
        text = f"{before}{start}\n{part}\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Measures, or with --only-page takes the committed result; writes result, page and plot."""
    parser = argparse.ArgumentParser(description="The scheduling policies compared, in the simulator.")
    parser.add_argument("--costs", type=Path, default=RESULTS / "costs-smollm2.json")
    parser.add_argument("--only-page", action="store_true", help="from the committed result")
    args = parser.parse_args()
    path = RESULTS / "scheduling.json"
    if not args.only_page:
        measured = Costs.read(args.costs)
        result: dict[str, Any] = {
            "what": "scheduling policies in the simulator",
            "date": datetime.date.today().isoformat(),
            "command": "python -m lab.scheduling",
            "costs": asdict(measured),
            "num_blocks": NUM_BLOCKS,
            "workload": asdict(WORKLOAD),
            "num_traces": NUM_TRACES,
            "figures": measure(replace(measured.machine(CONFIG), num_blocks=NUM_BLOCKS)),
        }
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = json.loads(path.read_text(encoding="utf-8"))
    found = result["figures"]
    PLOT.write_text(plot(found), encoding="utf-8")
    tables = "\n\n".join(table(found, load) for load in found)
    costs = result["costs"]
    machine = f"{costs['model']} on {costs['runtime']}"
    source = f"`{result['command']}`, {machine}, {result['num_traces']} traces, {result['date']}"
    fill_page(
        {
            "own": f"{own_table(found)}\n\n{source}",
            "losses": loss_table(found),
            "all": f"{tables}\n\n{source}",
            "headroom": headroom_table(found),
        }
    )
    print(own_table(found), loss_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
