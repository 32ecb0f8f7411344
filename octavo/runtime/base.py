"""What runs a program. A Runtime owns the packed weights, the activation buffers, the KV cache and the sampler.

It receives host arrays and returns host arrays; it knows nothing of requests. Three implementations: `reference`
(numpy, float32: the definition), `native` (C++), `cuda` (torch, Triton).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from octavo.errors import StepError, UnsupportedError
from octavo.program.profile import Profile
from octavo.program.program import Program

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
CERTAIN = 1e30  # a bias that no logit overcomes


@dataclass(slots=True)
class Tensor:
    """A tensor of the checkpoint on the host, as stored.

    `type` is a GGUF type name: "F32", "F16", "BF16", "Q4_1", ... Float types: `data` has the logical shape (BF16 as
    uint16 bit patterns). Block-quantised types: `data` is uint8 [rows, bytes per row].
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(self.data.nbytes)


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """How a tensor of random weights is distributed: normal."""

    mean: float
    standard_deviation: float
    seed: int  # of this tensor alone


class WeightSource(Protocol):
    """Where parameters come from: safetensors, GGUF, or seeded random numbers."""

    def get(self, part: str) -> Tensor:
        """The tensor with this canonical name, in logical order (q/k rows unpermuted, Conv1D transposed)."""
        ...

    def type_of(self, part: str) -> str:
        """Its stored type name, without reading it."""
        ...


@runtime_checkable
class RandomSource(WeightSource, Protocol):
    """Weights that are random numbers, which a runtime may draw where they are to lie."""

    def random(self, part: str) -> RandomTensor:
        """How this tensor is drawn."""
        ...


@dataclass(slots=True)
class StepInputs:
    """One step for the program. C-contiguous. T tokens, B requests, R positions to go to the end, G KV groups."""

    token_ids: Int32  # [T]; -1 - row: what that row sampled last, in a step that may still run
    positions: Int32  # [T]
    slots: Int64  # [G, T]: where each token's K and V are written
    query_start_loc: Int32  # [B + 1]
    seq_lens: Int32  # [B]: KV length of each request after this step
    block_tables: Int32  # [G, B, max blocks per request]
    logits_indices: Int32  # [R]: which of the T tokens
    num_states: int = 0  # of the last of these: only their final states are wanted, no logits


@dataclass(slots=True)
class SamplingInputs:
    """How each of the R positions with logits chooses its token. C-contiguous. Ragged parts as (start [R + 1], values).

    The order of stages is fixed (runtime/reference/sampler.py is the definition): bias, mask, penalties, temperature,
    top-k, top-p, min-p, draw. Noise is one uniform number from (seed, position).
    """

    temperature: Float32  # [R]; 0 is greedy
    top_k: Int32  # [R]; 0 is off
    top_p: Float32  # [R]; 1 is off
    min_p: Float32  # [R]; 0 is off
    seeds: UInt64  # [R]
    positions: Int64  # [R]: index of the token being drawn within its request, the counter of the noise
    num_logprobs: Int32  # [R]; -1 none, 0 the sampled token's alone, k its k alternatives too
    bias_start: Int32  # [R + 1]
    bias_ids: Int32
    bias_values: Float32  # added to the logits; -inf bans
    repetition_penalty: Float32  # [R]; 1 is off
    presence_penalty: Float32  # [R]; 0 is off
    frequency_penalty: Float32  # [R]; 0 is off
    seen_start: Int32  # [R + 1]: distinct tokens seen, for rows with penalties only
    seen_ids: Int32
    seen_counts: Int32  # how often generated; 0 means in the prompt only
    mask_of: Int32 | None = None  # [R]: which of `masks` holds for a row; -1: none. None: no row has one
    masks: UInt32 | None = None  # [M, ceil(vocab / 32)]: bit i of word w allows token 32 w + i; others become -inf
    rows: Int32 | None = None  # [R]: where the tokens are kept for later steps; -1 and None: nowhere

    @classmethod
    def greedy(cls, num_rows: int) -> SamplingInputs:
        """The most likely token of each row, and nothing else."""
        return cls(
            temperature=np.zeros(num_rows, np.float32),
            top_k=np.zeros(num_rows, np.int32),
            top_p=np.ones(num_rows, np.float32),
            min_p=np.zeros(num_rows, np.float32),
            seeds=np.zeros(num_rows, np.uint64),
            positions=np.zeros(num_rows, np.int64),
            num_logprobs=np.full(num_rows, -1, np.int32),
            bias_start=np.zeros(num_rows + 1, np.int32),
            bias_ids=np.zeros(0, np.int32),
            bias_values=np.zeros(0, np.float32),
            repetition_penalty=np.ones(num_rows, np.float32),
            presence_penalty=np.zeros(num_rows, np.float32),
            frequency_penalty=np.zeros(num_rows, np.float32),
            seen_start=np.zeros(num_rows + 1, np.int32),
            seen_ids=np.zeros(0, np.int32),
            seen_counts=np.zeros(0, np.int32),
        )

    def followed_by(self, token_ids: Int32, num_logprobs: Int32) -> SamplingInputs:
        """The same with rows behind them whose token is given, so that its log probability is told."""
        added = SamplingInputs.greedy(len(token_ids))
        added.num_logprobs = num_logprobs
        added.rows = np.full(len(token_ids), -1, np.int32)
        added.bias_start, added.bias_ids = np.arange(len(token_ids) + 1, dtype=np.int32), token_ids
        added.bias_values = np.full(len(token_ids), CERTAIN, np.float32)
        joined = {}
        for name in ARRAYS:
            mine, theirs = getattr(self, name), getattr(added, name)
            if name.endswith("_start"):
                theirs = theirs[1:] + mine[-1]
            joined[name] = np.concatenate((mine, theirs))
        return SamplingInputs(**joined)


