"""Ops that treat each row by itself: embedding, norms, sums, gathers, and what follows a matrix product.

All of them read and write in the storage type and compute in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.program.ops import Activation

if TYPE_CHECKING:  # who only compiles has no torch
    import torch

ACTIVATION_CODES: dict[Activation, int] = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu_mul": 4, "gelu_tanh_mul": 5,
}  # fmt: skip
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))


@triton.jit
def tanh(x):
    """tanh in float32 from one exponential that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def softcapped(x, cap):
    """cap * tanh(x / cap)."""
    return cap * tanh(x / cap)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation with this code; for the gated ones, that of the gate."""
    if ACTIVATION == 1:
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == 3 or ACTIVATION == 5:
        x = 0.5 * x * (1.0 + tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 4:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def finished(y, up, bias, cols, num_out, scale, softcap, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
             HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """What follows a product: softcap(act(y * scale + bias)), of the gated ones times up * scale + its bias."""
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
def _embedding(ids, row_tokens, positions, table, position_table, out, scale, offset, width, HAS_TABLE: tl.constexpr,
               HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.zeros([BLOCK], tl.float32)
    if HAS_TABLE:
        token = tl.load(ids + row)
        if token < 0:
            token = tl.load(row_tokens - 1 - token)
        at = token.to(tl.int64) * width
        x += tl.load(table + at + cols, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_POSITIONS:
        at = (tl.load(positions + row) + offset).to(tl.int64) * width
        x += tl.load(position_table + at + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + cols, x.to(out.dtype.element_ty), mask=inside)


def embedding(
    num_rows: int,
    ids: torch.Tensor,  # int32 [T]; -1 - row: row_tokens[row]
    row_tokens: torch.Tensor,  # int32
    positions: torch.Tensor,  # int32 [T]
    table: torch.Tensor | None,  # [vocab, width]
    position_table: torch.Tensor | None,  # [max positions, width]
    out: torch.Tensor,  # [>= num_rows, width]
    scale: float,
    offset: int,
) -> None:
    """out[t] = table[ids[t]] * scale + position_table[positions[t] + offset]; either term may be absent."""
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    absent = out if table is None else table
    _embedding[(num_rows, triton.cdiv(width, block))](
        ids, row_tokens, positions, absent, absent if position_table is None else position_table, out, scale, offset,
        width, HAS_TABLE=table is not None, HAS_POSITIONS=position_table is not None, BLOCK=block,
    )  # fmt: skip


@triton.jit
def _norm(x, residual, weight, bias, out, residual_out, eps, width, LAYER: tl.constexpr, HAS_BIAS: tl.constexpr,
          HAS_RESIDUAL: tl.constexpr, KEEPS_SUM: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    s = tl.load(x + start + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual + start + cols, mask=inside, other=0.0).to(tl.float32)
    if KEEPS_SUM:
        tl.store(residual_out + start + cols, s.to(residual_out.dtype.element_ty), mask=inside)
    if LAYER:
        s = tl.where(inside, s - tl.sum(s, 0) / width, 0.0)
    y = s * tl.rsqrt(tl.sum(s * s, 0) / width + eps)
    y *= tl.load(weight + cols, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=inside, other=0.0)
    tl.store(out + start + cols, y.to(out.dtype.element_ty), mask=inside)


def norm(
    num_rows: int,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,  # float32 [width]
    bias: torch.Tensor | None,  # float32 [width]
    out: torch.Tensor,
    residual_out: torch.Tensor | None,  # may be the memory of `residual`
    *, eps: float, is_layer: bool, chained: bool = False,
) -> None:  # fmt: skip
    """RMS or layer norm of x (+ residual), the sum kept in `residual_out`; one pass over the row."""
    width = out.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(num_rows,)](
        x, x if residual is None else residual, weight, weight if bias is None else bias, out,
        out if residual_out is None else residual_out, eps, width, LAYER=is_layer, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, KEEPS_SUM=residual_out is not None, BLOCK=block,
        CHAINED=chained, num_warps=min(max(block // 512, 1), 16), launch_pdl=chained,
    )  # fmt: skip


@triton.jit
def _add(x, y, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def add(num_rows: int, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """out = x + y."""
    size = num_rows * out.shape[1]
    _add[(triton.cdiv(size, 1024),)](x, y, out, size, BLOCK=1024)


@triton.jit
def _gather(x, indices, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    at = tl.load(indices + row).to(tl.int64) * width
    tl.store(out + row.to(tl.int64) * width + cols, tl.load(x + at + cols, mask=inside), mask=inside)


def gather(num_rows: int, x: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    """out[r] = x[indices[r]]."""
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    _gather[(num_rows, triton.cdiv(width, block))](x, indices, out, width, BLOCK=block)


@triton.jit
def _epilogue(x, bias, out, scale, softcap, width, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
              HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
              CHAINED: tl.constexpr):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    source = x + row * width * (2 if GATED else 1)
    y = tl.load(source + cols, mask=inside, other=0.0).to(tl.float32)
    up = y
    if GATED:
        up = tl.load(source + width + cols, mask=inside, other=0.0).to(tl.float32)
    y = finished(y, up, bias, cols, width, scale, softcap, ACTIVATION, GATED, HAS_BIAS, HAS_SOFTCAP)
    tl.store(out + row * width + cols, y.to(out.dtype.element_ty), mask=inside)


def epilogue(
    num_rows: int,
    product: torch.Tensor,  # [num_rows, width or 2 * width]
    bias: torch.Tensor | None,  # float32
    out: torch.Tensor,  # [>= num_rows, width]; may be `product` unless gated
    *, activation: Activation, scale: float, softcap: float, chained: bool = False,
) -> None:  # fmt: skip
    """out = softcap(act(product * scale + bias)); the gated activations halve the width."""
    width = out.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    _epilogue[(num_rows, triton.cdiv(width, block))](
        product, product if bias is None else bias, out, scale, softcap, width,
        ACTIVATION=ACTIVATION_CODES[activation], GATED=activation.endswith("_mul"), HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap > 0, BLOCK=block, CHAINED=chained, launch_pdl=chained,
    )  # fmt: skip
