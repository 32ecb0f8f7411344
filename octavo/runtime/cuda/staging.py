"""A step's inputs on their way to the device: all arrays in one pinned buffer, one copy, views where they land."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.runtime.base import SamplingInputs, StepInputs
from octavo.runtime.cuda.graphs import Shape
from octavo.runtime.cuda.kernels.attention import AttentionInputs
from octavo.runtime.cuda.sampler import SamplerRows
from octavo.runtime.reference.sampler import noise_keys

Array = npt.NDArray[Any]
Scalar = TypeVar("Scalar", bound=np.generic)
Span = tuple[int, int]
_ALIGN = 4  # int32 elements: arrays begin on 16 bytes, which lets kernels load them in one piece
_NONE = np.zeros(0, np.int32)
_PADS = [np.zeros(n, np.int32) for n in range(_ALIGN)]
_COPIED = 512  # copies are of whole multiples of so many elements, so that few views of the buffers are made


@dataclass(slots=True)
class DeviceStep:
    """A step on the device. Counts are those of its launches: in a graph, the bucket's, padding included."""

    num_tokens: int
    num_logits: int
    token_ids: torch.Tensor  # int32 [T]; -1 - row: the row's last token
    positions: torch.Tensor  # int32 [T]
    slots: torch.Tensor  # int32 [groups * T]
    logits_indices: torch.Tensor  # int32 [R]
    attention: AttentionInputs
    sampling: SamplerRows

    @property
    def num_sampled(self) -> int:
        """Of the positions that go to the end, the first so many have logits."""
        return len(self.sampling.top_k)

    def slots_of(self, group: int) -> torch.Tensor:
        """The slots of one KV group, int32 [T]."""
        return self.slots[group * self.num_tokens : (group + 1) * self.num_tokens]


class Settings:
    """What the device's sampler is told of each row, but for the noise: the same from step to step of the same rows."""

    def __init__(self, sampling: SamplingInputs, trash_row: int) -> None:
        self._of = _settings_of(sampling)
        rows = np.full(len(sampling.top_k), -1, np.int32) if sampling.rows is None else sampling.rows
        self._rows = rows.tobytes()
        floats = (sampling.temperature.view(np.int32), sampling.top_p.view(np.int32), sampling.min_p.view(np.int32))
        self.arrays = [np.where(rows < 0, np.int32(trash_row), rows), sampling.top_k, *floats]
        self.trash_row = trash_row
        self.draws = bool((sampling.temperature > 0).any())
        self.tells = bool((sampling.num_logprobs >= 0).any())  # log probabilities

    def are_of(self, sampling: SamplingInputs) -> bool:
        """Whether they are these rows', whose arrays are the very same ones then."""
        is_same = all(map(operator.is_, self._of, _settings_of(sampling)))
        return is_same and sampling.rows is not None and sampling.rows.tobytes() == self._rows

    def padded(self, sampling: SamplingInputs, num_rows: int) -> list[Array]:
        """As int32, with the keys of the noise, for so many rows; padding rows keep their token in the trash row."""
        keys = noise_keys(sampling.seeds, sampling.positions).view(np.int32) if self.draws else _NONE
        keys, arrays = _extended(keys, (2 * num_rows,), 0), self.arrays
        if num_rows > len(arrays[0]):
            fill = (self.trash_row, 0, 0, 0, 0)
            arrays = [_extended(array, (num_rows,), value) for array, value in zip(arrays, fill, strict=True)]
        return [*arrays, keys]


def _settings_of(sampling: SamplingInputs) -> tuple[Array, ...]:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.num_logprobs


