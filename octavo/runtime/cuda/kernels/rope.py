"""RopeKVWrite in one pass: head norms, rotation, and K and V into their slots of the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.program.ops import RopeKVWrite


@triton.jit
def _scatter(values, cols, head, token, offset, q, keys, values_out, inside, NUM_HEADS: tl.constexpr,
             NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Writes columns of heads [H | G | G] where each belongs: q rows, K slots, V slots."""
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    q_at = token * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + cols
    tl.store(q + q_at, values.to(q.dtype.element_ty), mask=inside & is_q[:, None])
    k_at = offset + (head - NUM_HEADS)[:, None] * (BLOCK_SIZE * HEAD_DIM) + cols
    tl.store(keys + k_at, values.to(keys.dtype.element_ty), mask=inside & is_k[:, None])
    v_at = offset + (head - NUM_HEADS - NUM_KV_HEADS)[:, None] * (BLOCK_SIZE * HEAD_DIM) + cols
    tl.store(values_out + v_at, values.to(values_out.dtype.element_ty), mask=inside & is_v[:, None])


@triton.jit
def _rope_kv_write(qkv, positions, slots, cos, sin, q_norm, k_norm, q, keys, values, eps, NUM_HEADS: tl.constexpr,
                   NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                   HAS_NORM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
                   BLOCK_REST: tl.constexpr):  # fmt: skip
    TOTAL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    slot = tl.load(slots + token).to(tl.int64)
    offset = (slot // BLOCK_SIZE) * (NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + (slot % BLOCK_SIZE) * HEAD_DIM
    source = qkv + token * (TOTAL * HEAD_DIM) + head[:, None] * HEAD_DIM
    i = tl.arange(0, BLOCK_HALF)[None, :]
    r = tl.arange(0, BLOCK_REST)[None, :]
    rotated = (head < TOTAL)[:, None] & (i < HALF)
    passed = (head < TOTAL)[:, None] & (r < REST)
    first = tl.load(source + i, mask=rotated, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + i, mask=rotated, other=0.0).to(tl.float32)
    rest = tl.load(source + 2 * HALF + r, mask=passed, other=0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first + second * second, 1) + tl.sum(rest * rest, 1)
        factor = tl.where(is_v, 1.0, tl.rsqrt(square / HEAD_DIM + eps))[:, None]
        norm = tl.where((head < NUM_HEADS)[:, None], q_norm + i * 0, k_norm + i * 0)
        plain = is_v[:, None]
        first *= tl.where(plain, 1.0, factor * tl.load(norm + i, mask=i < HALF, other=0.0))
        second *= tl.where(plain, 1.0, factor * tl.load(norm + HALF + i, mask=i < HALF, other=0.0))
        tail = tl.where((head < NUM_HEADS)[:, None], q_norm + r * 0, k_norm + r * 0)
        rest *= tl.where(plain, 1.0, factor * tl.load(tail + 2 * HALF + r, mask=r < REST, other=0.0))
    if HALF > 0:
        at = tl.load(positions + token).to(tl.int64) * HALF
        c = tl.where(is_v[:, None], 1.0, tl.load(cos + at + i, mask=i < HALF, other=0.0))
        s = tl.where(is_v[:, None], 0.0, tl.load(sin + at + i, mask=i < HALF, other=0.0))
        _scatter(first * c - second * s, i, head, token, offset, q, keys, values, rotated, NUM_HEADS, NUM_KV_HEADS,
                 HEAD_DIM, BLOCK_SIZE)  # fmt: skip
        _scatter(second * c + first * s, HALF + i, head, token, offset, q, keys, values, rotated, NUM_HEADS,
                 NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)  # fmt: skip
    if REST > 0:
        _scatter(rest, 2 * HALF + r, head, token, offset, q, keys, values, passed, NUM_HEADS, NUM_KV_HEADS,
                 HEAD_DIM, BLOCK_SIZE)  # fmt: skip


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
) -> None:
    """Norms and rotates the heads of q and k, returns q, and writes k and v into the cache."""
    half = 0 if table is None else table[0].shape[1]
    total = node.num_heads + 2 * node.num_kv_heads
    block_heads = min(triton.next_power_of_2(total), 4 if num_tokens < 128 else 16)
    cos, sin = (qkv, qkv) if table is None else table
    q_norm, k_norm = (qkv, qkv) if norms is None else norms
    _rope_kv_write[(num_tokens, triton.cdiv(total, block_heads))](
        qkv, positions, slots, cos, sin, q_norm, k_norm, q, keys, values, node.eps,
        NUM_HEADS=node.num_heads, NUM_KV_HEADS=node.num_kv_heads, HEAD_DIM=node.head_dim, HALF=half,
        BLOCK_SIZE=keys.shape[2], HAS_NORM=norms is not None, BLOCK_HEADS=block_heads,
        BLOCK_HALF=triton.next_power_of_2(max(half, 1)),
        BLOCK_REST=triton.next_power_of_2(max(node.head_dim - 2 * half, 1)),
        num_warps=4 if block_heads >= 16 else 2,
    )  # fmt: skip
