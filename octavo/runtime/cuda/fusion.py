"""What the products beside it take over: RMS norms and residual sums in steps of few rows, heads in steps of many.

In a step of few rows a kernel's time is mostly that it starts and waits for the one in front of it: fewer are faster.
In product -> (residual + norm) -> product, the first product adds the residual to what it stores, in the residual's
place, and the second norms what it reads: the norm's factor is one number a row, which is as well applied to the sums.
In a step of many rows the product of q, k and v norms and rotates them while they are in registers: what it would
store and another kernel read again are more bytes than everything else that it touches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from octavo.program.ops import AnyOp, Attention, Buffer, Linear, Norm, RopeKVWrite
from octavo.program.program import Program


@dataclass(frozen=True, slots=True)
class Fusion:
    """What is taken over. A norm whose product is found here is not run by itself in a step of few rows.

    `heads_of`: in a step of many rows the product may norm and rotate its heads; what reads q then finds it elsewhere,
    since q may have the memory that the product reads.
    """

    norm_of: dict[Linear, Norm] = field(default_factory=dict)  # what a product does to its input
    residual_of: dict[Linear, Buffer] = field(default_factory=dict)  # where a product adds its output, and stores it
    heads_of: dict[Linear, RopeKVWrite] = field(default_factory=dict)


def find_fusion(program: Program) -> Fusion:
    """The norms that can go: neighbours of their products, read by one alone, with the residual sum in place."""
    plan = program.plan_buffers()
    slots = dict(zip(program.buffers, plan.slot_of, strict=True))
    num_readers = Counter(buffer for node in program.nodes for buffer in node.inputs)
    fusion = Fusion()
    for before, norm, product in zip(program.nodes, program.nodes[1:], program.nodes[2:], strict=False):
        if not isinstance(norm, Norm) or not isinstance(product, Linear) or not _can_go(program, norm, product):
            continue
        if num_readers[norm.out] > 1:
            continue
        if norm.residual is None:
            if norm.residual_out is None and slots[norm.x] != slots[product.out]:
                fusion.norm_of[product] = norm
        elif _can_add(before, norm) and num_readers[norm.x] == 1 and _is_in_place(norm, product, slots):
            assert isinstance(before, Linear)
            fusion.norm_of[product] = norm
            fusion.residual_of[before] = norm.residual
    for product, heads, attention in zip(program.nodes, program.nodes[1:], program.nodes[2:], strict=False):
        if isinstance(product, Linear) and isinstance(heads, RopeKVWrite) and isinstance(attention, Attention):
            is_alone = num_readers[product.out] == num_readers[heads.out] == 1
            if is_alone and product.out is heads.qkv and heads.out is attention.q and _can_turn(product, heads):
                fusion.heads_of[product] = heads
    return fusion


def _can_turn(product: Linear, heads: RopeKVWrite) -> bool:
    """Whether the kernel for it knows these heads: all of each rotated, both of q and k normed or neither."""
    is_whole = heads.rope is not None and 2 * len(heads.rope.inv_freq) == heads.head_dim
    is_plain = product.activation == "none" and (heads.q_norm is None) == (heads.k_norm is None)
    return is_whole and is_plain and heads.head_dim in (64, 128)


def _can_go(program: Program, norm: Norm, product: Linear) -> bool:
    return norm.kind == "rms" and norm.bias is None and product.x is norm.out and norm.out is not program.hidden


def _can_add(before: AnyOp, norm: Norm) -> bool:
    is_plain = isinstance(before, Linear) and before.activation == "none"
    return is_plain and norm.x in before.outputs and norm.x is not norm.residual


def _is_in_place(norm: Norm, product: Linear, slots: dict[Buffer, int]) -> bool:
    if norm.residual is None or norm.residual_out is None:
        return False
    return slots[norm.residual] == slots[norm.residual_out] != slots[product.out]
