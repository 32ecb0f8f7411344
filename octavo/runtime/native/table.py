"""The program as the library reads it: arrays of C structs, built once at load."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from octavo.program.ops import (
    Add,
    AnyOp,
    Attention,
    Buffer,
    Embedding,
    Experts,
    GatherRows,
    Linear,
    Norm,
    Rope,
    RopeKVWrite,
    Rows,
    Weight,
)
from octavo.program.program import Program
from octavo.runtime.base import Float32
from octavo.runtime.native.library import (
    ACTIVATIONS,
    OP_CODES,
    BufferEntry,
    KVLayerEntry,
    Node,
    ProgramTable,
    RopeTable,
)

_ABSENT = -1


@dataclass(slots=True)
class Tables:
    """The structs, and the RoPE arrays that must live as long as the engine points to them."""

    program: ProgramTable
    ropes: list[tuple[Float32, Float32]] = field(default_factory=list)


def build_tables(program: Program, weight_ids: dict[tuple[str, ...], int], limits: tuple[int, int, int]) -> Tables:
    """Turns nodes, buffers and RoPE factors into tables; ids are positions in their lists. `limits`: most tokens,
    logits and requests of a step, which buffers are made for."""
    buffer_ids = {b: i for i, b in enumerate(program.buffers)}
    rope_ids: dict[Rope, int] = {}
    for node in program.nodes:
        if isinstance(node, RopeKVWrite) and node.rope is not None:
            rope_ids.setdefault(node.rope, len(rope_ids))
    ropes = [rope_arrays(rope, program.max_model_len) for rope in rope_ids]
    translator = _Translator(buffer_ids, weight_ids, rope_ids)
    nodes = [translator.node(node) for node in program.nodes]
    plan = program.plan_buffers()
    buffers = [
        BufferEntry(slot=slot, logits_rows=int(b.rows is Rows.LOGITS), width=b.width)
        for b, slot in zip(program.buffers, plan.slot_of, strict=True)
    ]
    rope_tables = [
        RopeTable(cos=cos.ctypes.data, sin=sin.ctypes.data, max_positions=len(cos), half=cos.shape[1])
        for cos, sin in ropes
    ]
    layers = [KVLayerEntry(kv.num_kv_heads, kv.head_dim, kv.group, kv.place) for kv in program.kv_layers]
    table = ProgramTable(
        nodes=(Node * len(nodes))(*nodes),
        buffers=(BufferEntry * len(buffers))(*buffers),
        ropes=(RopeTable * len(rope_tables))(*rope_tables),
        kv_layers=(KVLayerEntry * len(layers))(*layers),
        num_nodes=len(nodes),
        num_buffers=len(buffers),
        num_ropes=len(rope_tables),
        num_kv_layers=len(layers),
        num_kv_groups=program.num_kv_groups,
        logits=buffer_ids[program.logits],
        hidden=buffer_ids[program.hidden],
    )
    table.max_num_tokens, table.max_num_logits, table.max_num_requests = limits
    return Tables(table, ropes)


def rope_arrays(rope: Rope, max_positions: int) -> tuple[Float32, Float32]:
    """cos and sin of every position, [max_positions, half] each, in the float32 roundings of the reference."""
    positions = np.arange(max_positions, dtype=np.float32)[:, None]
    angles = positions * np.asarray(rope.inv_freq, dtype=np.float32)
    scale = np.float32(rope.scale)
    return np.cos(angles) * scale, np.sin(angles) * scale


@dataclass(slots=True)
class _Translator:
    """Names to ids, for one program."""

    buffers: dict[Buffer, int]
    weights: dict[tuple[str, ...], int]
    ropes: dict[Rope, int]

    def buffer(self, buffer: Buffer | None) -> int:
        return _ABSENT if buffer is None else self.buffers[buffer]

    def weight(self, weight: Weight | None) -> int:
        return _ABSENT if weight is None else self.weights[weight.parts]

    def entry(self, op: AnyOp, **values: float) -> Node:
        ids = dict.fromkeys(("x", "y", "residual_out", "weight", "bias", "extra", "rope", "shared"), _ABSENT)
        return Node(**(ids | {"op": OP_CODES[type(op).__name__], "out": self.buffer(op.out), "scale": 1.0} | values))

    def node(self, node: AnyOp) -> Node:
        match node:
            case Embedding():
                return self.entry(
                    node,
                    weight=self.weight(node.weight),
                    extra=self.weight(node.position_weight),
                    scale=node.scale,
                    position_offset=node.position_offset,
                )
            case Norm():
                return self.entry(
                    node,
                    x=self.buffer(node.x),
                    y=self.buffer(node.residual),
                    residual_out=self.buffer(node.residual_out),
                    weight=self.weight(node.weight),
                    bias=self.weight(node.bias),
                    layer_norm=int(node.kind == "layer"),
                    eps=node.eps,
                )
            case Add():
                return self.entry(node, x=self.buffer(node.x), y=self.buffer(node.y))
            case Linear():
                return self.entry(
                    node,
                    x=self.buffer(node.x),
                    weight=self.weight(node.weight),
                    bias=self.weight(node.bias),
                    activation=ACTIVATIONS[node.activation],
                    scale=node.scale,
                    softcap=node.softcap,
                )
            case Experts():
                return self._experts(node)
            case RopeKVWrite():
                return self.entry(
                    node,
                    x=self.buffer(node.qkv),
                    weight=self.weight(node.q_norm),
                    extra=self.weight(node.k_norm),
                    rope=_ABSENT if node.rope is None else self.ropes[node.rope],
                    eps=node.eps,
                    **_heads(node),
                )
            case Attention():
                return self.entry(
                    node,
                    x=self.buffer(node.q),
                    window=node.window,
                    scale=node.scale,
                    softcap=node.softcap,
                    **_heads(node),
                )
            case GatherRows():
                return self.entry(node, x=self.buffer(node.x))

    def _experts(self, node: Experts) -> Node:
        return self.entry(
            node,
            x=self.buffer(node.x),
            y=self.buffer(node.scores),
            shared=self.buffer(node.shared),
            weight=self.weight(node.gate_up),
            extra=self.weight(node.down),
            activation=ACTIVATIONS[node.activation],
            num_experts=node.num_experts,
            top_k=node.top_k,
            renormalize=int(node.renormalize),
        )


def _heads(node: RopeKVWrite | Attention) -> dict[str, int]:
    return {
        "kv_layer": node.kv_layer,
        "num_heads": node.num_heads,
        "num_kv_heads": node.num_kv_heads,
        "head_dim": node.head_dim,
    }
