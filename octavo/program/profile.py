"""What the nodes of a program took, next to what they had to do: the profile of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from octavo.program.ops import AnyOp, Sizes, WeightBytes
from octavo.program.printer import Cost, line_up, op_name
from octavo.program.program import Program

_HEADER = ("node", "op", "times", "us a step", "share", "barriers", "GB/s", "GFLOP/s", "of limit")
_SAMPLER = ("sampler", "Sample")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do at most with the runtime's threads, measured."""

    bytes_per_second: float  # read from memory
    operations_per_second: Mapping[str, float]  # in float32, bfloat16 and int8; a multiply-add counts two

    def seconds(self, cost: Cost, arithmetic: str) -> float:
        """The least time a cost can take (roofline: Williams et al. 2009)."""
        return max(cost.moved / self.bytes_per_second, cost.operations / self.operations_per_second[arithmetic])


@dataclass(slots=True)
class Line:
    """Nodes of one kind, summed over layers and steps."""

    num_nodes: int = 0  # in one step
    seconds: float = 0.0
    barriers: int = 0
    least_seconds: float = 0.0
    cost: Cost = field(default_factory=lambda: Cost(0, 0))


@dataclass(slots=True)
class _Steps:
    count: int = 0
    num_tokens: int = 0
    lines: dict[tuple[str, str], Line] = field(default_factory=dict)


class Profile:
    """Collects node times of steps. Steps of one token per request (decode) are kept apart from the others.

    A tied embedding's bytes count where they are read. Nodes that work from a cache can pass 100 % of the limit.
    """

    def __init__(
        self, program: Program, limits: Limits, weight_bytes: WeightBytes, kv_bytes: float, arithmetics: list[str]
    ) -> None:
        self.limits = limits
        self._nodes = program.nodes
        self._arithmetics = [*arithmetics, "float32"]
        self._keys = [_key(node) for node in program.nodes]
        self._weight_bytes = weight_bytes
        self._kv_bytes = kv_bytes
        self._vocab_size = program.vocab_size
        self.decode = _Steps()
        self.other = _Steps()

    def add(self, sizes: Sizes, times: Sequence[tuple[int, int]]) -> None:
        """Adds one step: (nanoseconds, barriers) of each node in order, then of the sampler."""
        steps = self.decode if sizes.num_tokens == sizes.num_requests else self.other
        if not steps.count:
            steps.lines = {key: Line() for key in (*self._keys, _SAMPLER)}
            for key in (*self._keys, _SAMPLER):
                steps.lines[key].num_nodes += 1
        steps.count += 1
        steps.num_tokens += sizes.num_tokens
        costs = [
            Cost(node.bytes_moved(sizes, self._weight_bytes, self._kv_bytes), node.operations(sizes))
            for node in self._nodes
        ]
        costs.append(Cost(4 * sizes.num_logits * self._vocab_size, sizes.num_logits * self._vocab_size))
        keys = (*self._keys, _SAMPLER)
        for key, (nanoseconds, barriers), cost, arithmetic in zip(keys, times, costs, self._arithmetics, strict=True):
            line = steps.lines[key]
            line.seconds += nanoseconds * 1e-9
            line.barriers += barriers
            line.cost += cost
            line.least_seconds += self.limits.seconds(cost, arithmetic)

    def describe(self) -> str:
        """Tables of both kinds of steps, as plain text."""
        rates = [f"{rate / 1e9:.0f} in {name}" for name, rate in self.limits.operations_per_second.items()]
        text = [
            f"limits measured here: read {self.limits.bytes_per_second / 1e9:.1f} GB/s, "
            f"multiply-add {', '.join(rates)}, in GFLOP/s"
        ]
        for title, steps in (("decode steps", self.decode), ("prompt steps", self.other)):
            if steps.count:
                text.append(f"{title}: {steps.count}, of {steps.num_tokens / steps.count:.1f} tokens\n{_table(steps)}")
        return "\n\n".join(text) + "\n"


def _key(node: AnyOp) -> tuple[str, str]:
    """("attention", "Attention window 512"): the same for each layer."""
    parts = node.label.split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts), op_name(node)


def _table(steps: _Steps) -> str:
    total = Line()
    for line in steps.lines.values():
        total.num_nodes += line.num_nodes
        total.seconds += line.seconds
        total.barriers += line.barriers
        total.least_seconds += line.least_seconds
        total.cost += line.cost
    lines = [*steps.lines.items(), (("total", ""), total)]
    rows = [
        (
            *name,
            str(line.num_nodes),
            f"{line.seconds / steps.count * 1e6:,.1f}",
            f"{line.seconds / total.seconds:.1%}",
            f"{line.barriers / steps.count:.0f}",
            f"{line.cost.moved / line.seconds / 1e9:.1f}",
            f"{line.cost.operations / line.seconds / 1e9:.1f}",
            f"{line.least_seconds / line.seconds:.0%}",
        )
        for name, line in lines
    ]
    return line_up([_HEADER, *rows], num_text_columns=2)
