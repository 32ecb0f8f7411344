"""A program: the model as a list of nodes over buffers, recorded once by models/decoder.py and run by a runtime.

There is one way to run a model: run its program. Liveness gives buffer reuse here; shapes give bytes, operations,
the roofline and the memory plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from octavo.program.ops import AnyOp, Buffer, Rows, Weight

MAX_KV_GROUPS = 8


@dataclass(frozen=True, slots=True)
class KVLayer:
    """The KV cache of one attention layer. Layers of one group follow one block table; those of different groups that
    have the same `place` share memory, since a block belongs to one group at a time."""

    num_kv_heads: int
    head_dim: int
    group: int = 0
    window: int = 0  # positions that a token sees, itself included; 0: all
    place: int = 0

    @property
    def width(self) -> int:
        """Elements of K plus V at one position."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Buffers folded into reusable slots. `slot_of[i]` belongs to `program.buffers[i]`; widths are elements a row."""

    slot_of: tuple[int, ...]
    slot_rows: tuple[Rows, ...]
    slot_width: tuple[int, ...]

    def elements(self, num_tokens: int, num_logits: int) -> int:
        """Elements of all slots for steps of at most these sizes."""
        sizes = {Rows.TOKENS: num_tokens, Rows.LOGITS: num_logits}
        return sum(sizes[rows] * width for rows, width in zip(self.slot_rows, self.slot_width, strict=True))


