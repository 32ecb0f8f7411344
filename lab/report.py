"""`python -m lab.report`: puts committed results into docs/benchmarks-cpu.md, its plot, and README's numbers.

No figure in those pages is typed by hand: rerun this after `python -m lab.cpu` or `python -m lab.nodes`, then
`python tools/readme_numbers.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lab.cpu import COMPARED, CONFIGURATIONS, RESULTS, title
from lab.figures import Figure
from lab.nodes import CASES, OPEN, RATES, cells, limits_of

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PLOT = DOCS / "benchmarks-cpu.md", DOCS / "benchmarks-cpu.svg"
START, END = "<!-- results:start -->", "<!-- results:end -->"
GPU_WORK = {
    "G2": "one request, 128 in / 128 out",
    "G1": "256 requests, 100 to 1,024 in / out",
    "G5": "256 requests, drawn by top-k and top-p",
    "G3": "64 requests, 1,024 in / 128 out",
    "G4": "16 prompts of 2,048",
    "new process to first token": "new process to first token",
}  # of tools/gpu_beside_vllm.py
PANELS = (("W1 decode", True), ("W2 output", True), ("W3 prompt", True), ("W4 wall", False))  # (figure, more is better)
XEON = (  # (result, heading, what to know of it)
    ("cpu-xeon-amx", "## Octavo on a Xeon with AMX", "Two of 16 cores; others may have used the machine."),
    (
        "cpu-xeon-amx-later",
        "### After the last changes to attention, epilogues and the start",
        "An hour in which such a machine's cores differed by half and changed from minute to minute: what is bound by"
        " memory was slower than above with the same kernels. Two more cores at the same time gave 165 tok/s in W1 and"
        " 3,594 in W3.",
    ),
)
WIDTH, BAR, GAP, NAMES, SPACE = 880, 18, 8, 160, 70
OURS, OTHERS = "#1f6f54", "#b9b9b0"


def figure_of(engine: dict[str, Any], name: str) -> Figure | None:
    """One figure of an engine, or None where it was not measured."""
    found = engine["figures"].get(name)
    return Figure(found["unit"], found["values"]) if found else None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ours(saved: dict[str, Any]) -> str:
    """A line a figure, a column a configuration."""
    engines = {name: engine for name, engine in saved["engines"].items() if name in CONFIGURATIONS}
    names = dict.fromkeys(name for engine in engines.values() for name in engine["figures"])
    rows = []
    for name in names:
        found = [figure_of(engine, name) for engine in engines.values()]
        unit = next(f.unit for f in found if f)
        rows.append([f"{name}, {unit}" if unit else name, *(str(f) if f else "" for f in found)])
    return table(["", *engines], rows)


def beside(saved: dict[str, Any]) -> str:
    """A line an engine, what it ran with, and what failed."""
    engines = saved["engines"]
    head = [""]
    for name in COMPARED:
        unit = next((f.unit for engine in engines.values() if (f := figure_of(engine, name))), "")
        head.append(f"{name}, {unit}")
    rows = [
        [title(name, engine), *(str(f) if (f := figure_of(engine, figure)) else "" for figure in COMPARED)]
        for name, engine in engines.items()
    ]
    notes = [f"- {title(name, engine)}: {engine['note']}" for name, engine in engines.items()]
    failed = [
        f"- {title(name, engine)} failed: {engine['failed']}"
        for name, engine in engines.items()
        if engine.get("failed")
    ]
    return "\n".join([table(head, rows), "", *notes, *failed])


def runs_of(saved: dict[str, Any]) -> dict[str, str]:
    """Command and date of every run that figures came from."""
    figures = [figure for engine in saved["engines"].values() for figure in engine["figures"].values()]
    return {figure["command"].rstrip(): figure["date"] for figure in figures}


def commands(saved: dict[str, Any]) -> str:
    """Where the figures came from."""
    lines = [f"- `{command}`, {date}" for command, date in runs_of(saved).items()]
    return "\n".join([f"Measured on {saved['machine']}, by", "", *lines])


def nodes(saved: dict[str, Any]) -> str:
    """A table a model; then what is open."""
    commands = dict.fromkeys(found["command"] for found in saved["results"])
    parts = [f"{', '.join(f'`{command}`' for command in commands)}; {saved['machine']}, {saved['date']}"]
    for found in saved["results"]:
        parts.append(
            f"**{found['model']}, {found['dtype']}**, KV {found['kv']}, level {found['level']}; {limits_of(found)}"
        )
        head = ["node"]
        for rows in CASES:
            head += [f"us, {rows} row{'s' * (rows != '1')}", RATES[rows][1], "of limit"]
        lines = []
        for name in dict.fromkeys(n for rows in CASES for n in found["rows"][rows]["nodes"]):
            op = next(step["nodes"][name]["op"] for step in found["rows"].values() if name in step["nodes"])
            of_rows = [cell for rows in CASES for cell in cells(found["rows"][rows]["nodes"], name, rows)]
            lines.append([f"{name} ({op})", *of_rows])
        steps = [found["rows"][rows] for rows in CASES]
        lines.append(["**step**", *(c for s in steps for c in (f"{s['us']:,.0f}", "", f"{s['of_limit']:.0%}"))])
        parts.append(table(head, lines))
    if saved["open"]:
        parts.append("\n".join(f"- {line}" for line in saved["open"]))
    return "\n\n".join(parts)


def whole_steps(saved: dict[str, Any]) -> str:
    """One table: a line a level and number type, what a whole step takes and how much of the machine's limit it is."""
    head = ["level", "weights", "KV"]
    for rows in CASES:
        head += [f"us, {rows} row{'s' * (rows != '1')}", "of limit"]
    lines = []
    for found in saved["results"]:
        steps = [found["rows"][rows] for rows in CASES]
        lines.append(
            [found["level"], found["dtype"], found["kv"]]
            + [cell for step in steps for cell in (f"{step['us']:,.0f}", f"{step['of_limit']:.0%}")]
        )
    commands = dict.fromkeys(found["command"] for found in saved["results"])
    source = f"{', '.join(f'`{command}`' for command in commands)}; {saved['machine']}, {saved['date']}"
    return "\n\n".join([table(head, lines), f"{source}; by node in `lab/results/nodes-levels.json`.", *by_op(saved)])


