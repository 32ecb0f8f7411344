"""Prints a program as a lined-up table: what each node computes, moves and costs. Plain text, no colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from octavo.program.ops import FLOAT_BYTES, AnyOp, Attention, Experts, Linear, Norm, Sizes, Weight, WeightBytes, rows_of
from octavo.program.program import Program

_HEADER = ("node", "op", "out", "weight", "weight bytes", "moved", "operations", "ops/byte")
_NUM_TEXT_COLUMNS = 4
Cells = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a program costs in one step of bound sizes."""

    moved: int  # bytes that must move
    operations: int  # floating-point, a multiply-add counts two

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.moved + other.moved, self.operations + other.operations)


def cost_of(nodes: Iterable[AnyOp], sizes: Sizes, weight_bytes: WeightBytes, *, kv_bytes: float = 4) -> Cost:
    """The summed cost of nodes. `kv_bytes` is per element."""
    total = Cost(0, 0)
    for node in nodes:
        total += Cost(node.bytes_moved(sizes, weight_bytes, kv_bytes), node.operations(sizes))
    return total


def describe(program: Program, sizes: Sizes, weight_bytes: WeightBytes, *, kv_bytes: float = 4) -> str:
    """The table of a program for one step of `sizes`. A layer that equals an earlier one is folded into a line.

    Args:
        weight_bytes: resident bytes of a weight in the runtime that will run it.
        kv_bytes: bytes of one element of the KV cache.
    """

    def cost(nodes: Iterable[AnyOp]) -> Cost:
        return cost_of(nodes, sizes, weight_bytes, kv_bytes=kv_bytes)

    sections = [(name, list(nodes)) for name, nodes in groupby(program.nodes, key=_section_of)]
    first_of: dict[tuple[Cells, ...], str] = {}
    same_as: dict[str, list[str]] = {}  # first of its kind -> later ones
    rows: dict[str, tuple[Cells, ...]] = {}
    for name, nodes in sections:
        cells = tuple(_cells(node, name, sizes, weight_bytes, cost([node])) for node in nodes)
        first = first_of.setdefault(cells, name) if name.startswith("layers.") else name
        if first == name:
            rows[name] = tuple((f"{name}{row[0]}", *row[1:]) for row in cells)
        else:
            same_as.setdefault(first, []).append(name)

    costs = {name: cost(nodes) for name, nodes in sections}
    weights_of = {name: _distinct_bytes(nodes, weight_bytes) for name, nodes in sections}
    table: list[Cells] = [_HEADER]
    for name, section in rows.items():
        table.extend(section)
        if name in same_as:
            folded = same_as[name]
            held = sum(weights_of[n] for n in folded)
            total = sum((costs[n] for n in folded), Cost(0, 0))
            table.append((f"{_ranges(folded)} as {name}", "", "", "", *_numbers(held, total)))
    resident = sum(weight_bytes(w) for w in program.weights)
    table.append(("total", f"{len(program.nodes)} nodes", "", "", *_numbers(resident, cost(program.nodes))))
    return f"{line_up(table)}\n\n{_footer(program, sizes, kv_bytes)}\n"


def _section_of(node: AnyOp) -> str:
    """ "layers.3" for a node of a layer, else its whole label."""
    parts = node.label.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else node.label


def _cells(node: AnyOp, section: str, sizes: Sizes, weight_bytes: WeightBytes, cost: Cost) -> Cells:
    """One row; the label without its section, so that equal layers give equal rows."""
    out = node.outputs[0]
    weights = " ".join("x".join(map(str, w.shape)) for w in node.weights if len(w.shape) > 1)
    held = sum(weight_bytes(w) for w in node.weights)
    shape = f"{rows_of(out, sizes)}x{out.width}"
    return (node.label.removeprefix(section), op_name(node), shape, weights, *_numbers(held, cost))


def op_name(node: AnyOp) -> str:
    """The op with what makes this one special: "Linear silu_mul", "Attention window 512"."""
    notes: list[str] = []
    if isinstance(node, Linear):
        notes += [node.activation] if node.activation != "none" else []
        notes += ["+bias"] if node.bias else []
    elif isinstance(node, Experts):
        notes += [f"{node.top_k} of {node.num_experts}", *(["+shared"] if node.shared else [])]
    elif isinstance(node, Attention):
        notes += [f"window {node.window}"] if node.window else []
    elif isinstance(node, Norm):
        notes += [node.kind, *(["+residual"] if node.residual else [])]
    return " ".join((type(node).__name__, *notes))


def _numbers(held: int, cost: Cost) -> Cells:
    intensity = f"{cost.operations / cost.moved:.2f}" if cost.moved else "-"
    return _bytes(held) if held else "-", _bytes(cost.moved), _count(cost.operations), intensity


def _distinct_bytes(nodes: Iterable[AnyOp], weight_bytes: WeightBytes) -> int:
    weights: dict[tuple[str, ...], Weight] = {w.parts: w for node in nodes for w in node.weights}
    return sum(weight_bytes(w) for w in weights.values())


def _ranges(names: list[str]) -> str:
    """["layers.1", "layers.2", "layers.4"] -> "layers.1-2,4"."""
    numbers = sorted(int(name.split(".")[1]) for name in names)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "layers." + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _footer(program: Program, sizes: Sizes, kv_bytes: float) -> str:
    plan = program.plan_buffers()
    arena = plan.elements(sizes.num_tokens, sizes.num_logits) * FLOAT_BYTES
    return (
        f"step          {sizes.num_tokens} tokens, {sizes.num_logits} sampled, {sizes.context_len} positions attended\n"
        f"activations   {_bytes(arena)} in {len(plan.slot_width)} slots for {len(program.buffers)} buffers\n"
        f"KV cache      {_bytes(int(program.kv_elements_per_block(1) * kv_bytes))} a token "
        f"in {len(program.kv_layers)} layers"
    )


def line_up(table: Sequence[Cells], *, num_text_columns: int = _NUM_TEXT_COLUMNS) -> str:
    """Rows of cells as text: the first columns line up left, the rest right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column < num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _count(count: int) -> str:
    """1500000 -> "1.5 M"."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(count: int, factor: int, units: Sequence[str]) -> str:
    power = 0
    while count >= factor ** (power + 1) and power + 1 < len(units):
        power += 1
    return f"{count / factor**power:.{min(power, 1)}f} {units[power]}".rstrip()
