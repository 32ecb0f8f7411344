"""RopeKVWrite in one pass: head norms, rotation, and K and V into their slots of the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.program.ops import RopeKVWrite

if TYPE_CHECKING:  # who only compiles has no torch
    import torch

_LARGEST_E4M3 = tl.constexpr(448.0)


@triton.jit
def _rotated(x, start, cols, norm, cos, sin, at, eps, inside, HAS_NORM: tl.constexpr, HEAD_DIM: tl.constexpr,
             HALF: tl.constexpr):  # fmt: skip
    """The columns of a head, normed and rotated: each is joined with its partner, HALF columns away."""
    partner = tl.where(cols < HALF, cols + HALF, tl.where(cols < 2 * HALF, cols - HALF, cols))
    y = tl.load(x + start + cols, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + start + partner, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(y * y, 1) / HEAD_DIM + eps)[:, None]
        y *= factor * tl.load(norm + cols, mask=cols < HEAD_DIM, other=0.0)
        other *= factor * tl.load(norm + partner, mask=cols < HEAD_DIM, other=0.0)
    if HALF > 0:
        angle = at + cols % HALF
        c = tl.load(cos + angle, mask=cols < 2 * HALF, other=1.0)
        s = tl.load(sin + angle, mask=cols < 2 * HALF, other=0.0)
        y = y * c + tl.where(cols < HALF, -other, other) * s
    return y


@triton.jit
def _kept(x, scale, TYPE: tl.constexpr):
    """x / scale in the type of the cache; 8-bit floats saturate."""
    if TYPE.primitive_bitwidth == 8:
        x = tl.minimum(tl.maximum(x / scale, -_LARGEST_E4M3), _LARGEST_E4M3)
    return x.to(TYPE)


@triton.jit
def _rope_kv_write(qkv, positions, slots, cos, sin, q_norm, k_norm, q, keys, values, eps, k_scale, v_scale,
                   NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
                   BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
                   CHAINED: tl.constexpr):  # fmt: skip
    TOTAL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    Q_PARTS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # heads of q, then of k, then of v
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    row = qkv + token * (TOTAL * HEAD_DIM)
    at = tl.load(positions + token).to(tl.int64) * HALF
    if part < Q_PARTS:
        head += part * BLOCK_HEADS
        inside = (head < NUM_HEADS) & (cols < HEAD_DIM)
        y = _rotated(row, head * HEAD_DIM, cols, q_norm, cos, sin, at, eps, inside, HAS_NORM, HEAD_DIM, HALF)
        tl.store(q + token * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + cols, y.to(q.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        offset = (slot // BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + (slot % BLOCK_SIZE) * HEAD_DIM
        head += (part - Q_PARTS) % KV_PARTS * BLOCK_HEADS
        inside = (head < NUM_KV_HEADS) & (cols < HEAD_DIM)
        start = (NUM_HEADS + head) * HEAD_DIM
        to = offset + head * (BLOCK_SIZE * HEAD_DIM) + cols
        if part < Q_PARTS + KV_PARTS:
            y = _rotated(row, start, cols, k_norm, cos, sin, at, eps, inside, HAS_NORM, HEAD_DIM, HALF)
            tl.store(keys + to, _kept(y, k_scale, keys.dtype.element_ty), mask=inside)
        else:
            y = tl.load(row + NUM_KV_HEADS * HEAD_DIM + start + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(values + to, _kept(y, v_scale, values.dtype.element_ty), mask=inside)


def rope_kv_write(
    num_tokens: int,
    node: RopeKVWrite,
    qkv: torch.Tensor,  # [T, (H + 2 G) * D]
    positions: torch.Tensor,  # int32 [T]
    slots: torch.Tensor,  # int32 [T]
    table: tuple[torch.Tensor, torch.Tensor] | None,  # cos and sin, float32 [max positions, half]
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # of q and k, float32 [D]
    q: torch.Tensor,  # out: [T, H * D]
    keys: torch.Tensor,  # [blocks, G, block_size, D]
    values: torch.Tensor,
    *,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    chained: bool = False,
) -> None:
    """Norms and rotates the heads of q and k, returns q, and writes k and v into the cache.

    A cache of 8-bit floats keeps k / kv_scales[0] and v / kv_scales[1].
    """
    half = 0 if table is None else table[0].shape[1]
    block_heads = min(triton.next_power_of_2(node.num_kv_heads), 4 if num_tokens < 128 else 8)
    cos, sin = (qkv, qkv) if table is None else table
    q_norm, k_norm = (qkv, qkv) if norms is None else norms
    parts = triton.cdiv(node.num_heads, block_heads) + 2 * triton.cdiv(node.num_kv_heads, block_heads)
    _rope_kv_write[(num_tokens, parts)](
        qkv, positions, slots, cos, sin, q_norm, k_norm, q, keys, values, node.eps, *kv_scales,
        NUM_HEADS=node.num_heads, NUM_KV_HEADS=node.num_kv_heads, HEAD_DIM=node.head_dim, HALF=half,
        BLOCK_SIZE=keys.shape[2], HAS_NORM=norms is not None, BLOCK_HEADS=block_heads,
        BLOCK_D=triton.next_power_of_2(node.head_dim), CHAINED=chained,
        num_warps=4 if block_heads >= 8 else 2, launch_pdl=chained,
    )  # fmt: skip
