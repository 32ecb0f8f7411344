"""The device sampler: launches the stages that the rows of a step need, and no others."""

from __future__ import annotations

import numpy as np
import torch
import triton

from octavo.runtime.base import SamplerOutput, SamplingInputs, UInt64
from octavo.runtime.cuda.kernels import sampling as kernels
from octavo.runtime.reference.sampler import mix

_CHUNK = 4096
_LOGPROB_ROWS = 16  # rows whose alternatives are looked for at once: bounds the memory of the sort
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def noise_keys(seeds: UInt64, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> UInt64:
    """One Philox key for each (seed, position), mixed so that neighbours share nothing."""
    counter = positions.astype(np.uint64) + np.uint64(1)
    keys: UInt64 = mix(mix(seeds + _GOLDEN) + counter * _GOLDEN)
    return keys


class Sampler:
    """Buffers for up to `max_rows` rows of `vocab` logits. `chunk` is the piece of a row that one program reads."""

    def __init__(
        self, max_rows: int, vocab: int, dtype: torch.dtype, device: torch.device, chunk: int = _CHUNK
    ) -> None:
        self._vocab, self._device, self._dtype = vocab, device, dtype
        self._chunk = chunk
        self._num_chunks = triton.cdiv(vocab, chunk)
        self._max_chunks = triton.next_power_of_2(self._num_chunks)
        shape = (max_rows, self._num_chunks)

        def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self._best, self._scores, self._mass = new(*shape), new(*shape), new(*shape)
        self._ids, self._above, self._equal = (new(*shape, dtype=torch.int32) for _ in range(3))
        self._counts = [new(*shape, kernels.WAYS) for _ in range(2)]
        self._lows = new(max_rows, kernels.WAYS, dtype=torch.int64)
        self._top_k_threshold, self._threshold = (new(max_rows, dtype=torch.int64) for _ in range(2))
        self._keep_equal = new(max_rows, dtype=torch.int32)
        self._wanted_mass = new(max_rows)
        self._tokens = new(max_rows, dtype=torch.int32)
        self._adjusted: torch.Tensor | None = None

    @staticmethod
    def adjusted_bytes(max_rows: int, vocab: int) -> int:
        """Bytes of the float32 copy that biases and penalties need."""
        return max_rows * vocab * 4

    def choose(self, logits: torch.Tensor, sampling: SamplingInputs) -> torch.Tensor:
        """Launches the stages for all rows of `logits` [R, vocab]; the tokens, int32 [R], are to come."""
        num_rows = len(logits)
        logits = self._adjust(logits, sampling)
        grid = (num_rows, self._num_chunks)
        kernels.chunk_argmax[grid](logits, self._best, self._ids, self._vocab, self._num_chunks, CHUNK=self._chunk)
        scores = self._best
        if (sampling.temperature > 0).any():
            self._draw(logits, sampling)
            scores = self._scores
        kernels.argmax[(num_rows,)](
            scores, self._ids, self._tokens, self._num_chunks, self._vocab, MAX_CHUNKS=self._max_chunks
        )
        return self._tokens[:num_rows]

    def with_logprobs(self, raw: torch.Tensor, tokens: torch.Tensor, sampling: SamplingInputs) -> SamplerOutput:
        """The host's copy of the tokens, and the log probabilities of the raw logits for the rows that asked."""
        num_rows, wanted = len(raw), sampling.num_logprobs
        most = int(max(0, wanted.max(initial=0)))
        asking = np.flatnonzero(wanted >= 0)
        parts = [
            _logprobs(raw, tokens, torch.from_numpy(asking[i : i + _LOGPROB_ROWS]).to(self._device), most)
            for i in range(0, len(asking), _LOGPROB_ROWS)
        ]
        output = SamplerOutput(
            token_ids=tokens.cpu().numpy().copy(),
            logprobs=np.full(num_rows, np.nan, dtype=np.float32),
            ranks=np.zeros(num_rows, dtype=np.int32),
            top_ids=np.full((num_rows, most), -1, dtype=np.int32),
            top_logprobs=np.full((num_rows, most), np.nan, dtype=np.float32),
        )
        targets = (output.logprobs, output.ranks, output.top_ids, output.top_logprobs)
        if parts:
            for target, tensors in zip(targets, zip(*parts, strict=True), strict=True):
                values = torch.cat(tensors).cpu().numpy()
                target[asking, ...] = values if target.ndim == 1 else values[:, :most]
            for row in asking:  # a row shows as many alternatives as it asked for
                output.top_ids[row, wanted[row] :] = -1
                output.top_logprobs[row, wanted[row] :] = np.nan
        return output

    def _adjust(self, logits: torch.Tensor, sampling: SamplingInputs) -> torch.Tensor:
        """Biases and penalties, on a copy; the logits themselves where there are none."""
        if not len(sampling.bias_ids) and not len(sampling.seen_ids):
            return logits
        num_rows = len(logits)
        if self._adjusted is None:
            self._adjusted = torch.empty((len(self._tokens), self._vocab), dtype=torch.float32, device=self._device)
        adjusted = self._adjusted
        kernels.adjust[(num_rows, self._num_chunks)](logits, adjusted, self._vocab, CHUNK=self._chunk)
        if len(sampling.bias_ids):
            biases = (sampling.bias_start, sampling.bias_ids, sampling.bias_values)
            kernels.bias[(num_rows,)](adjusted, *map(self._upload, biases), self._vocab, BLOCK=128)
        if len(sampling.seen_ids):
            seen = (
                *(sampling.seen_start, sampling.seen_ids, sampling.seen_counts),
                *(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty),
            )
            kernels.penalties[(num_rows,)](adjusted, *map(self._upload, seen), self._vocab, BLOCK=512)
        return adjusted[:num_rows]

    def _draw(self, logits: torch.Tensor, sampling: SamplingInputs) -> None:
        """Fills the chunks' scores: thresholds where a row asks for any, then noise."""
        draws = sampling.temperature > 0
        has_k = bool(((sampling.top_k > 0) & draws).any())
        has_p = bool(((sampling.top_p < 1) & draws).any())
        keys = self._upload(noise_keys(sampling.seeds, sampling.positions).view(np.int64))
        temperature = self._upload(sampling.temperature)
        common = {"CHUNK": self._chunk, "MAX_CHUNKS": self._max_chunks}
        bits = 16 if logits.dtype == torch.bfloat16 else 32
        if has_k or has_p:
            self._find_thresholds(logits, sampling, temperature, has_k=has_k, has_p=has_p, bits=bits)
        kernels.chunk_draw[(len(logits), self._num_chunks)](
            logits, self._best, temperature, self._upload(sampling.min_p), keys, self._threshold, self._keep_equal,
            self._equal, self._scores, self._ids, self._vocab, self._num_chunks, BITS=bits,
            HAS_THRESHOLD=has_k or has_p, **common,
        )  # fmt: skip

    def _find_thresholds(
        self,
        logits: torch.Tensor,
        sampling: SamplingInputs,
        temperature: torch.Tensor,
        *,
        has_k: bool,
        has_p: bool,
        bits: int,
    ) -> None:
        """The key of the last id that stays, in `_threshold`, and how many ids of that key stay, in `_keep_equal`."""
        num_rows = len(logits)
        top_k = np.where((sampling.temperature > 0) & (sampling.top_k < self._vocab), sampling.top_k, 0)
        sizes = {"BITS": bits, "MAX_CHUNKS": self._max_chunks}
        k, p = self._upload(top_k), self._upload(sampling.top_p)
        wanted = self._upload(top_k.astype(np.float32))
        first = self._top_k_threshold if has_p else self._threshold
        if has_k:
            self._search(logits, temperature, wanted, first, None, bits=bits, mass=False)
        else:
            self._tally(logits, temperature, wanted, first, None, bits=bits, passes=0)
        kernels.settle_top_k[(num_rows,)](
            self._best, temperature, k, p, first, self._above, self._equal, self._mass, self._keep_equal,
            self._wanted_mass, self._num_chunks, **sizes,
        )  # fmt: skip
        if not has_p:
            return
        self._search(logits, temperature, self._wanted_mass, self._threshold, first, bits=bits, mass=True)
        kernels.settle_top_p[(num_rows,)](
            self._best, temperature, self._wanted_mass, first, self._threshold, self._mass, self._equal,
            self._keep_equal, self._num_chunks, **sizes,
        )  # fmt: skip

    def _search(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        wanted: torch.Tensor,
        thresholds: torch.Tensor,
        floors: torch.Tensor | None,
        *,
        bits: int,
        mass: bool,
    ) -> None:
        passes = bits // 4
        for number in range(passes):
            kernels.search[(len(logits), self._num_chunks)](
                logits, self._best, temperature, wanted, self._lows, self._counts[1 - number % 2],
                self._counts[number % 2], self._vocab, self._num_chunks, number, bits - 4 - 4 * number,
                BITS=bits, MASS=mass, CHUNK=self._chunk, MAX_CHUNKS=self._max_chunks, WAYS=kernels.WAYS,
            )  # fmt: skip
        self._tally(logits, temperature, wanted, thresholds, floors, bits=bits, passes=passes)

    def _tally(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        wanted: torch.Tensor,
        thresholds: torch.Tensor,
        floors: torch.Tensor | None,
        *,
        bits: int,
        passes: int,
    ) -> None:
        kernels.tally[(len(logits), self._num_chunks)](
            logits, self._best, temperature, wanted, self._lows, self._counts[1 - passes % 2], thresholds,
            thresholds if floors is None else floors, self._above, self._equal, self._mass, self._vocab,
            self._num_chunks, passes, BITS=bits, HAS_FLOOR=floors is not None, CHUNK=self._chunk,
            MAX_CHUNKS=self._max_chunks, WAYS=kernels.WAYS,
        )  # fmt: skip

    def _upload(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
        """A copy on the device; from pinned memory, so that the host does not wait."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host.clone()


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