class Staging:
    """Pinned buffers on the host, used in turn, and one on the device, all int32.

    A copy to the device is queued behind the steps before it, so one buffer there is enough. On the host a buffer is
    filled while copies of earlier ones may be queued: there is one more of them than steps in flight.
    """

    def __init__(self, capacity: int, num_buffers: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(capacity, dtype=torch.int32, pin_memory=pinned) for _ in range(num_buffers)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        # of each buffer: when it has passed, the buffer may be filled again
        self._sent = [torch.cuda.Event() for _ in range(num_buffers if pinned else 0)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._copies: dict[Span, tuple[torch.Tensor, torch.Tensor]] = {}  # (buffer, size) -> views of device and host

    @staticmethod
    def capacity(max_tokens: int, max_logits: int, max_requests: int, num_groups: int, max_blocks: int) -> int:
        """Elements for the largest step. Tiles of queries are at most one a token; mixed steps have a row more."""
        max_requests, max_tokens = max_requests + 1, max_tokens + 16
        arrays = [1, max_tokens, max_tokens, num_groups * max_tokens, max_logits, max_requests + 1, max_requests]
        arrays += [max_requests, max_tokens, max_tokens, *[max_logits] * 5, 2 * max_logits]
        arrays += [num_groups * max_requests * max_blocks]
        return sum(arrays) + _ALIGN * len(arrays)

    def send(self, arrays: Iterable[Array]) -> list[Span]:
        """Copies arrays of 4 or 8 bytes an element to the device, together, int64 as int32; returns where they lie."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._hosts)
        if self._sent:
            self._sent[turn].synchronize()
        spans: list[Span] = []
        pieces: list[Array] = []
        end = 0
        for array in arrays:
            size = array.size
            pieces.append(array if array.ndim == 1 else array.reshape(-1))
            spans.append((end, end + size))
            end += size
            if pad := -end % _ALIGN:
                pieces.append(_PADS[pad])
                end += pad
        np.concatenate(pieces, out=self._arrays[turn][:end], casting="same_kind")
        size = -(-end // _COPIED) * _COPIED
        if (turn, size) not in self._copies:
            self._copies[turn, size] = self._device[:size], self._hosts[turn][:size]
        device, host = self._copies[turn, size]
        device.copy_(host, non_blocking=True)
        if self._sent:
            self._sent[turn].record()
        return spans

    def view(self, span: Span) -> torch.Tensor:
        """Where an array lies on the device, int32."""
        return self._device[span[0] : span[1]]


def send_step(
    staging: Staging, inputs: StepInputs, sampling: SamplingInputs, settings: Settings, *, tile_queries: int
) -> DeviceStep:
    """Stages a step; its views are made for launching it."""
    counts = np.diff(inputs.query_start_loc)
    single = _singles(inputs, counts)
    tiles = _tiles(counts, inputs.seq_lens, tile_queries)
    rows = settings.padded(sampling, len(sampling.top_k))
    spans = staging.send(_arrays(inputs, single, tiles, rows))
    return _views(staging, spans, len(inputs.seq_lens), len(single), len(tiles[0]))


def send_padded(
    staging: Staging, inputs: StepInputs, sampling: SamplingInputs, settings: Settings, shape: Shape, *,
    tile_queries: int, null_slot: int,
) -> list[Span] | None:  # fmt: skip
    """Stages a step for a graph, padded to `shape`; None where it has more tiles of queries than that holds.

    Padding tokens are written to the null block, padding rows to the trash row; padding requests have length 0 and
    attend to nothing. The tables come last, so that in a graph, where every address is fixed, their width may vary:
    kernels read it from the device.
    """
    num_requests = len(inputs.seq_lens)
    tiles = (_NONE, _NONE)
    if not shape.is_decode:
        counts = np.diff(inputs.query_start_loc)
        tiles = _tiles(counts, inputs.seq_lens, tile_queries)
        most_tiles = _most_tiles(shape, tile_queries)
        if len(tiles[0]) > most_tiles:
            return None
        single = _extended(_singles(inputs, counts), (shape.num_rows,), num_requests)
        tiles = _extended(tiles[0], (most_tiles,), num_requests), _extended(tiles[1], (most_tiles,), 0)
    if num_requests < shape.num_rows or not shape.is_decode:
        inputs = padded(inputs, shape, null_slot)
    if shape.is_decode:
        single = _longest_first(inputs.seq_lens)
    return staging.send(_arrays(inputs, single, tiles, settings.padded(sampling, shape.num_rows)))


def _longest_first(seq_lens: Array) -> Array:
    """The order in which decode attention takes requests: a long one begun last would run alone at the end."""
    return (-seq_lens).argsort(kind="stable").astype(np.int32)


def _singles(inputs: StepInputs, counts: Array) -> Array:
    """The requests with one query, those with the longest contexts first."""
    single = np.flatnonzero(counts == 1)
    return single[_longest_first(inputs.seq_lens[single])].astype(np.int32)


def padded_views(staging: Staging, spans: list[Span], shape: Shape, tile_queries: int) -> DeviceStep:
    """The views of what send_padded() staged; the same for every step of this shape."""
    if shape.is_decode:
        return _views(staging, spans, shape.num_rows, shape.num_rows, 0)
    return _views(staging, spans, shape.num_rows + 1, shape.num_rows, _most_tiles(shape, tile_queries))


def _most_tiles(shape: Shape, tile_queries: int) -> int:
    """Tiles that a mixed step may have: those of one prompt, and one more for each of a few."""
    return shape.num_tokens // tile_queries + 16


def _arrays(inputs: StepInputs, single: Array, tiles: tuple[Array, Array], sampling: list[Array]) -> list[Array]:
    tables = inputs.block_tables
    return [
        *(np.array([tables.shape[-1]], np.int32), inputs.token_ids, inputs.positions, inputs.slots),
        *(inputs.logits_indices, inputs.query_start_loc, inputs.seq_lens, single, *tiles, *sampling, tables),
    ]


def _views(staging: Staging, spans: list[Span], num_requests: int, num_decodes: int, num_tiles: int) -> DeviceStep:
    table_stride, token_ids, positions, slots, logits_indices, query_start_loc, seq_lens, *rest = map(
        staging.view, spans
    )
    decode_rows, tile_rows, tile_starts, rows, top_k, temperature, top_p, min_p, keys, tables = rest
    attention = AttentionInputs(
        query_start_loc, seq_lens, tables, table_stride, decode_rows, tile_rows, tile_starts, num_requests, num_decodes,
        num_tiles,
    )  # fmt: skip
    temperature, top_p, min_p = (part.view(torch.float32) for part in (temperature, top_p, min_p))
    sampling = SamplerRows(rows, top_k, temperature, top_p, min_p, keys.view(torch.int64))
    return DeviceStep(
        len(token_ids), len(logits_indices), token_ids, positions, slots, logits_indices, attention, sampling
    )


def padded(inputs: StepInputs, shape: Shape, null_slot: int) -> StepInputs:
    """A step with padding behind it, in a mixed one with at least one padding request. Their tables are not read."""
    groups, _, width = inputs.block_tables.shape
    size = shape.num_tokens
    num_padded = shape.num_rows if shape.is_decode else shape.num_rows + 1
    starts = np.arange(size + 1, dtype=np.int32)
    if not shape.is_decode:
        starts = _extended(inputs.query_start_loc, (num_padded + 1,), int(inputs.query_start_loc[-1]))
    return StepInputs(
        token_ids=_extended(inputs.token_ids, (size,), 0),
        positions=_extended(inputs.positions, (size,), 0),
        slots=_extended(inputs.slots, (groups, size), null_slot),
        query_start_loc=starts,
        seq_lens=_extended(inputs.seq_lens, (num_padded,), 0),
        block_tables=_extended(inputs.block_tables, (groups, num_padded, width), 0),
        logits_indices=starts[:-1] if shape.is_decode else _extended(inputs.logits_indices, (shape.num_rows,), 0),
    )


def _extended(array: npt.NDArray[Scalar], shape: tuple[int, ...], value: int) -> npt.NDArray[Scalar]:
    """The array in the corner of a larger one; np.pad takes five times as long."""
    out = np.full(shape, value, array.dtype)
    out[tuple(slice(size) for size in array.shape)] = array
    return out


def _tiles(counts: Array, seq_lens: Array, tile_queries: int) -> tuple[Array, Array]:
    """For the requests with several queries: which request each tile of queries belongs to, and its first query.

    Those that see most keys come first.
    """
    many = np.flatnonzero(counts > 1)
    tiles = -(-counts[many] // tile_queries)
    rows = np.repeat(many, tiles)
    ends = np.cumsum(tiles)
    starts = (np.arange(len(rows)) - np.repeat(ends - tiles, tiles)) * tile_queries
    order = np.argsort(counts[rows] - seq_lens[rows] - starts, kind="stable")
    return rows[order].astype(np.int32), starts[order].astype(np.int32)
