"""What each op of program/ops.py computes, as a function of arrays. All float32 unless a comment says otherwise.

T tokens, B requests, H query heads, G KV heads, D values a head. `positions` are absolute within a request.
"""

import math

import numpy as np
import numpy.typing as npt

from octavo.program.ops import Activation, Rope
from octavo.runtime.base import Float32, Int32, Int64, StepInputs
from octavo.runtime.bfloat16 import round_to_bfloat16

_erf = np.frompyfunc(math.erf, 1, 1)  # numpy has none; slow and exact is right here


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    out: Float32 = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return out


def layer_norm(x: Float32, weight: Float32, bias: Float32 | None, eps: float) -> Float32:
    """(x - mean) / sqrt(variance + eps) * weight (+ bias), biased variance, over the last axis."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(np.square(centred), axis=-1, keepdims=True)
    out: Float32 = centred / np.sqrt(variance + np.float32(eps)) * weight
    return out if bias is None else out + bias


def scale_and_bias(product: Float32, bias: Float32 | None, scale: float) -> Float32:
    """product * scale (+ bias), over the last axis."""
    out = product if scale == 1.0 else product * np.float32(scale)
    return out if bias is None else out + bias


def activate(x: Float32, activation: Activation) -> Float32:
    """The activation of a Linear; the gated ones halve the width: act(x[:, :half]) * x[:, half:]."""
    match activation:
        case "none":
            return x
        case "relu":
            return np.maximum(x, 0)
        case "gelu":
            return gelu(x)
        case "gelu_tanh":
            return gelu_tanh(x)
        case "silu_mul":
            gate, up = np.split(x, 2, axis=-1)
            return silu(gate) * up
        case "gelu_tanh_mul":
            gate, up = np.split(x, 2, axis=-1)
            return gelu_tanh(gate) * up


def route(scores: Float32, top_k: int, renormalize: bool) -> Float32:
    """The share of each expert in each row's sum, [rows, experts]: zero but for the `top_k` largest scores."""
    chosen = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]  # of equal ones the first
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = np.zeros_like(scores)
    np.put_along_axis(shares, chosen, np.take_along_axis(weights, chosen, axis=-1), axis=-1)
    out: Float32 = shares / (shares if renormalize else weights).sum(axis=-1, keepdims=True)
    return out


def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x)), as (1 + tanh(x / 2)) / 2, which cannot overflow."""
    out: Float32 = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))
    return out


def silu(x: Float32) -> Float32:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Float32) -> Float32:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    erf: Float32 = _erf(x * np.float32(math.sqrt(0.5))).astype(np.float32)
    return np.float32(0.5) * x * (1 + erf)


def gelu_tanh(x: Float32) -> Float32:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    out: Float32 = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


def softcap(x: Float32, cap: float) -> Float32:
    """cap * tanh(x / cap); unchanged when cap is 0."""
    return np.float32(cap) * np.tanh(x / np.float32(cap)) if cap else x


def rotate(x: Float32, positions: Int32, rope: Rope) -> Float32:
    """Rotary embedding of heads [T, heads, D]; the first 2 * len(inv_freq) values are rotated, the rest pass."""
    half = len(rope.inv_freq)
    angles = positions.astype(np.float32)[:, None] * np.asarray(rope.inv_freq, dtype=np.float32)  # [T, half]
    cos = (np.cos(angles) * np.float32(rope.scale))[:, None, :]  # [T, 1, half]
    sin = (np.sin(angles) * np.float32(rope.scale))[:, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)


def round_to_int8(x: Float32) -> Float32:
    """The nearest multiples of the largest magnitude / 127 over the last axis, ties to even."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.asarray(np.rint(x * factor) * (largest / np.float32(127)), dtype=np.float32)


def round_to_e4m3(x: Float32) -> Float32:
    """The nearest 8-bit floats of 4 exponent and 3 mantissa bits, ties to even; beyond 448 they saturate.

    Source: Micikevicius et al. 2022 (FP8 formats for deep learning), E4M3.
    """
    _, exponent = np.frexp(x)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3)  # below 2^-6 numbers are denormal
    return np.asarray(np.clip(np.rint(x / step) * step, -448, 448), dtype=np.float32)


def slots_of(positions: npt.NDArray[np.intp], block_table: Int32, block_size: int) -> Int64:
    """The slots of one request's positions."""
    return block_table[positions // block_size].astype(np.int64) * block_size + positions % block_size


def attention(
    q: Float32,  # [T, H, D]
    keys: Float32,  # [slots, G, D]
    values: Float32,  # [slots, G, D]
    inputs: StepInputs,
    *,
    group: int,
    block_size: int,
    scale: float,
    window: int,
    cap: float,
    rounds: bool = False,
) -> Float32:
    """Causal attention of ragged queries over the paged cache, one request after the other; [T, H, D].

    `rounds`: queries and softmax weights (before they are normed) are rounded to bfloat16, as with a narrow cache.
    """
    q = round_to_bfloat16(q) if rounds else q
    out = np.empty_like(q)
    for b, seq_len in enumerate(inputs.seq_lens.tolist()):
        start, end = int(inputs.query_start_loc[b]), int(inputs.query_start_loc[b + 1])
        if start == end:
            continue
        query_positions = np.arange(seq_len - (end - start), seq_len)
        oldest = max(0, int(query_positions[0]) - window + 1) if window else 0
        key_positions = np.arange(oldest, seq_len)
        slots = slots_of(key_positions, inputs.block_tables[group, b], block_size)
        distance = query_positions[:, None] - key_positions[None, :]  # [queries, keys]
        visible = (distance >= 0) & (distance < window) if window else distance >= 0
        out[start:end] = attend(q[start:end], keys[slots], values[slots], visible, scale, cap, rounds)
    return out


def attend(
    q: Float32,  # [n, H, D]
    k: Float32,  # [m, G, D]
    v: Float32,  # [m, G, D]
    visible: npt.NDArray[np.bool_],  # [n, m]
    scale: float,
    cap: float,
    rounds: bool,
) -> Float32:
    """softmax(softcap(q k^T * scale)) v for one request; query head h reads KV head h // (H / G)."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    share = num_heads // num_kv_heads
    grouped = q.reshape(num_queries, num_kv_heads, share, head_dim).transpose(1, 2, 0, 3)  # [G, share, n, D]
    scores = grouped @ k.transpose(1, 2, 0)[:, None] * np.float32(scale)  # [G, share, n, m]
    scores = np.where(visible, softcap(scores, cap), np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = round_to_bfloat16(weights) if rounds else weights
    mixed = weights @ v.transpose(1, 0, 2)[:, None] / total  # [G, share, n, D]
    out: Float32 = mixed.transpose(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
    return out
