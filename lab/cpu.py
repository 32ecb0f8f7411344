"""`python -m lab.cpu`: the CPU workloads over HTTP against `octavo serve`, with `--peers` against others beside it.

Prints aligned tables and merges every figure into lab/results/cpu-NAME.json, so that a run may be done in pieces
(`--only W1 W3`, `--configurations bf16`). Server and client share the machine, as they would for a user without a
GPU; nothing else should be running. All engines are alive at once and take turns, one repetition each, while the
others are stopped. What fails is reported by name with its reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lab.engines import Engine, EngineError, OctavoEngine
from lab.figures import PARTS, W2_NAME, Figure, Part
from lab.machine import describe_machine
from lab.peers import PEERS, peer_names
from lab.text import load_text
from octavo.errors import OctavoError
from octavo.models.hub import resolve_model
from octavo.text.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results"
SERVE = {"max_model_len": 8192, "max_num_seqs": 32, "kv_cache_memory_bytes": 400 << 20}
TEXT, TEXT_CHARACTERS = "moby-dick", slice(60_000, 500_000)
SECONDS_PER_PART = 45.0  # an engine that has taken longer gets no further repetition of this part
STARTS = 3
INTERRUPTED = 130  # exit status
START, MEMORY = "new process to first token", "peak memory in W2, all processes"
COMPARED = ("W1 decode", "W1 time to first token", "W2 output", "W3 prompt", "W4 wall", START, MEMORY)


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to serve the model: fields of EngineConfig, and the parts it is measured in (None: all)."""

    options: dict[str, str]
    parts: tuple[str, ...] | None = None


CONFIGURATIONS = {
    "gguf": Configuration({}),
    "gguf, int8 KV": Configuration({"kv_cache_dtype": "int8"}, ("W2", "long")),
    "stored": Configuration({"dtype": "quantized"}),
    "stored, int8 KV": Configuration({"dtype": "quantized", "kv_cache_dtype": "int8"}, ("W2", "long")),
    "bf16": Configuration({"dtype": "bfloat16"}),
    "float32": Configuration({"dtype": "float32"}, ("W1", "W2", "W3", "W4")),
}
DEFAULT = ("gguf", "gguf, int8 KV", "stored", "bf16")


