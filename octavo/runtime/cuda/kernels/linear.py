"""Matrix products for one or two rows, where time is the reading of the weights: one pass over them, all else fused.

The weights are read once for all rows and multiplied on the CUDA cores. The norm in front, the bias, the activation,
the soft-cap and the residual sum happen in the same pass. At four rows the multiply-adds of this kernel take longer
than the weights: more are multiplied on the tensor cores, by cpp/streamed.cu or cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.program.ops import Activation
from octavo.runtime.cuda.kernels.rows import ACTIVATION_CODES, finished

if TYPE_CHECKING:  # who only compiles has no torch
    import torch

MAX_FEW_ROWS = 2


@triton.jit
def _weights(pointer, inside, k, num_in):
    """A tile of the weights, each of which is read once."""
    return tl.load(pointer, mask=inside & (k < num_in), other=0.0, eviction_policy="evict_first")


@triton.jit
def _folded(x, FOLD: tl.constexpr):
    """[R, N, K] -> [R, N, K / FOLD]: sums of what a thread holds side by side."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // FOLD, FOLD]), 3)


@triton.jit
def _summed(x, WARPS: tl.constexpr):
    """[R, N, K] -> [R, N]. Warps are joined first, by lanes that hold a number each: of a sum over lanes all hold the
    same, and Triton has all of them write it to one word of shared memory."""
    if WARPS > 1 and x.shape[2] % (32 * WARPS) == 0:
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // (32 * WARPS), WARPS, 32]), 2)
        x = tl.sum(x, 2)
    return tl.sum(x, 2)


@triton.jit
def _vector(x, weight, bias, norm_weight, residual, out, num_out, num_in, scale, softcap, eps,
            ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
            HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, FOLD: tl.constexpr, WARPS: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < num_out)[None, :, None]
    k = tl.arange(0, BLOCK_K)[None, None, :]  # all tiles have three dimensions, [ROWS, BLOCK_N, BLOCK_K], and so one
    x_at = x + rows[:, None, None] * num_in  # layout: else Triton moves each through shared memory to join them
    first = weight + n.to(tl.int64)[None, :, None] * num_in + k
    second = first + num_out.to(tl.int64) * num_in
    w = _weights(first, inside, k, num_in)  # weights never change: they are on their way before the wait
    if GATED:
        w_up = _weights(second, inside, k, num_in)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros([ROWS, BLOCK_N, BLOCK_K // FOLD], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N, BLOCK_K // FOLD], tl.float32)
    squares = tl.zeros([ROWS, 1, BLOCK_K // FOLD], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        now = start + k
        first += BLOCK_K
        second += BLOCK_K
        w_next = _weights(first, inside, now + BLOCK_K, num_in)
        if GATED:
            w_up_next = _weights(second, inside, now + BLOCK_K, num_in)
        values = tl.load(x_at + now, mask=now < num_in, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += _folded(values * values, FOLD)
            norm_at = tl.broadcast_to(norm_weight + now, values.shape)
            values *= tl.load(norm_at, mask=now < num_in, other=0.0)
        y += _folded(values * w.to(tl.float32), FOLD)
        w = w_next
        if GATED:
            up += _folded(values * w_up.to(tl.float32), FOLD)
            w_up = w_up_next
    if HAS_NORM:
        factor = tl.rsqrt(_summed(tl.broadcast_to(squares, y.shape), WARPS) / num_in + eps)
    y = _summed(y, WARPS)
    if GATED:
        up = _summed(up, WARPS)
    if HAS_NORM:
        y *= factor
        if GATED:
            up *= factor
    y = finished(y, up, bias, n[None, :], num_out, scale, softcap, ACTIVATION, GATED, HAS_BIAS, HAS_SOFTCAP)
    at = rows[:, None] * num_out + n[None, :]
    keep = (n < num_out)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):  # one by one: a number is stored by one thread, a tensor is dealt out to lanes
        for col in tl.static_range(BLOCK_N):
            is_it = (rows == row)[:, None] & (tl.arange(0, BLOCK_N) == col)[None, :]
            number = tl.sum(tl.sum(tl.where(is_it, y, 0.0), 1), 0)
            to = tl.program_id(0) * BLOCK_N + col
            tl.store(out + row * num_out + to, number.to(out.dtype.element_ty), mask=to < num_out)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `rows` outputs, the inner dimension in steps of `cols`, with so many warps."""

    rows: int
    cols: int
    warps: int


def tile_of(num_rows: int, num_out: int, num_in: int, *, gated: bool) -> Tile:
    """The tile by shape: one output and several warps a program where outputs are few or deep, else outputs and a warp.

    Swept over the shapes of 0.6B, 1B, 7B and 8B models (docs/kernels.md). No thread is without a column.
    """
    depth = triton.next_power_of_2(num_in)
    if gated:
        cols = min(depth, 4096 if num_rows == 1 else 512)
        return Tile(2, cols, max(cols // 1024, 1))
    if num_rows == 1 and num_out <= max(num_in, 2048):
        return Tile(1, 1024, 4) if depth > 2048 else Tile(1, depth, min(2, max(depth // 32, 1)))
    if num_rows == 2 and num_out <= 2048 < depth:
        return Tile(2, 4096 if depth == 4096 else 2048, 4)
    return Tile(4 // num_rows, min(depth, 1024), 1)


@dataclass(frozen=True, slots=True)
class Fused:
    """What a product of few rows takes over from its neighbours."""

    norm_weight: torch.Tensor | None = None  # float32 [in]: x is RMS-normed first
    eps: float = 0.0
    residual: torch.Tensor | None = None  # [>= num_rows, out], added last; may be the memory of `out`


PLAIN = Fused()


def few_rows(
    num_rows: int,
    x: torch.Tensor,  # [>= num_rows, in]
    weight: torch.Tensor,  # [out or 2 * out, in]
    bias: torch.Tensor | None,  # float32
    out: torch.Tensor,  # [>= num_rows, out]
    *,
    activation: Activation = "none", scale: float = 1.0, softcap: float = 0.0, fused: Fused = PLAIN,
    chained: bool = False, tile: Tile | None = None,
) -> None:  # fmt: skip
    """out = softcap(act(norm(x) @ weight.T * scale + bias)) + residual for one or two rows.

    `chained`: may start before the kernel in front of it has ended; it reads its weights, which nobody writes, first.
    """
    num_out, num_in = out.shape[1], weight.shape[1]
    gated = activation.endswith("_mul")
    has_bias = bias is not None
    bias = x if bias is None else bias
    tile = tile or tile_of(num_rows, num_out, num_in, gated=gated)
    norm_weight = x if fused.norm_weight is None else fused.norm_weight
    residual = x if fused.residual is None else fused.residual
    _vector[(triton.cdiv(num_out, tile.rows),)](
        x, weight, bias, norm_weight, residual, out, num_out, num_in, scale, softcap, fused.eps,
        ACTIVATION=ACTIVATION_CODES[activation], GATED=gated, HAS_BIAS=has_bias, HAS_SOFTCAP=softcap > 0,
        HAS_NORM=fused.norm_weight is not None, HAS_RESIDUAL=fused.residual is not None,
        ROWS=num_rows, BLOCK_N=tile.rows, BLOCK_K=tile.cols, FOLD=max(min(tile.cols // (32 * tile.warps), 8), 1),
        WARPS=tile.warps, CHAINED=chained, num_warps=tile.warps, launch_pdl=chained,
    )  # fmt: skip