def by_op(saved: dict[str, Any]) -> Iterator[str]:
    """A table a number type: a line an op, a column a level, cells what it reaches of the limit by number of rows."""
    yield f"By op, percent of the limit at {', '.join(CASES)} rows; bold is open, under {OPEN:.0%}:"
    for dtype in dict.fromkeys(found["dtype"] for found in saved["results"]):
        of_dtype = [found for found in saved["results"] if found["dtype"] == dtype]
        ops = dict.fromkeys(node["op"] for found in of_dtype for node in found["rows"]["1"]["nodes"].values())
        lines = [[op, *(", ".join(share(f["rows"][rows], op) for rows in CASES) for f in of_dtype)] for op in ops]
        yield table([dtype, *(found["level"] for found in of_dtype)], lines)


def share(step: dict[str, Any], op: str) -> str:
    """What all nodes of an op reach of the limit."""
    nodes = [node for node in step["nodes"].values() if node["op"] == op]
    reached = sum(n["of_limit"] * n["us"] for n in nodes) / max(sum(n["us"] for n in nodes), 0.1)
    return f"{100 * reached:.0f}" if reached >= OPEN else f"**{100 * reached:.0f}**"


def plot(saved: dict[str, Any]) -> str:
    """Four panels of bars, the best on top, as SVG."""
    shapes: list[str] = []
    y = 0
    for name, more in PANELS:
        found = [(title(n, engine), f) for n, engine in saved["engines"].items() if (f := figure_of(engine, name))]
        if not found:
            continue
        found.sort(key=lambda pair: pair[1].median, reverse=more)
        unit, longest = found[0][1].unit, max(figure.median for _, figure in found)
        y += 26
        shapes.append(_text(0, y, f"{name}, {unit}{'' if more else ' (less is better)'}", "600"))
        y += 8
        for label, figure in found:
            length = max(2.0, figure.median / longest * (WIDTH - NAMES - SPACE))
            color = OURS if label.startswith("Octavo") else OTHERS
            shapes.append(_text(0, y + 13, label))
            shapes.append(f'<rect x="{NAMES}" y="{y}" width="{length:.1f}" height="{BAR - 4}" fill="{color}"/>')
            digits = 0 if figure.median >= 100 else 1
            shapes.append(_text(NAMES + length + 6, y + 12, f"{figure.median:,.{digits}f}"))
            y += BAR
        y += GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">'
    )
    background = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, background, *shapes, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}" fill="#222222">{escape(text)}</text>'


def sections() -> Iterator[str]:
    """What is generated of the page."""
    saved = json.loads((RESULTS / "cpu-smollm2.json").read_text(encoding="utf-8"))
    yield f"## Octavo\n\nMedian (range).\n\n{ours(saved)}\n\n{commands(saved)}"
    for name, heading, note in XEON:
        xeon = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        yield f"{heading}\n\n{note}\n\n{ours(xeon)}\n\n{commands(xeon)}"
    peers = json.loads((RESULTS / "cpu-xeon-amx-peers.json").read_text(encoding="utf-8"))
    note = (
        "Another hour on such a machine, mostly single runs: read its lines beside each other, not beside those above."
    )
    yield f"### Beside others there\n\n{note}\n\n{beside(peers)}\n\n{commands(peers)}"
    yield f"## Beside others\n\n![The same as bars](benchmarks-cpu.svg)\n\n{beside(saved)}"
    for name, heading, shown in (
        ("levels", "Instruction levels: SmolLM2, whole steps", whole_steps),
        ("models", "Nodes and limits", nodes),
    ):
        path = RESULTS / f"nodes-{name}.json"
        if path.exists():
            yield f"## {heading}\n\n{shown(json.loads(path.read_text(encoding='utf-8')))}"