ARRAYS = tuple(f.name for f in fields(SamplingInputs) if f.name not in ("mask_of", "masks"))


@dataclass(slots=True)
class SamplerOutput:
    """Tokens for the R positions; K is the largest num_logprobs asked for (0 when none)."""

    token_ids: Int32  # [R]
    logprobs: Float32  # [R]: of the sampled token, raw distribution (NaN where not asked for)
    ranks: Int32  # [R]: 1 is the most likely (0 where not asked for)
    top_ids: Int32  # [R, K], best first
    top_logprobs: Float32  # [R, K]
    foreign_seconds: float = 0.0  # inside compiled code, where a call returns when its work is done
    states: Float32 | None = None  # [num_states, hidden_size]: normed where the model norms them; where asked for

    @classmethod
    def without_logprobs(cls, token_ids: Int32, num_logprobs: Int32) -> SamplerOutput:
        """Tokens, and room for the log probabilities that `num_logprobs` [R] asks for."""
        num_rows, most = len(token_ids), int(max(0, num_logprobs.max(initial=0)))
        return cls(
            token_ids=token_ids,
            logprobs=np.full(num_rows, np.nan, np.float32),
            ranks=np.zeros(num_rows, np.int32),
            top_ids=np.full((num_rows, most), -1, np.int32),
            top_logprobs=np.full((num_rows, most), np.nan, np.float32),
        )


class Runtime(Protocol):
    """Runs one program. Calls come from one thread, in this order: load, rehearse, allocate_kv, then
    (execute, sample)*. rehearse() may be left out: then free_bytes() does not know what a step takes.

    What has a body here is right for one that computes in the host's memory before its calls return."""

    name: str
    num_foreign_calls: int  # calls into compiled code so far; one per step
    max_depth: int  # steps in flight: results may be asked for so many steps late. 1: no token_ids below 0

    def load(
        self,
        program: Program,
        weights: WeightSource,
        *,
        dtype: str,
        max_num_tokens: int,
        max_num_logits: int,
        max_num_requests: int,
    ) -> str:
        """Packs the weights and plans the buffers; says what runs: "native (portable, 2 threads, float32)".

        `dtype` is how matrices are kept: "float32"; "bfloat16", rounded to nearest even; "quantized", each part in its
        stored block type, float types as bfloat16. With the latter two a weight's value is bf16(dequantised), a Linear
        rounds its activations to bf16, and sums are float32. "int8": as runtime/reference/int8.py defines.
        Raises MemoryPlanError, ModelFileError."""
        ...

    def weight_bytes(self, program: Program, weights: WeightSource, dtype: str) -> int:
        """Bytes that load() would make resident, without reading any tensor."""
        ...

    def arena_bytes(self, program: Program, max_num_tokens: int, max_num_logits: int) -> int:
        """Bytes of everything but weights and KV that load() reserves for the largest step."""
        ...

    def free_bytes(self, utilization: float) -> int | None:
        """Bytes its own device may give it, when it may use this share of the device's memory.

        None where weights and KV lie in the host's memory.
        """
        return None

    def kv_bytes_per_block(self, program: Program, block_size: int, dtype: str = "float32") -> int:
        """Bytes of one KV block over all layers."""
        ...

    def rehearse(self, block_size: int, dtype: str = "float32") -> None:
        """Runs the largest step once, where memory is the device's own: then free_bytes() is what KV may take."""
        return

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: str = "float32", num_host_blocks: int = 0) -> None:
        """Reserves the pool, and blocks in host memory with the ids behind it, which only copy_blocks() takes.
        Untouched blocks cost no resident memory. `dtype` is how K and V are kept: "float32", "bfloat16", "int8" with
        one float32 scale per token and KV head, or "fp8" (e4m3). The narrow ones round queries and softmax weights to
        bfloat16 too. Raises UnsupportedError for one that it does not keep."""
        ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole KV blocks (from, to), in all layers and in this order, before the next execute(). Nothing waits
        for a device: what saves blocks to host memory, or loads them, is part of the step."""
        ...

    def execute(self, inputs: StepInputs) -> None:
        """Runs the program. A runtime may defer the work to sample(), to make both one foreign call."""
        ...

    def sample(self, sampling: SamplingInputs) -> SamplerOutput:
        """Chooses one token for each of the R positions of the last execute(). R may be 0; the step still runs."""
        ...

    def sample_later(self, sampling: SamplingInputs) -> Callable[[], SamplerOutput]:
        """Like sample(), but nothing waits: what it returns does, once, in the order of the steps."""
        output = self.sample(sampling)
        return lambda: output

    def logits(self) -> Float32:
        """A copy of the last step's raw logits [R, vocab], after sample()."""
        ...

    def start_profile(self) -> None:
        """Measures the machine's limits, then the time of every node of each step until stop_profile().
        Raises UnsupportedError where it cannot."""
        raise UnsupportedError(f"the {self.name} runtime has no profile of its nodes: take --runtime native")

    def stop_profile(self) -> Profile:
        """What was measured since start_profile(). Steps pay nothing from here on. Raises StepError without it."""
        raise StepError("stop_profile() without start_profile()")

    def close(self) -> None:
        """Frees everything; threads end."""
        ...
