"""The device sampler: one fixed sequence of launches for greedy steps, one for draws, so that graphs can hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton

from octavo.errors import UnsupportedModelError
from octavo.runtime.base import SamplerOutput, SamplingInputs
from octavo.runtime.cuda.kernels import sampling as kernels

CHUNK = 4096  # logits that one program reads
PIECE = 64  # logits of which one maximum is kept
ROOM = 2048  # ids that the fast way to a token may look at
_LOGPROB_ROWS = 16  # rows whose alternatives are looked for at once: bounds the memory of the sort


@dataclass(slots=True)
class SamplerRows:
    """Device arrays of a step that the sampler reads, one entry a row of logits."""

    rows: torch.Tensor  # int32: where each token is kept
    top_k: torch.Tensor  # int32
    temperature: torch.Tensor  # float32
    top_p: torch.Tensor
    min_p: torch.Tensor
    noise_keys: torch.Tensor  # int64: a Philox key each


class Sampler:
    """Buffers for up to `max_rows` rows of `vocab` logits.

    `row_tokens` [num_rows_kept + 1] holds each row's last token for the next step; the last entry is the trash row's.

    Raises:
        UnsupportedModelError: a vocabulary too large.
    """

    def __init__(
        self, max_rows: int, vocab: int, device: torch.device, *, num_rows_kept: int = 0, chunk: int = CHUNK,
        piece: int = PIECE, room: int = ROOM,
    ) -> None:  # fmt: skip
        if vocab >= 1 << 21:
            raise UnsupportedModelError(f"a vocabulary of {vocab:,} ids: the cuda sampler takes fewer than {1 << 21:,}")
        self._vocab, self._device = vocab, device
        self._chunk, self._piece, self._room = chunk, piece, room
        self._num_chunks = triton.cdiv(vocab, chunk)
        self._num_pieces = self._num_chunks * (chunk // piece)
        self._max_chunks = triton.next_power_of_2(self._num_chunks)
        shape = (max_rows, self._num_chunks)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._best, self._scores, self._mass = new(*shape), new(*shape), new(*shape)
        self._ids, self._score_ids, self._above, self._equal = (new(*shape, dtype=torch.int32) for _ in range(4))
        self._piece_best, self._masses = new(max_rows, self._num_pieces), new(max_rows)
        self._bounds, self._counts, self._few_tokens, self._wide = (new(max_rows, dtype=torch.int32) for _ in range(4))
        self._found_ids, self._found_logits = new(max_rows, room, dtype=torch.int32), new(max_rows, room)
        self._ways = [new(*shape, kernels.WAYS) for _ in range(2)]
        self._lows = new(max_rows, kernels.WAYS, dtype=torch.int32)
        self._k_threshold, self._threshold, self._keep_equal = (new(max_rows, dtype=torch.int32) for _ in range(3))
        self._wanted_ids, self._wanted_mass = new(max_rows), new(max_rows)
        self.tokens = new(max_rows, dtype=torch.int32)
        self.row_tokens = new(num_rows_kept + 1, dtype=torch.int32)
        self._adjusted = new(max_rows, vocab)

    @staticmethod
    def adjusted_bytes(max_rows: int, vocab: int) -> int:
        """Bytes of the float32 copy that biases and penalties need."""
        return max_rows * vocab * 4

    @property
    def num_wide(self) -> int:
        """Rows of the last drawing step that took the passes over all logits."""
        return int(self._wide.sum())

    def launch(self, logits: torch.Tensor, rows: SamplerRows, *, draws: bool) -> None:
        """Launches what gives each row of `logits` [R, vocab] its token; without `draws`, the largest."""
        num_rows = len(logits)
        if draws:
            self._draw(logits, rows)
        else:
            kernels.chunk_argmax[(num_rows, self._num_chunks)](
                logits, self._best, self._ids, self._vocab, self._num_chunks, CHUNK=self._chunk
            )
        kernels.publish[(num_rows,)](
            self._best, self._ids, self._scores, self._score_ids, self._few_tokens, self._wide, rows.temperature,
            rows.rows, self.tokens, self.row_tokens, self._num_chunks, self._vocab, DRAWS=draws,
            MAX_CHUNKS=self._max_chunks,
        )  # fmt: skip

    def adjust(self, logits: torch.Tensor, sampling: SamplingInputs) -> torch.Tensor:
        """Biases, masks and penalties, on a float32 copy."""
        num_rows = len(logits)
        adjusted = self._adjusted
        kernels.adjust[(num_rows, self._num_chunks)](logits, adjusted, self._vocab, CHUNK=self._chunk)
        if len(sampling.bias_ids):
            biases = (sampling.bias_start, sampling.bias_ids, sampling.bias_values)
            kernels.bias[(num_rows,)](adjusted, *map(self._upload, biases), self._vocab, BLOCK=128)
        if sampling.masks is not None and sampling.mask_of is not None:
            masked = np.flatnonzero(sampling.mask_of >= 0)
            words = self._upload(sampling.masks[sampling.mask_of[masked]].view(np.int32))  # [rows, words]
            bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=self._device) & 1
            banned = bits.reshape(len(masked), -1)[:, : self._vocab] == 0
            rows = self._upload(masked)
            adjusted[rows] = adjusted[rows].masked_fill_(banned, -torch.inf)
        if len(sampling.seen_ids):
            seen = (
                *(sampling.seen_start, sampling.seen_ids, sampling.seen_counts),
                *(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
            )
            kernels.penalties[(num_rows,)](adjusted, *map(self._upload, seen), self._vocab, BLOCK=512)
        return adjusted[:num_rows]

    def logprobs(self, raw: torch.Tensor, sampling: SamplingInputs) -> Callable[[SamplerOutput], None]:
        """Launches the log probabilities of the raw logits for the rows that asked; the result, once the device has
        come so far, fills them in."""
        wanted = sampling.num_logprobs
        asking = np.flatnonzero(wanted >= 0)
        most = int(wanted.max(initial=0))
        rows = self._upload(asking)
        parts = [
            _logprobs(raw, self.tokens, rows[i : i + _LOGPROB_ROWS], most) for i in range(0, len(asking), _LOGPROB_ROWS)
        ]
        copies = [torch.cat(tensors).to("cpu", non_blocking=True) for tensors in zip(*parts, strict=True)]

        def fill(output: SamplerOutput) -> None:
            for target, values in zip((output.logprobs, output.ranks), copies[:2], strict=True):
                target[asking] = values.numpy()
            for target, values in zip((output.top_ids, output.top_logprobs), copies[2:], strict=True):
                target[asking] = values.numpy()[:, :most]
            for row in asking:  # a row shows as many alternatives as it asked for
                output.top_ids[row, wanted[row] :] = -1
                output.top_logprobs[row, wanted[row] :] = np.nan

        return fill

    def _draw(self, logits: torch.Tensor, rows: SamplerRows) -> None:
        """The fast way for every row, then the passes over all logits for the wide ones."""
        num_rows = len(logits)
        grid = (num_rows, self._num_chunks)
        per_program = _chunks_per_program(num_rows)
        bits = 16 if logits.dtype == torch.bfloat16 else 32
        sizes = {"BITS": bits, "MAX_CHUNKS": self._max_chunks}
        settings = (rows.temperature, rows.top_k, rows.top_p, rows.min_p)
        kernels.survey[grid](
            logits, rows.temperature, self._best, self._ids, self._mass, self._piece_best, self._vocab,
            self._num_chunks, CHUNK=self._chunk, PIECE=self._piece, num_warps=8,
        )  # fmt: skip
        kernels.bound[(num_rows,)](
            self._best, self._mass, self._piece_best, *settings, self._bounds, self._masses, self._counts,
            self._num_chunks, self._num_pieces, self._vocab, MAX_PIECES=triton.next_power_of_2(self._num_pieces),
            **sizes, num_warps=8,
        )  # fmt: skip
        kernels.collect[grid](
            logits, self._piece_best, self._bounds, self._counts, self._found_ids, self._found_logits, self._vocab,
            self._num_chunks, BITS=bits, CHUNK=self._chunk, PIECE=self._piece, ROOM=self._room,
        )  # fmt: skip
        kernels.draw_few[(num_rows,)](
            self._best, *settings, rows.noise_keys, self._bounds, self._masses, self._counts, self._found_ids,
            self._found_logits, self._few_tokens, self._wide, self._num_chunks, self._vocab,
            ID_BITS=max(self._vocab - 1, 1).bit_length(), ROOM=self._room, **sizes, num_warps=8,
        )  # fmt: skip
        self._find_thresholds(logits, rows, bits)
        kernels.draw_wide[(num_rows, triton.cdiv(self._num_chunks, per_program))](
            self._wide, logits, self._best, rows.temperature, rows.min_p, rows.noise_keys, self._threshold,
            self._keep_equal, self._equal, self._scores, self._score_ids, self._vocab, self._num_chunks, per_program,
            CHUNK=self._chunk, **sizes,
        )  # fmt: skip

    def _find_thresholds(self, logits: torch.Tensor, rows: SamplerRows, bits: int) -> None:
        """For wide rows: the key of the last id that stays, and how many ids of that key stay."""
        grid = (len(logits),)
        sizes = {"BITS": bits, "MAX_CHUNKS": self._max_chunks}
        kernels.wish[grid](self._wide, rows.top_k, self._wanted_ids, self._vocab)
        self._search(logits, rows, self._wanted_ids, self._k_threshold, None, bits=bits)
        kernels.settle_top_k[grid](
            self._wide, self._best, rows.temperature, rows.top_k, rows.top_p, self._k_threshold, self._above,
            self._equal, self._mass, self._masses, self._keep_equal, self._wanted_mass, self._num_chunks, **sizes,
        )  # fmt: skip
        self._search(logits, rows, self._wanted_mass, self._threshold, self._k_threshold, bits=bits)
        kernels.settle_top_p[grid](
            self._wide, self._best, rows.temperature, self._wanted_mass, self._k_threshold, self._threshold,
            self._mass, self._equal, self._keep_equal, self._num_chunks, **sizes,
        )  # fmt: skip

    def _search(
        self, logits: torch.Tensor, rows: SamplerRows, wanted: torch.Tensor, thresholds: torch.Tensor,
        floors: torch.Tensor | None, *, bits: int,
    ) -> None:  # fmt: skip
        """By number of ids, or with `floors` by weight."""
        per_program = _chunks_per_program(len(logits))
        grid = (len(logits), triton.cdiv(self._num_chunks, per_program))
        sizes = {"BITS": bits, "CHUNK": self._chunk, "MAX_CHUNKS": self._max_chunks, "WAYS": kernels.WAYS}
        passes = bits // 4
        for number in range(passes):
            kernels.search[grid](
                self._wide, logits, self._best, rows.temperature, wanted, self._lows, self._ways[1 - number % 2],
                self._ways[number % 2], self._vocab, self._num_chunks, per_program, number, bits - 4 - 4 * number,
                MASS=floors is not None, **sizes,
            )  # fmt: skip
        kernels.tally[grid](
            self._wide, logits, self._best, rows.temperature, wanted, self._lows, self._ways[1 - passes % 2],
            thresholds, thresholds if floors is None else floors, self._above, self._equal, self._mass, self._vocab,
            self._num_chunks, per_program, passes, HAS_FLOOR=floors is not None, **sizes,
        )  # fmt: skip

    def _upload(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        """A copy on the device; from pinned memory, so that the host does not wait."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host.clone()


def _chunks_per_program(num_rows: int) -> int:
    """Few programs where there are many rows: most of them find that they have nothing to do."""
    return 1 if num_rows <= 8 else 8


def _logprobs(
    raw: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log probability, rank, alternatives' ids, their log probabilities) of these rows; alternatives best first."""
    logits = raw[rows].float()  # [n, vocab]
    chosen = tokens[rows].long()[:, None]
    normaliser = torch.logsumexp(logits, 1, keepdim=True)
    value = logits.gather(1, chosen)
    ranks = 1 + (logits > value).sum(1)
    bits = logits.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    best = ((ordered.long() << 32) | (0x7FFFFFFF - ids)).topk(min(most, logits.shape[1]), 1)  # lowest id first
    return (value - normaliser)[:, 0], ranks.int(), best.indices.int(), logits.gather(1, best.indices) - normaliser