def readme_numbers(saved: dict[str, Any]) -> dict[str, Any]:
    """Medians beside others, in the form of tools/readme_numbers.py."""
    engines = saved["engines"]
    head = []
    for name in COMPARED:
        unit = next((f.unit for engine in engines.values() if (f := figure_of(engine, name))), "")
        head.append(f"{name}, {unit}")
    rows = []
    for name, engine in engines.items():
        found = [figure_of(engine, figure) for figure in COMPARED]
        if not any(figure for name, figure in zip(COMPARED, found, strict=True) if name.startswith("W")):
            continue  # measured for other figures only
        rows.append(
            [title(name, engine), *(f"{f.median:,.{0 if f.median >= 100 else 1}f}" if f else "" for f in found)]
        )
    pieces = [*runs_of(saved)]
    return {
        "what": "SmolLM2-135M beside others, medians",
        "date": saved["date"],
        "machine": saved["machine"],
        "command": pieces[0]
        if len(pieces) == 1
        else f"python -m lab.cpu, in {len(pieces)} pieces (docs/benchmarks-cpu.md)",
        "columns": head,
        "rows": rows,
    }


def gpu_numbers() -> dict[str, Any]:
    """What one card does, a line a shape, in the form of tools/readme_numbers.py; "" for what was not run."""
    checks = json.loads((RESULTS / "gpu-check-h200.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = {}
    for row in (row for run in checks["runs"] for row in run["results"]):
        shape, _, work = row["name"].partition(" ")
        if work == "start-up":
            found[shape] = {work: f"{row['first_token_s']:.1f}"}
        elif "teacher" not in work and shape in found:
            found[shape][work[:2]] = f"{row['in_tok_s' if work[:2] == 'G4' else 'out_tok_s']:,.0f}"
    return {
        "what": "One H200, bfloat16, random weights, by a later build",
        "date": checks["date"],
        "machine": checks["machine"],
        "command": "python tools/gpu_check.py (docs/kernels.md)",
        "columns": [
            "one request, 128 in / 128 out, tok/s",
            "256 requests, 100 to 1,024 in / out, out tok/s",
            "64 requests, 1,024 in / 128 out, out tok/s",
            "16 prompts of 2,048, in tok/s",
            "new process to first token, kernels compiled, s",
        ],
        "rows": [
            [shape, *(of.get(w, "") for w in ("G2", "G1", "G3", "G4", "start-up"))] for shape, of in found.items()
        ],
    }


def beside_vllm() -> dict[str, Any]:
    """vLLM and Octavo on one card, a line a workload, in the form of tools/readme_numbers.py."""
    cards = ("H200", "H100")
    results = [json.loads((RESULTS / f"gpu-beside-vllm-{card.lower()}.json").read_text("utf-8")) for card in cards]
    rows = {  # a workload's newest run
        f"{card}, {line['shape']}: {GPU_WORK[line['workload']]}, {line['unit']}": [
            *(f"{line[name]:,.1f}" if line[name] < 1000 else f"{line[name]:,.0f}" for name in ("octavo", "vllm")),
            f"{line['ratio']:.2f}x",
        ]
        for card, result in zip(cards, results, strict=True)
        for run in result["runs"]
        for line in run["summary"]
        if line["workload"] in GPU_WORK
    }
    return {
        "what": "Beside vLLM 0.26.0 in one run, bfloat16, random weights; the H100 by a later build",
        "date": results[0]["date"],
        "machine": results[0]["machine"],
        "command": "python tools/gpu_beside_vllm.py SHAPE (docs/kernels.md)",
        "columns": ["Octavo", "vLLM", "Octavo is"],
        "rows": [[work, *figures] for work, figures in rows.items()],
    }


def main() -> int:
    """Writes page, plot and README's input."""
    argparse.ArgumentParser(prog="python -m lab.report", description=__doc__).parse_args()
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{PAGE} lacks {START} ... {END}")
    PAGE.write_text("\n\n".join([before + START, *sections(), END]) + after, encoding="utf-8")
    saved = json.loads((RESULTS / "cpu-smollm2.json").read_text(encoding="utf-8"))
    PLOT.write_text(plot(saved), encoding="utf-8")
    for name, numbers in (("cpu", readme_numbers(saved)), ("gpu", gpu_numbers()), ("gpu-vllm", beside_vllm())):
        (DOCS / "results" / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