@dataclass(frozen=True, slots=True)
class Program:
    """Nodes in execution order. `hidden` holds the last normed states [R, hidden_size], `logits` [R, vocab_size]."""

    nodes: tuple[AnyOp, ...]
    kv_layers: tuple[KVLayer, ...]
    hidden: Buffer
    logits: Buffer
    vocab_size: int
    max_model_len: int

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All buffers in order of first writing."""
        return tuple(dict.fromkeys(b for node in self.nodes for b in node.outputs))

    @property
    def weights(self) -> tuple[Weight, ...]:
        """All parameters in order of first use; a tied one once."""
        seen: dict[tuple[str, ...], Weight] = {}
        for node in self.nodes:
            for w in node.weights:
                seen.setdefault(w.parts, w)
        return tuple(seen.values())

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that a checkpoint must bring, by its canonical name."""
        return {
            part: (rows, *weight.shape[1:])
            for weight in self.weights
            for part, rows in zip(weight.parts, weight.part_rows, strict=True)
        }

    @property
    def num_kv_groups(self) -> int:
        """Block tables a request needs."""
        return 1 + max((layer.group for layer in self.kv_layers), default=0)

    @property
    def kv_windows(self) -> tuple[int, ...]:
        """What the widest layer of each KV group sees; 0: everything."""
        widest = [0] * self.num_kv_groups
        for layer in self.kv_layers:
            widest[layer.group] = max(widest[layer.group], layer.window or self.max_model_len)
        return tuple(window if window < self.max_model_len else 0 for window in widest)

    @property
    def kv_places(self) -> tuple[KVLayer, ...]:
        """What memory a block needs: one layer for each place, in their order."""
        layers = {layer.place: layer for layer in self.kv_layers}
        return tuple(layers[place] for place in sorted(layers))

    def kv_elements_per_block(self, block_size: int) -> int:
        """Elements of K and V in one block, over all places."""
        return block_size * sum(layer.width for layer in self.kv_places)

    def with_kv_groups(self) -> Program:
        """The same program, with a block table for each kind of window, so that windows keep no more than they see.

        Every group has the same number of places, the last of a kind perhaps fewer layers: as many as waste the fewest
        with at most MAX_KV_GROUPS groups. A window as long as the context is none.
        """
        windows = [layer.window if layer.window < self.max_model_len else 0 for layer in self.kv_layers]
        if not windows or len({(layer.num_kv_heads, layer.head_dim) for layer in self.kv_layers}) > 1:
            return self
        counts = Counter(windows)
        shapes = [(size, sum(-(-n // size) for n in counts.values())) for size in range(1, len(windows) + 1)]
        size = min(
            (shape for shape in shapes if shape[1] <= max(MAX_KV_GROUPS, len(counts))),
            key=lambda shape: (math.prod(shape), shape[1]),
        )[0]
        next_of, first_free = {}, 0
        for window in sorted(counts):  # those that see everything first: they bound what can be hit
            next_of[window] = first_free * size
            first_free += -(-counts[window] // size)
        layers = []
        for layer, window in zip(self.kv_layers, windows, strict=True):
            group, place = divmod(next_of[window], size)
            next_of[window] += 1
            layers.append(replace(layer, group=group, window=window, place=place))
        return replace(self, kv_layers=tuple(layers))

    def plan_buffers(self) -> BufferPlan:
        """Folds buffers whose lives do not overlap into slots (greedy, first fit by kind of row).

        A node's outputs never share memory with its inputs, except the pairs it names in `inplace()`.
        `hidden` and `logits` live to the end.
        """
        buffers = self.buffers
        last_use = _last_uses(self.nodes)
        for kept in (self.hidden, self.logits):
            last_use[kept] = len(self.nodes)
        slots: dict[Buffer, int] = {}
        rows: list[Rows] = []
        widths: list[int] = []
        free: list[int] = []
        for index, node in enumerate(self.nodes):
            handed_over = set()
            for out, source in node.inplace():
                if last_use[source] == index and source.rows is out.rows and source.width == out.width:
                    slots[out] = slots[source]
                    handed_over.add(source)
            for out in node.outputs:
                if out in slots:
                    continue
                slot = _best_free(free, rows, widths, out)
                if slot is None:
                    slot = len(rows)
                    rows.append(out.rows)
                    widths.append(out.width)
                else:
                    free.remove(slot)
                    widths[slot] = max(widths[slot], out.width)
                slots[out] = slot
            dying = {b for b in (*node.inputs, *node.outputs) if last_use.get(b, index) <= index}
            free.extend(sorted({slots[b] for b in dying - handed_over}))
        return BufferPlan(tuple(slots[b] for b in buffers), tuple(rows), tuple(widths))


def _last_uses(nodes: Sequence[AnyOp]) -> dict[Buffer, int]:
    last: dict[Buffer, int] = {}
    for index, node in enumerate(nodes):
        for b in (*node.outputs, *node.inputs):
            last[b] = index
    return last


def _best_free(free: list[int], rows: list[Rows], widths: list[int], wanted: Buffer) -> int | None:
    fitting = [s for s in free if rows[s] is wanted.rows]
    return min(fitting, key=lambda s: abs(widths[s] - wanted.width), default=None)


class ProgramBuilder:
    """Collects nodes while the decoder records."""

    def __init__(self) -> None:
        self._nodes: list[AnyOp] = []
        self._kv_layers: list[KVLayer] = []

    def tokens(self, name: str, width: int) -> Buffer:
        """A new buffer with one row per token."""
        return Buffer(name, Rows.TOKENS, width)

    def logit_rows(self, name: str, width: int) -> Buffer:
        """A new buffer with one row per position whose logits are wanted."""
        return Buffer(name, Rows.LOGITS, width)

    def add(self, node: AnyOp) -> Buffer:
        """Appends a node; returns what it writes."""
        self._nodes.append(node)
        return node.out

    def kv_layer(self, layer: KVLayer) -> int:
        """Declares the KV cache of one attention layer and returns its index."""
        self._kv_layers.append(replace(layer, place=len(self._kv_layers)))
        return len(self._kv_layers) - 1

    def finish(self, *, hidden: Buffer, logits: Buffer, vocab_size: int, max_len: int) -> Program:
        """The recorded program."""
        return Program(tuple(self._nodes), tuple(self._kv_layers), hidden, logits, vocab_size, max_len)
