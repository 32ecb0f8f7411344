"""Matrix products for one or two rows, where time is the reading of the weights: one pass over them, all else fused.

The weights are read once for all rows and multiplied on the CUDA cores. The norm in front, the bias, the activation,
the soft-cap and the residual sum happen in the same pass. More rows are cuBLAS's: at four, the multiply-adds of this
kernel take longer than the weights, and one of ours on the tensor cores was no faster (docs/kernels.md).
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
    return tl.load(pointer, mask=inside[:, None] & (k < num_in)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_rows"])
def _vector(x, weight, bias, norm_weight, residual, out, num_rows, num_out, num_in, scale, softcap, eps,
            ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
            HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_out
    rows = tl.arange(0, ROWS)
    present = rows < num_rows
    k = tl.arange(0, BLOCK_K)
    first = weight + n.to(tl.int64)[:, None] * num_in + k[None, :]
    second = first + num_out.to(tl.int64) * num_in
    w = _weights(first, inside, k, num_in)  # weights never change: they are on their way before the wait
    if GATED:
        w_up = _weights(second, inside, k, num_in)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        first += BLOCK_K
        second += BLOCK_K
        w_next = _weights(first, inside, k + BLOCK_K, num_in)
        if GATED:
            w_up_next = _weights(second, inside, k + BLOCK_K, num_in)
        values = tl.load(
            x + rows[:, None] * num_in + k[None, :], mask=present[:, None] & (k < num_in)[None, :], other=0.0
        ).to(tl.float32)  # [ROWS, BLOCK_K]
        if HAS_NORM:
            squares += tl.sum(values * values, 1)
            values *= tl.load(norm_weight + k, mask=k < num_in, other=0.0)[None, :]
        y += tl.sum(values[:, None, :] * w.to(tl.float32)[None, :, :], 2)
        w = w_next
        if GATED:
            up += tl.sum(values[:, None, :] * w_up.to(tl.float32)[None, :, :], 2)
            w_up = w_up_next
    if HAS_NORM:
        factor = tl.rsqrt(squares / num_in + eps)[:, None]
        y *= factor
        up *= factor
    y = finished(y, up, bias, n[None, :], num_out, scale, softcap, ACTIVATION, GATED, HAS_BIAS, HAS_SOFTCAP)
    at = rows[:, None] * num_out + n[None, :]
    keep = present[:, None] & inside[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `rows` outputs, the inner dimension in steps of `cols`, with so many warps."""

    rows: int
    cols: int
    warps: int


def tile_of(num_out: int, num_in: int, *, gated: bool) -> Tile:
    """The tile by shape: narrow outputs take the whole depth at once with four warps, wide ones a warp a program.

    Swept over the shapes of 0.6B, 7B and 8B models (lab/results/gpu-tiles-h100.json). No thread is without a column.
    """
    depth = triton.next_power_of_2(num_in)
    if num_out <= 2048:
        return Tile(2, min(depth, 4096), min(4, max(depth // 32, 1)))
    if gated and num_in > 2048:
        return Tile(1, min(depth, 1024), 1)
    return Tile(2, min(depth, 512 if gated else 1024), 1)


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
    activation: Activation = "none",
    scale: float = 1.0,
    softcap: float = 0.0,
    fused: Fused = PLAIN,
    chained: bool = False,
    tile: Tile | None = None,
) -> None:
    """out = softcap(act(norm(x) @ weight.T * scale + bias)) + residual for one or two rows.

    `chained`: may start before the kernel in front of it has ended; it reads its weights, which nobody writes, first.
    """
    num_out, num_in = out.shape[1], weight.shape[1]
    gated = activation.endswith("_mul")
    has_bias = bias is not None
    bias = x if bias is None else bias
    rows = triton.next_power_of_2(num_rows)
    tile = tile or tile_of(num_out, num_in, gated=gated)
    norm_weight = x if fused.norm_weight is None else fused.norm_weight
    residual = x if fused.residual is None else fused.residual
    _vector[(triton.cdiv(num_out, tile.rows),)](
        x, weight, bias, norm_weight, residual, out, num_rows, num_out, num_in, scale, softcap, fused.eps,
        ACTIVATION=ACTIVATION_CODES[activation], GATED=gated, HAS_BIAS=has_bias, HAS_SOFTCAP=softcap > 0,
        HAS_NORM=fused.norm_weight is not None, HAS_RESIDUAL=fused.residual is not None, ROWS=rows,
        BLOCK_N=tile.rows, BLOCK_K=tile.cols, CHAINED=chained, num_warps=tile.warps, launch_pdl=chained,
    )  # fmt: skip