class Bench:
    """The engines of a run, and their figures."""

    def __init__(self, model: str, engines: Sequence[Engine], text: Sequence[int], console: Console) -> None:
        self.model = model
        self.engines = [*engines]
        self.figures: dict[str, dict[str, Figure]] = {engine.name: {} for engine in engines}
        self.failed: dict[str, str] = {}
        self._text = text
        self._console = console
        self._began = time.monotonic()

    @property
    def alive(self) -> list[Engine]:
        """Engines that have not failed."""
        return [engine for engine in self.engines if engine.name not in self.failed]

    def start(self, log_folder: Path, repetitions: int) -> None:
        """Starts every engine; ours a few times, after one start that warms the page cache. Leaves them paused."""
        for engine in self.alive:
            try:
                starts = min(STARTS, repetitions) + 1 if is_ours(engine) else 1
                for number in range(starts):
                    seconds = engine.start(log_folder)
                    if number or starts == 1:
                        self._add(engine, START, "s", seconds)
                    if number < starts - 1:
                        engine.stop()
                engine.pause()
            except Exception as error:
                self.fail(engine.name, error)

    def measure(self, parts: Sequence[Part], wanted: dict[str, tuple[str, ...] | None]) -> None:
        """All parts, repetitions interleaved over the engines."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            task = progress.add_task("", total=sum(part.repetitions for part in parts))
            for part in parts:
                spent: dict[str, float] = {}
                for repetition in range(-1 if part.warm_up else 0, part.repetitions):
                    progress.update(task, description=f"{part.name}: {part.title}")
                    for engine in self.alive:
                        chosen = wanted.get(engine.name)
                        if (part.ours and not is_ours(engine)) or (chosen is not None and part.name not in chosen):
                            continue
                        if spent.get(engine.name, 0.0) < SECONDS_PER_PART:
                            seconds = self._once(part, engine, repetition)
                            spent[engine.name] = spent.get(engine.name, 0.0) + seconds * (repetition >= 0)
                    progress.advance(task, repetition >= 0)
                if part.name == "W2":  # before parts of longer contexts
                    for engine in self.alive:
                        if W2_NAME in self.figures[engine.name]:
                            self._add(engine, MEMORY, "MiB", engine.peak_memory())

    def end(self) -> None:
        """Ends every engine, whatever becomes of the others."""
        for engine in self.engines:
            try:
                engine.stop()
            except Exception as error:
                self.fail(engine.name, error)

    def fail(self, name: str, error: Exception) -> None:
        """Leaves an engine out from here on."""
        reason = str(error) if isinstance(error, EngineError | OctavoError) else f"{type(error).__name__}: {error}"
        self.failed[name] = reason
        self._console.print(f"{name} failed: {reason}", style="red", markup=False, highlight=False)

    def _once(self, part: Part, engine: Engine, repetition: int) -> float:
        began = time.monotonic()
        try:
            engine.resume()
            for name, unit, value in part.measure(engine, repetition, self._text):
                if repetition >= 0:
                    self._add(engine, name, unit, value)
            engine.pause()
        except Exception as error:
            self.fail(engine.name, error)
            engine.stop()
        return time.monotonic() - began

    def _add(self, engine: Engine, name: str, unit: str, value: float) -> None:
        self.figures[engine.name].setdefault(name, Figure(unit)).values.append(value)
        line = f"{time.monotonic() - self._began:5.0f} s  {engine.name:<14} {name:<36} {value:10,.2f} {unit}"
        self._console.print(line, style="dim", markup=False, highlight=False)


def is_ours(engine: Engine) -> bool:
    """True for a configuration of Octavo."""
    return isinstance(engine, OctavoEngine)


def ours(model: str, name: str) -> Engine:
    """`octavo serve` in one configuration."""
    return OctavoEngine(name, {"model": model, **SERVE, **CONFIGURATIONS[name].options})


def text_ids(model: str) -> list[int]:
    """Ids of a real text."""
    return load_tokenizer(resolve_model(model)).encode(load_text(TEXT)[TEXT_CHARACTERS])


def show(saved: dict[str, Any], console: Console) -> None:
    """Two tables: everything of ours, a column a configuration; then a line an engine where peers were measured."""
    engines = saved["engines"]
    own = [name for name in CONFIGURATIONS if name in engines]
    table = Table(title=f"{saved['what']}: median (range)", title_justify="left")
    table.add_column("")
    table.add_column("unit")
    for name in own:
        table.add_column(name, justify="right")
    names = dict.fromkeys(figure for name in own for figure in engines[name]["figures"])
    for figure in names:
        found = [engines[name]["figures"].get(figure) for name in own]
        unit = next(f["unit"] for f in found if f)
        table.add_row(figure, unit, *(str(Figure(f["unit"], f["values"])) if f else "" for f in found))
    console.print(table)
    if len(engines) > len(own):
        show_peers(saved, console)
    for name, engine in engines.items():
        if engine.get("failed"):
            console.print(f"{name} failed: {engine['failed']}", style="red", markup=False, highlight=False)


def title(name: str, engine: dict[str, Any]) -> str:
    """How an engine is called beside others."""
    if name in CONFIGURATIONS:
        return f"Octavo {name}"
    return f"{name} (in process)" if "in process" in engine["note"] else name


def show_peers(saved: dict[str, Any], console: Console) -> None:
    """A line an engine."""
    table = Table(title="beside others, same machine, same tokens: median (range)", title_justify="left")
    table.add_column("")
    for name in COMPARED:
        unit = next((f["unit"] for e in saved["engines"].values() if (f := e["figures"].get(name))), "")
        table.add_column(f"{name}, {unit}", justify="right")
    for name, engine in saved["engines"].items():
        found = [engine["figures"].get(figure) for figure in COMPARED]
        cells = [str(Figure(f["unit"], f["values"])) if f else "" for f in found]
        table.add_row(title(name, engine), *cells)
    console.print(table)
    for name, engine in saved["engines"].items():
        console.print(f"{name}: {engine['note']}", style="dim", markup=False, highlight=False)


def merge(path: Path, bench: Bench, command: str) -> dict[str, Any]:
    """What is saved already on this machine, with this run's figures in place of older ones."""
    machine, today = describe_machine(), datetime.date.today().isoformat()
    saved: dict[str, Any] = {"what": f"CPU workloads, {bench.model}", "machine": machine, "engines": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("machine") == machine and "engines" in found:
            saved = found
    saved |= {"date": today, "command": command}
    for engine in bench.engines:
        entry = saved["engines"].setdefault(engine.name, {"figures": {}})
        entry |= {"note": engine.note, "failed": bench.failed.get(engine.name)}
        for name, figure in bench.figures[engine.name].items():
            entry["figures"][name] = {
                "unit": figure.unit,
                "values": [float(f"{value:.5g}") for value in figure.values],
                "date": today,
                "command": command,
            }
    for name, reason in bench.failed.items():
        saved["engines"].setdefault(name, {"figures": {}, "note": ""})["failed"] = reason
    order = [*CONFIGURATIONS, *saved["engines"]]
    saved["engines"] = {name: saved["engines"][name] for name in dict.fromkeys(order) if name in saved["engines"]}
    return saved


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parts = "; ".join(f"{part.name}: {part.title}" for part in PARTS.values())
    parser = argparse.ArgumentParser(prog="python -m lab.cpu", description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--configurations", nargs="*", choices=list(CONFIGURATIONS), default=list(DEFAULT))
    parser.add_argument("--peers", default="", metavar="NAMES", help=f"some of {','.join(PEERS)}, or all")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=parts.replace("%", "%%")
    )
    parser.add_argument("--repetitions", type=int, default=99, metavar="N", help="of a part at most, for a quick look")
    parser.add_argument("--save-as", metavar="NAME", help="of the result; MODEL by default")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    asked = list(PEERS) if options.peers == "all" else [name for name in options.peers.split(",") if name]
    try:
        options.peers = peer_names(asked)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    """Measures, prints, and writes lab/results/cpu-NAME.json."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # no engine is left behind, no figure lost
        signal.signal(number, lambda *_: sys.exit(INTERRUPTED))
    options = parse(arguments)
    console = Console(stderr=True)
    bench = Bench(
        options.model, [ours(options.model, n) for n in options.configurations], text_ids(options.model), console
    )
    for name in options.peers:
        console.print(f"preparing {name}", style="dim")
        try:
            engine = PEERS[name]()
        except Exception as error:  # whatever an installation runs into
            bench.fail(name, error)
        else:
            bench.engines.append(engine)
            bench.figures[engine.name] = {}
    status = 0
    with tempfile.TemporaryDirectory(prefix="octavo-lab-") as logs:
        try:
            bench.start(Path(logs), options.repetitions)
            wanted = {name: CONFIGURATIONS[name].parts for name in options.configurations}
            parts = [part for name, part in PARTS.items() if name in options.only]
            bench.measure([replace(p, repetitions=min(p.repetitions, options.repetitions)) for p in parts], wanted)
        except (KeyboardInterrupt, SystemExit):
            console.print("stopped early: what was measured until here is kept", style="red")
            status = INTERRUPTED
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # the engines are stopped processes: nobody else ends them
            bench.end()
    path = RESULTS / f"cpu-{options.save_as or options.model}.json"
    saved = merge(path, bench, "python -m lab.cpu " + " ".join(arguments))
    show(saved, Console(width=170))
    if not options.no_save:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    return status or bool(bench.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
