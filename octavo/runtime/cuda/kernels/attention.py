"""Paged attention: one query a request (decode, split over the context) and many (prefill, chunks, mixed).

The query heads that share a KV head are rows of one tile, so that K and V are read once for all of them and the
products run on the tensor cores. Softmax is online, in float32, base 2 (Milakov & Gimelshein 2018; Dao 2023 for the
split over the context). Nothing gathers KV into a contiguous buffer.

The cache of a layer is two tensors [blocks, KV heads, block_size, head_dim]: what a program reads of one block is one
contiguous piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.program.ops import Attention
from octavo.runtime.cuda.kernels.rows import softcapped

if TYPE_CHECKING:  # who only compiles has no torch
    import torch

_LOG2E = tl.constexpr(math.log2(math.e))
_PROGRAMS_WANTED = 132  # one for each multiprocessor of a large card
MAX_SPLITS = 32
MIN_CHUNK = 256  # positions; shorter parts cost more to join than they save


@dataclass(slots=True)
class AttentionInputs:
    """Device arrays of a step that attention reads, and how many of each there are."""

    query_start_loc: torch.Tensor  # int32 [B + 1]
    seq_lens: torch.Tensor  # int32 [B]; 0 marks a padding row
    tables: torch.Tensor  # int32 [G * B * stride], the tables of group g begin at g * B * stride
    table_stride: torch.Tensor  # int32 [1]: blocks in a row of a table; on the device, so that graphs may vary it
    decode_rows: torch.Tensor  # int32: the requests with one query
    tile_rows: torch.Tensor  # int32: for each tile of prefill queries, its request
    tile_starts: torch.Tensor  # int32: ... and its first query within the request
    num_requests: int
    num_decodes: int
    num_tiles: int


@triton.constexpr_function
def operand_type(computed, kept):
    """What queries, K and V multiply as: of an 8-bit cache float16, which holds each of its values exactly."""
    return tl.float16 if kept.primitive_bitwidth == 8 and computed == tl.bfloat16 else computed


@triton.jit
def _scores(q, k, visible, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in base 2: softmax over exp2 of these is softmax(softcap(q . k * scale))."""
    s = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        s = softcapped(s, softcap)
    return tl.where(visible, s * _LOG2E, float("-inf"))


