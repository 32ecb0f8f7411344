"""Matrix products for few rows, where time is the reading of the weights: one pass over them, everything fused.

One to four rows multiply on the CUDA cores (the weights are read once for all rows); five to sixteen use the tensor
cores, padded to sixteen. More rows are cuBLAS's. The bias, the activation and the soft-cap happen before the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.program.ops import Activation
from octavo.runtime.cuda.kernels.rows import ACTIVATION_CODES, activated, softcapped

MAX_VECTOR_ROWS = 4
MAX_FEW_ROWS = 16
MIN_PROGRAMS = 128  # fewer cannot keep a large card's memory busy: cuBLAS splits the inner dimension instead


@triton.jit
def _finish(y, up, bias, cols, num_out, scale, softcap, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
            HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    y *= scale
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=cols < num_out, other=0.0)
    y = activated(y, ACTIVATION)
    if GATED:
        up *= scale
        if HAS_BIAS:
            up += tl.load(bias + num_out + cols, mask=cols < num_out, other=0.0)
        y *= up
    if HAS_SOFTCAP:
        y = softcapped(y, softcap)
    return y


@triton.jit
def _vector(x, weight, bias, out, num_rows, num_out, num_in, scale, softcap, ACTIVATION: tl.constexpr,
            GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_out
    rows = tl.arange(0, ROWS)
    present = rows < num_rows
    at = n.to(tl.int64)[:, None] * num_in
    y = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < num_in)[None, :]
        values = tl.load(
            x + rows[:, None] * num_in + k[None, :], mask=present[:, None] & (k < num_in)[None, :], other=0.0
        )
        values = values.to(tl.float32)[:, None, :]  # [ROWS, 1, BLOCK_K]
        w = tl.load(weight + at + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        y += tl.sum(values * w.to(tl.float32)[None, :, :], 2)
        if GATED:
            second = weight + num_out.to(tl.int64) * num_in
            w = tl.load(second + at + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            up += tl.sum(values * w.to(tl.float32)[None, :, :], 2)
    y = _finish(y, up, bias, n[None, :], num_out, scale, softcap, ACTIVATION, GATED, HAS_BIAS, HAS_SOFTCAP)
    keep = present[:, None] & inside[None, :]
    tl.store(out + rows[:, None] * num_out + n[None, :], y.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_rows"])
def _few(x, weight, bias, out, num_rows, num_out, num_in, scale, softcap, ACTIVATION: tl.constexpr,
         GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_K: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_out
    rows = tl.arange(0, 16)
    present = rows < num_rows
    at = n.to(tl.int64)[:, None] * num_in
    y = tl.zeros([BLOCK_N, 16], tl.float32)
    up = tl.zeros([BLOCK_N, 16], tl.float32)
    for start in range(0, num_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < num_in)[None, :]
        values = tl.load(  # [BLOCK_K, 16]
            x + rows[None, :] * num_in + k[:, None], mask=present[None, :] & (k < num_in)[:, None], other=0.0
        )
        w = tl.load(weight + at + k[None, :], mask=mask, other=0.0)
        y += tl.dot(w, values, input_precision="ieee")
        if GATED:
            w = tl.load(weight + num_out.to(tl.int64) * num_in + at + k[None, :], mask=mask, other=0.0)
            up += tl.dot(w, values, input_precision="ieee")
    y = _finish(y, up, bias, n[:, None], num_out, scale, softcap, ACTIVATION, GATED, HAS_BIAS, HAS_SOFTCAP)
    keep = inside[:, None] & present[None, :]
    tl.store(out + rows[None, :] * num_out + n[:, None], y.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `rows` outputs, the inner dimension in steps of `cols`, with so many warps."""

    rows: int
    cols: int
    warps: int


def vector_tile(num_out: int, num_in: int, num_rows: int, *, gated: bool) -> Tile:
    """The tile for one to four rows: wide steps; more warps a program where there are few programs.

    Measured on an H200 in bfloat16 at one row (TB/s of 4.37): 12288x4096 3.92 and 22016x4096 4.16 with (2, 2048, 2),
    4096x11008 3.84 with (1, 512, 2), 4096x4096 3.17 with (2, 2048, 2), 1024x3072 1.60 with (1, 1024, 8),
    1024x2048 1.30 with (2, 2048, 8), 32000x4096 4.26 with (2, 2048, 2).
    """
    cols = min(triton.next_power_of_2(num_in), 2048)
    if num_out <= 2048:
        return Tile(1, min(cols, 1024), 8)
    if num_rows > 1:
        return Tile(1, min(cols, 2048 // num_rows), 2)
    if num_in > 2 * num_out:
        return Tile(1, min(cols, 512), 2)
    return Tile(1 if gated else 2, cols, 2)


def few_tile(num_in: int, item_bytes: int) -> Tile:
    """The tile for five to sixteen rows."""
    return Tile(16, min(max(triton.next_power_of_2(num_in), 16), 512 // item_bytes), 4)


def can_be_few(num_rows: int, num_out: int) -> bool:
    """True where these kernels beat cuBLAS: few rows, and outputs enough to fill the card."""
    return num_rows <= MAX_VECTOR_ROWS or (num_rows <= MAX_FEW_ROWS and num_out >= 16 * MIN_PROGRAMS)


def few_rows(
    num_rows: int,
    x: torch.Tensor,  # [>= num_rows, in]
    weight: torch.Tensor,  # [out or 2 * out, in]
    bias: torch.Tensor | None,  # float32
    out: torch.Tensor,  # [>= num_rows, out]
    *,
    activation: Activation,
    scale: float,
    softcap: float,
) -> None:
    """out = softcap(act(x @ weight.T * scale + bias)) for one to sixteen rows."""
    num_out, num_in = out.shape[1], weight.shape[1]
    gated = activation.endswith("_mul")
    options = {
        "ACTIVATION": ACTIVATION_CODES[activation],
        "GATED": gated,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap > 0,
    }
    bias = x if bias is None else bias
    if num_rows <= MAX_VECTOR_ROWS:
        rows = triton.next_power_of_2(num_rows)
        tile = vector_tile(num_out, num_in, rows, gated=gated)
        _vector[(triton.cdiv(num_out, tile.rows),)](
            x, weight, bias, out, num_rows, num_out, num_in, scale, softcap, **options,
            ROWS=rows, BLOCK_N=tile.rows, BLOCK_K=tile.cols, num_warps=tile.warps,
        )  # fmt: skip
        return
    tile = few_tile(num_in, x.element_size())
    _few[(triton.cdiv(num_out, tile.rows),)](
        x, weight, bias, out, num_rows, num_out, num_in, scale, softcap, **options,
        BLOCK_N=tile.rows, BLOCK_K=tile.cols, num_warps=tile.warps, num_stages=4,
    )  # fmt: skip
