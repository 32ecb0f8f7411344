"""The program as the library reads it: arrays of C structs, built once at load."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from octavo.program.ops import AnyOp, Rope, RopeKVWrite, Rows, Weight
from octavo.program.program import Program
from octavo.runtime.base import Float32
from octavo.runtime.native import library as lib

_ABSENT = -1
_POINTERS = ("x", "y", "residual_out", "weight", "bias", "extra", "rope", "shared")  # of a node; not all ops have all
_SHARED = {  # a node's field: what ops call what goes there, if they do not call it the same
    "x": ("qkv", "q"),
    "y": ("residual", "scores"),
    "weight": ("q_norm", "gate_up"),
    "extra": ("k_norm", "down", "position_weight"),
    "layer_norm": ("kind",),
}
_NODE_FIELD = {name: field for field, names in _SHARED.items() for name in names}


@dataclass(slots=True)
class Tables:
    """The structs, and the RoPE arrays that must live as long as the engine points to them."""

    program: lib.ProgramTable
    ropes: list[tuple[Float32, Float32]] = field(default_factory=list)


def build_tables(program: Program, weight_ids: dict[tuple[str, ...], int], limits: tuple[int, int, int]) -> Tables:
    """Turns nodes, buffers and RoPE factors into tables; ids are positions in their lists. `limits`: most tokens,
    logits and requests of a step, which buffers are made for."""
    buffer_ids = {b: i for i, b in enumerate(program.buffers)}
    used = [node.rope for node in program.nodes if isinstance(node, RopeKVWrite) and node.rope is not None]
    rope_ids = {rope: i for i, rope in enumerate(dict.fromkeys(used))}
    ropes = [rope_arrays(rope, program.max_model_len) for rope in rope_ids]
    ids: dict[Any, int] = {None: _ABSENT, **lib.WORD_CODES, **weight_ids, **buffer_ids, **rope_ids}
    nodes = [_node(node, ids) for node in program.nodes]
    plan = program.plan_buffers()
    buffers = [
        lib.BufferEntry(slot=slot, logits_rows=int(b.rows is Rows.LOGITS), width=b.width)
        for b, slot in zip(program.buffers, plan.slot_of, strict=True)
    ]
    rope_tables = [
        lib.RopeTable(cos=cos.ctypes.data, sin=sin.ctypes.data, max_positions=len(cos), half=cos.shape[1])
        for cos, sin in ropes
    ]
    layers = [lib.KVLayerEntry(kv.num_kv_heads, kv.head_dim, kv.group, kv.place) for kv in program.kv_layers]
    table = lib.ProgramTable(
        nodes=(lib.Node * len(nodes))(*nodes),
        buffers=(lib.BufferEntry * len(buffers))(*buffers),
        ropes=(lib.RopeTable * len(rope_tables))(*rope_tables),
        kv_layers=(lib.KVLayerEntry * len(layers))(*layers),
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


def _node(op: AnyOp, ids: dict[Any, int]) -> lib.Node:
    """The op as the library has it: each field under its own name, or the one that ops share."""
    values: dict[str, Any] = {**dict.fromkeys(_POINTERS, _ABSENT), "scale": 1.0}
    for f in fields(op):
        if f.name != "label":
            value = getattr(op, f.name)
            named = value.parts if isinstance(value, Weight) else value
            values[_NODE_FIELD.get(f.name, f.name)] = ids.get(named, named)  # numbers are themselves
    return lib.Node(op=lib.OP_CODES[type(op).__name__], **values)
