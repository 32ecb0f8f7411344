"""A step's inputs on their way to the device: all arrays in one pinned buffer, one copy, views where they land."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.runtime.base import StepInputs
from octavo.runtime.cuda.kernels.attention import AttentionInputs

Array = npt.NDArray[Any]
Scalar = TypeVar("Scalar", bound=np.generic)
_ALIGN = 4  # int32 elements: arrays begin on 16 bytes, which lets kernels load them in one piece


@dataclass(slots=True)
class DeviceStep:
    """A step on the device. Counts are those of its launches: in a graph, the bucket's, padding included."""

    num_tokens: int
    num_logits: int
    token_ids: torch.Tensor  # int32 [T]
    positions: torch.Tensor  # int32 [T]
    slots: torch.Tensor  # int32 [groups * T]
    logits_indices: torch.Tensor  # int32 [R]
    attention: AttentionInputs

    def slots_of(self, group: int) -> torch.Tensor:
        """The slots of one KV group, int32 [T]."""
        return self.slots[group * self.num_tokens : (group + 1) * self.num_tokens]


class Staging:
    """One pinned buffer on the host and its twin on the device, both int32."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._host = torch.zeros(capacity, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._array = self._host.numpy()
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        # when it has passed, the buffer may be filled again
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @staticmethod
    def capacity(max_tokens: int, max_logits: int, max_requests: int, num_groups: int, max_blocks: int) -> int:
        """Elements for the largest step. Tiles of queries are at most one a token."""
        arrays = [1, max_tokens, max_tokens, num_groups * max_tokens, max_logits, max_requests + 1, max_requests]
        arrays += [max_requests, max_tokens, max_tokens, num_groups * max_requests * max_blocks]
        return sum(arrays) + _ALIGN * len(arrays)

    def send(self, arrays: list[Array]) -> list[torch.Tensor]:
        """Copies arrays of int32 to the device, together; returns their views there."""
        if self._sent is not None:
            self._sent.synchronize()
        views, end = [], 0
        for array in arrays:
            start = -(-end // _ALIGN) * _ALIGN
            end = start + array.size
            self._array[start:end] = array.reshape(-1)
            views.append(self._device[start:end])
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return views


def send_step(
    staging: Staging, inputs: StepInputs, *, tile_queries: int, pad_to: int = 0, null_slot: int = 0
) -> DeviceStep:
    """Stages a step. With `pad_to` (a step of single queries that all sample), padding requests of length 0 are added:

    they write to the null block and attend to nothing. The tables come last, so that in a graph, where every address
    is fixed, their width may vary: kernels read it from the device.
    """
    counts = np.diff(inputs.query_start_loc)
    tables = inputs.block_tables
    if pad_to:
        inputs = padded(inputs, pad_to, null_slot)
        counts = np.ones(pad_to, np.int32)
    single = np.flatnonzero(counts == 1).astype(np.int32)
    tile_rows, tile_starts = _tiles(counts, tile_queries)
    stride = np.array([tables.shape[-1]], np.int32)
    views = staging.send(
        [
            *(stride, inputs.token_ids, inputs.positions, inputs.slots, inputs.logits_indices),
            *(inputs.query_start_loc, inputs.seq_lens, single, tile_rows, tile_starts, inputs.block_tables),
        ]
    )
    table_stride, token_ids, positions, slots, logits_indices, query_start_loc, seq_lens, rows, *tiles, flat = views
    attention = AttentionInputs(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        tables=flat,
        table_stride=table_stride,
        decode_rows=rows,
        tile_rows=tiles[0],
        tile_starts=tiles[1],
        num_requests=len(inputs.seq_lens),
        num_decodes=len(single),
        num_tiles=len(tile_rows),
    )
    return DeviceStep(
        len(inputs.token_ids), len(inputs.logits_indices), token_ids, positions, slots, logits_indices, attention
    )


def padded(inputs: StepInputs, size: int, null_slot: int) -> StepInputs:
    """A decode-only step with requests of length 0 behind it, `size` in all; their tables are not read."""
    groups, num_requests, width = inputs.block_tables.shape
    if num_requests == size:
        return inputs
    return StepInputs(
        token_ids=_extended(inputs.token_ids, (size,), 0),
        positions=_extended(inputs.positions, (size,), 0),
        slots=_extended(inputs.slots, (groups, size), null_slot),
        query_start_loc=np.arange(size + 1, dtype=np.int32),
        seq_lens=_extended(inputs.seq_lens, (size,), 0),
        block_tables=_extended(inputs.block_tables, (groups, size, width), 0),
        logits_indices=np.arange(size, dtype=np.int32),
    )


def _extended(array: npt.NDArray[Scalar], shape: tuple[int, ...], value: int) -> npt.NDArray[Scalar]:
    """The array in the corner of a larger one; np.pad takes five times as long."""
    out = np.full(shape, value, array.dtype)
    out[tuple(slice(size) for size in array.shape)] = array
    return out


def _tiles(counts: Array, tile_queries: int) -> tuple[Array, Array]:
    """For the requests with several queries: which request each tile of queries belongs to, and its first query."""
    many = np.flatnonzero(counts > 1)
    tiles = -(-counts[many] // tile_queries)
    rows = np.repeat(many, tiles).astype(np.int32)
    ends = np.cumsum(tiles)
    starts = (np.arange(len(rows)) - np.repeat(ends - tiles, tiles)) * tile_queries
    return rows, starts.astype(np.int32)