@triton.jit
def _parts(length, num_splits, MIN_CHUNK: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many parts a context has and how long they are.

    A graph's grid is fixed; how much of it has work is each request's own length's to say.
    """
    num_parts = tl.maximum(tl.minimum(tl.cdiv(length, MIN_CHUNK), num_splits), 1)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, num_parts), BLOCK_N) * BLOCK_N, BLOCK_N)
    return tl.maximum(tl.cdiv(length, chunk), 1), chunk


@triton.jit(do_not_specialize=["table_base", "num_splits", "window"])
def _decode(q, keys, values, out, partial, partial_sums, arrived, rows, query_start_loc, seq_lens, tables, table_stride,
            table_base, num_splits, scale, v_scale, softcap, window, NUM_HEADS: tl.constexpr,
            NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
            HAS_WINDOW: tl.constexpr, IS_SPLIT: tl.constexpr, MIN_CHUNK: tl.constexpr, MOST: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head, index, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    request = tl.load(rows + index)
    seq_len = tl.load(seq_lens + request)
    token = tl.load(query_start_loc + request).to(tl.int64)
    table = tables + (table_base + request).to(tl.int64) * tl.load(table_stride)
    oldest = tl.maximum(seq_len - window, 0) if HAS_WINDOW else 0
    begin = oldest // BLOCK_N * BLOCK_N
    num_parts = 1
    chunk = seq_len
    if IS_SPLIT:
        num_parts, chunk = _parts(seq_len - begin, num_splits, MIN_CHUNK, BLOCK_N)
        if split >= num_parts:
            return
        begin += split * chunk
    end = tl.minimum(begin + chunk, seq_len)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    head = kv_head * GROUP + m
    valid = m < GROUP
    q_at = token * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
    query = tl.load(q + q_at, mask=valid[:, None] & in_head[None, :], other=0.0)
    query = query.to(operand_type(query.dtype, keys.dtype.element_ty))
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    position = begin + tl.arange(0, BLOCK_N)
    block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < end
        at = ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        mask = inside[:, None] & in_head[None, :]
        k = tl.load(keys + at[:, None] + d[None, :], mask=mask, other=0.0).to(query.dtype)  # [BLOCK_N, BLOCK_D]
        v = tl.load(values + at[:, None] + d[None, :], mask=mask, other=0.0).to(query.dtype)
        block = tl.load(table + (position + BLOCK_N) // BLOCK_SIZE, mask=position + BLOCK_N < end, other=0)
        s = _scores(query, tl.trans(k), (inside & (position >= oldest))[None, :], scale, softcap, HAS_SOFTCAP)
        new_best = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(best - shift)
        total = total * keep + tl.sum(p, 1)
        mixed = mixed * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = new_best
    safe = tl.where(total > 0, total, 1.0)
    mixed = mixed * (v_scale / safe)[:, None]
    if num_parts > 1:
        row = (index * NUM_HEADS + head).to(tl.int64) * num_splits + split
        tl.store(partial_sums + row, tl.where(total > 0, best + tl.log2(safe), float("-inf")), mask=valid)
        tl.store(partial + row[:, None] * HEAD_DIM + d[None, :], mixed, mask=valid[:, None] & in_head[None, :])
        _merge_if_last(partial, partial_sums, arrived + index * NUM_KV_HEADS + kv_head, out, token,
                       (index * NUM_HEADS).to(tl.int64), kv_head, num_splits, num_parts, NUM_HEADS, GROUP, HEAD_DIM,
                       MOST, BLOCK_D)  # fmt: skip
    else:
        tl.store(out + q_at, mixed.to(out.dtype.element_ty), mask=valid[:, None] & in_head[None, :])


@triton.jit
def _merge_if_last(partial, partial_sums, arrived, out, token, first_row, kv_head, num_splits, num_parts,
                   NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MOST: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    """The program that ends last of a request's and KV head's parts joins what all of them left."""
    tl.debug_barrier()  # every thread's stores come before the count
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.store(arrived, 0)
        s = tl.arange(0, MOST)
        d = tl.arange(0, BLOCK_D)
        for m in tl.static_range(GROUP):
            head = kv_head * GROUP + m
            row = (first_row + head) * num_splits + s
            sums = tl.load(partial_sums + row, mask=s < num_parts, other=float("-inf"), cache_modifier=".cg")
            best = tl.max(sums, 0)
            weight = tl.exp2(sums - tl.where(best == float("-inf"), 0.0, best))
            mask = (s < num_parts)[:, None] & (d < HEAD_DIM)[None, :]
            parts = tl.load(partial + row[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            total = tl.sum(weight, 0)
            mixed = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
            tl.store(out + (token * NUM_HEADS + head) * HEAD_DIM + d, mixed.to(out.dtype.element_ty), mask=d < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class Partials:
    """What the programs of a split decode leave for the one that ends last."""

    mixed: torch.Tensor  # float32 [partial_rows, D]
    sums: torch.Tensor  # float32 [partial_rows]
    arrived: torch.Tensor  # int32 [max decodes * KV heads]: zero between launches


def num_splits(num_decodes: int, num_kv_heads: int) -> int:
    """Into how many parts a context is cut at most, so that a few requests fill the card; a power of two.

    Programs without a part cost time too: no more than one for each multiprocessor.
    """
    most = max(_PROGRAMS_WANTED // max(num_decodes * num_kv_heads, 1), 1)
    return min(1 << (most.bit_length() - 1), MAX_SPLITS)


def partial_rows(max_decodes: int, num_heads: int, num_kv_heads: int) -> int:
    """Rows of head_dim that the partial results of split decodes may need."""
    counts = range(1, max_decodes + 1)
    return max(n * num_splits(n, num_kv_heads) for n in counts if n == 1 or num_splits(n, num_kv_heads) > 1) * num_heads


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Keys of one turn of the decode kernel, and how many turns are on their way."""

    keys: int
    warps: int
    stages: int


def decode_tile(head_dim: int, kv_bytes: int, splits: int) -> DecodeTile:
    """The tile for a head size and the bytes of a KV element.

    Few requests (split contexts) wait for memory once or twice: as many keys as fit are asked for together. Many
    overlap among themselves; 8-bit elements cost arithmetic there, so a tile has few threads.
    """
    if splits > 1:
        return DecodeTile(max(32, 256 * 256 // max(head_dim * kv_bytes, 256)), 8, 1)
    if kv_bytes == 1:
        return DecodeTile(32, 2, 4)
    return DecodeTile(min(64 * 256 // (head_dim * kv_bytes), 128), 4, 2)


def decode_attention(
    inputs: AttentionInputs,
    node: Attention,
    group: int,
    q: torch.Tensor,  # [T, H * D]
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,  # [T, H * D]
    partials: Partials, *,
    kv_scales: tuple[float, float] = (1.0, 1.0), chained: bool = False, tile: DecodeTile | None = None, splits: int = 0,
    min_chunk: int = MIN_CHUNK,
) -> None:  # fmt: skip
    """Attention of the requests that have one query in this step. Stored K and V are to be multiplied by `kv_scales`.

    A context is cut into at most `splits` parts (0: what fills the card), none shorter than `min_chunk`.
    """
    splits = splits or num_splits(inputs.num_decodes, node.num_kv_heads)
    block_d = max(triton.next_power_of_2(node.head_dim), 16)
    block_m = max(triton.next_power_of_2(node.num_heads // node.num_kv_heads), 16)
    tile = tile or decode_tile(block_d, keys.element_size(), splits)
    _decode[(node.num_kv_heads, inputs.num_decodes, splits)](
        q, keys, values, out, partials.mixed, partials.sums, partials.arrived, inputs.decode_rows,
        inputs.query_start_loc, inputs.seq_lens, inputs.tables, inputs.table_stride, group * inputs.num_requests,
        splits, node.scale * kv_scales[0], kv_scales[1], node.softcap, node.window,
        NUM_HEADS=node.num_heads, NUM_KV_HEADS=node.num_kv_heads, HEAD_DIM=node.head_dim, BLOCK_SIZE=keys.shape[2],
        HAS_SOFTCAP=node.softcap > 0, HAS_WINDOW=node.window > 0, IS_SPLIT=splits > 1, MIN_CHUNK=min_chunk,
        MOST=triton.next_power_of_2(splits), BLOCK_M=block_m, BLOCK_N=tile.keys, BLOCK_D=block_d, CHAINED=chained,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=chained,
    )  # fmt: skip


@triton.jit
def _attend(best, total, mixed, query, keys, values, table, begin, end, query_position, oldest, kv_head, scale, softcap,
            NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
            HAS_SOFTCAP: tl.constexpr, IS_MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """Adds the keys of [begin, end) to a tile's running softmax; without masks where every query sees every key."""
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    position = begin + tl.arange(0, BLOCK_N)
    block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        at = ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM
        if not IS_MASKED and BLOCK_D == HEAD_DIM:
            k = tl.load(keys + at[:, None] + d[None, :])
            v = tl.load(values + at[:, None] + d[None, :])
        else:
            mask = in_head[None, :]
            if IS_MASKED:
                mask = mask & (position < end)[:, None]
            k = tl.load(keys + at[:, None] + d[None, :], mask=mask, other=0.0)
            v = tl.load(values + at[:, None] + d[None, :], mask=mask, other=0.0)
        block = tl.load(table + (position + BLOCK_N) // BLOCK_SIZE, mask=position + BLOCK_N < end, other=0)
        s = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee")
        if HAS_SOFTCAP:
            s = softcapped(s * scale, softcap) * _LOG2E
        if IS_MASKED:
            visible = (position[None, :] <= query_position[:, None]) & (position[None, :] >= oldest[:, None])
            s = tl.where(visible, s, float("-inf"))
        if HAS_SOFTCAP:
            new_best = tl.maximum(best, tl.max(s, 1))
        else:
            scale2 = scale * _LOG2E
            new_best = tl.maximum(best, tl.max(s, 1) * scale2)
        shift = new_best
        if IS_MASKED:
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        if HAS_SOFTCAP:
            p = tl.exp2(s - shift[:, None])
        else:
            p = tl.exp2(s * scale2 - shift[:, None])  # one multiply-add
        keep = tl.exp2(best - shift)
        total = total * keep + tl.sum(p, 1)
        mixed = mixed * keep[:, None]
        mixed += tl.dot(p.to(query.dtype), v.to(query.dtype), input_precision="ieee")
        best = new_best
    return best, total, mixed


@triton.jit(do_not_specialize=["table_base", "window"])
def _prefill(q, keys, values, out, tile_rows, tile_starts, query_start_loc, seq_lens, tables, table_stride, table_base,
             scale, v_scale, softcap, window, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
             HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(tile_rows + tile)
    first = tl.load(tile_starts + tile)
    token = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - token
    seq_len = tl.load(seq_lens + request)
    table = tables + (table_base + request).to(tl.int64) * tl.load(table_stride)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_index = first + m // GROUP
    valid = (m < QUERIES * GROUP) & (query_index < num_queries)
    head = kv_head * GROUP + m % GROUP
    query_position = seq_len - num_queries + query_index
    q_at = ((token + query_index).to(tl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    query = tl.load(q + q_at, mask=mask, other=0.0)
    query = query.to(operand_type(query.dtype, keys.dtype.element_ty))
    lowest = seq_len - num_queries + first
    highest = tl.minimum(lowest + QUERIES - 1, seq_len - 1)
    oldest = query_position * 0
    begin = 0
    full_from = 0
    if HAS_WINDOW:
        oldest = tl.maximum(query_position - window + 1, 0)
        begin = tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N
        full_from = tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK_N) * BLOCK_N
    end = highest + 1
    full_to = (lowest + 1) // BLOCK_N * BLOCK_N  # keys that every query of the tile may see
    full_from = tl.maximum(tl.minimum(full_from, full_to), begin)
    full_to = tl.maximum(full_to, full_from)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_WINDOW:
        best, total, mixed = _attend(best, total, mixed, query, keys, values, table, begin, full_from, query_position,
                                     oldest, kv_head, scale, softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
                                     HAS_SOFTCAP, True, BLOCK_N, BLOCK_D)  # fmt: skip
    best, total, mixed = _attend(best, total, mixed, query, keys, values, table, full_from, full_to, query_position,
                                 oldest, kv_head, scale, softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
                                 HAS_SOFTCAP, False, BLOCK_N, BLOCK_D)  # fmt: skip
    best, total, mixed = _attend(best, total, mixed, query, keys, values, table, full_to, end, query_position, oldest,
                                 kv_head, scale, softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, HAS_SOFTCAP,
                                 True, BLOCK_N, BLOCK_D)  # fmt: skip
    mixed = mixed * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out + q_at, mixed.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Rows (queries x heads that share a KV head) and keys of one step of the prefill kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


def prefill_tile(head_dim: int, group: int, item_bytes: int) -> PrefillTile:
    """The largest tile whose K, V and Q fit in shared memory."""
    need = triton.next_power_of_2(group)
    if item_bytes == 4:
        return PrefillTile(max(32, need), 32, 4, 1)
    if head_dim <= 128:
        return PrefillTile(max(64, need), 64, 4, 3)  # two programs fit a multiprocessor, one multiplies while one exps
    return PrefillTile(max(64, need), 32, 4, 2)


def queries_per_tile(head_dim: int, group: int, item_bytes: int) -> int:
    """Query positions of one prefill tile."""
    return prefill_tile(head_dim, group, item_bytes).rows // group


def prefill_attention(
    inputs: AttentionInputs,
    node: Attention,
    group: int,
    q: torch.Tensor,  # [T, H * D]
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,  # [T, H * D]
    *,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    tile: PrefillTile | None = None,
) -> None:
    """Attention of the requests that have several queries. Stored K and V are to be multiplied by `kv_scales`."""
    tile = tile or prefill_tile(node.head_dim, node.num_heads // node.num_kv_heads, q.element_size())
    _prefill[(inputs.num_tiles, node.num_kv_heads)](
        q, keys, values, out, inputs.tile_rows, inputs.tile_starts, inputs.query_start_loc, inputs.seq_lens,
        inputs.tables, inputs.table_stride, group * inputs.num_requests, node.scale * kv_scales[0], kv_scales[1],
        node.softcap, node.window, NUM_HEADS=node.num_heads, NUM_KV_HEADS=node.num_kv_heads, HEAD_DIM=node.head_dim,
        BLOCK_SIZE=keys.shape[2], HAS_SOFTCAP=node.softcap > 0, HAS_WINDOW=node.window > 0, BLOCK_M=tile.rows,
        BLOCK_N=tile.keys, BLOCK_D=max(triton.next_power_of_2(node.head_dim), 16), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
