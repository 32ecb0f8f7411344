"""CudaRuntime: the Runtime protocol over torch and Triton. A decode step is a copy, a graph replay and a copy back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from octavo.errors import MemoryPlanError, StepError, UnsupportedError
from octavo.program.ops import Attention
from octavo.program.profile import Profile
from octavo.program.program import Program
from octavo.runtime.base import Float32, LoadReport, SamplerOutput, SamplingInputs, StepInputs, WeightSource
from octavo.runtime.cuda.graphs import Graphs, bucket_of, buckets
from octavo.runtime.cuda.kernels.attention import queries_per_tile
from octavo.runtime.cuda.launches import Arena, KVPool, Launch, Launches
from octavo.runtime.cuda.packing import pack, packed_bytes
from octavo.runtime.cuda.sampler import Sampler
from octavo.runtime.cuda.staging import DeviceStep, Staging, send_step

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FP8 = torch.float8_e4m3fn  # how "fp8" keeps K and V, with a scale of one
_RESERVE = 1 << 30  # bytes for cuBLAS, graphs, kernels and what torch rounds up


class CudaRuntime:
    """Implements runtime.base.Runtime on one device; matrices, activations and KV in `dtype`, sums in float32.

    Args:
        dtype: "bfloat16" or "float32" (no TF32).
        use_graphs: replay decode-only steps as CUDA graphs.
        device: "cuda", or "cpu" to run the kernels under Triton's interpreter.

    Raises:
        UnsupportedError: another dtype.
    """

    name = "cuda"

    def __init__(self, dtype: str = "bfloat16", *, use_graphs: bool = True, device: str = "cuda") -> None:
        self._dtype = _torch_dtype(dtype)
        self._device = torch.device(device)
        self.num_foreign_calls = 0
        self.max_depth = 1
        self.num_replays = 0  # steps that ran as a graph
        self._graphs = Graphs() if use_graphs and self._device.type == "cuda" else None
        self._program: Program | None = None
        self._launches: list[Launch] = []
        self._kv = KVPool([], [])
        self._weights: dict[tuple[str, ...], torch.Tensor] = {}
        self._inputs: StepInputs | None = None
        self._num_logits = 0

    def load(
        self,
        program: Program,
        weights: WeightSource,
        *,
        dtype: str,
        max_num_tokens: int,
        max_num_logits: int,
        max_num_requests: int,
        progress: Callable[[int], None] | None = None,
    ) -> LoadReport:
        """Puts the weights on the device, reserves every buffer of the largest step, prepares the launches.

        Raises:
            UnsupportedError: a dtype other than the one this runtime was made for.
            MemoryPlanError: the device has no room.
            ModelFileError: a tensor of an unexpected shape.
        """
        self._check_dtype(dtype)
        self._program = program
        self._limits = (max_num_tokens, max_num_logits, max_num_requests)
        try:
            for done, weight in enumerate(program.weights, start=1):
                self._weights[weight.parts] = pack(weight, weights, self._dtype, self._device)
                if progress is not None:
                    progress(done)
            self._arena = Arena(program, max_num_tokens, max_num_logits, self._dtype, self._device)
            self._launches = Launches(program, self._weights, self._arena, self._kv, max_num_requests).make()
            self._sampler = Sampler(max_num_logits, program.vocab_size, self._dtype, self._device)
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(f"the device has no room for the weights: {error}") from None
        return LoadReport(
            weight_bytes=self.weight_bytes(program, weights, dtype),
            arena_bytes=self.arena_bytes(program, max_num_tokens, max_num_logits),
            description=f"cuda ({self._device_name()}, {dtype}{'' if self._graphs else ', no graphs'})",
        )

    def weight_bytes(self, program: Program, weights: WeightSource, dtype: str) -> int:
        """Bytes that load() would make resident, from shapes alone."""
        self._check_dtype(dtype)
        return sum(packed_bytes(weight, self._dtype) for weight in program.weights)

    def arena_bytes(self, program: Program, max_num_tokens: int, max_num_logits: int) -> int:
        """Activations of the largest step, the sampler's copy of the logits, and room for libraries and graphs."""
        elements = Arena.elements(program, max_num_tokens, max_num_logits)
        adjusted = Sampler.adjusted_bytes(max_num_logits, program.vocab_size)
        return elements * self._dtype.itemsize + adjusted + (_RESERVE if self._device.type == "cuda" else 0)

    def free_bytes(self, utilization: float) -> int | None:
        """What is free on the device, less the share of all its memory that others are to keep."""
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return max(int(free - (1 - utilization) * total), 0)

    def kv_bytes_per_block(self, program: Program, block_size: int, dtype: str | None = None) -> int:
        """Bytes of one KV block over all layers."""
        return program.kv_elements_per_block(block_size) * self._kv_type(dtype).itemsize

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: str | None = None) -> None:
        """Reserves the pool, one block more than asked for: padding rows of graphs write there.

        Raises:
            MemoryPlanError: the device has no room.
            UnsupportedError: a KV type other than the one computed in and fp8.
        """
        kv_type = self._kv_type(dtype)
        program = self._loaded()
        max_tokens, max_logits, max_requests = self._limits
        self._null_slot, self._block_size = num_blocks * block_size, block_size
        try:
            for layer in program.kv_layers:
                shape = (num_blocks + 1, layer.num_kv_heads, block_size, layer.head_dim)
                for pool in (self._kv.keys, self._kv.values):
                    pool.append(torch.empty(shape, dtype=kv_type, device=self._device))
                    pool[-1][num_blocks].zero_()
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(f"the device has no room for {num_blocks} KV blocks: {error}") from None
        max_blocks = -(-program.max_model_len // block_size)
        capacity = Staging.capacity(max_tokens, max_logits, max_requests, program.num_kv_groups, max_blocks)
        self._staging = Staging(capacity, self._device)
        tiles = [
            queries_per_tile(n.head_dim, n.num_heads // n.num_kv_heads, self._dtype.itemsize)
            for n in program.nodes
            if isinstance(n, Attention)
        ]
        if len(set(tiles)) > 1:
            raise UnsupportedError("the cuda runtime needs attention layers of one shape: take --runtime native")
        self._tile_queries = tiles[0] if tiles else 1

        self._warm_up(num_blocks)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole KV blocks (from, to) in all layers, one pair after the other."""
        for pool in (*self._kv.keys, *self._kv.values):
            for source, target in pairs:
                pool[target].copy_(pool[source])

    def execute(self, inputs: StepInputs) -> None:
        """Sends the inputs and launches the program; nothing waits for the device."""
        program = self._loaded()
        self._num_logits = len(inputs.logits_indices)
        num_requests = len(inputs.seq_lens)
        is_decode = len(inputs.token_ids) == num_requests == self._num_logits
        send = partial(send_step, self._staging, inputs, tile_queries=self._tile_queries)
        self.num_foreign_calls += 1
        with torch.inference_mode():
            if self._graphs is None or not is_decode or program.num_kv_groups > 1:
                self._launch(send())
                return
            bucket = bucket_of(num_requests, min(self._limits))
            step = send(pad_to=bucket, null_slot=self._null_slot)
            if bucket in self._graphs:
                self._graphs.replay(bucket)
                self.num_replays += 1
            else:
                self._launch(step)
                self._graphs.capture(bucket, partial(self._launch, step))

    def sample(self, sampling: SamplingInputs) -> SamplerOutput:
        """Chooses one token for each of the R positions of the last execute(), and waits for them."""
        logits = self._logits_on_device()
        if not len(logits):
            return _nothing()
        with torch.inference_mode():
            tokens = self._sampler.choose(logits, sampling)
            return self._sampler.with_logprobs(logits, tokens, sampling)

    def sample_later(self, sampling: SamplingInputs) -> Callable[[], SamplerOutput]:
        """sample(), and its result."""
        output = self.sample(sampling)
        return lambda: output

    def logits(self) -> Float32:
        """A copy of the last step's raw logits [R, vocab]."""
        values: Float32 = self._logits_on_device().float().cpu().numpy().copy()
        return values

    def start_profile(self) -> None:
        """Raises UnsupportedError: nodes are not timed one by one here."""
        raise UnsupportedError("the cuda runtime has no profile of its nodes: use a profiler of the card")

    def stop_profile(self) -> Profile:
        """Raises StepError: none was started."""
        raise StepError("stop_profile() without start_profile()")

    def close(self) -> None:
        """Lets go of everything on the device."""
        self._graphs = None
        self._program = None
        self._launches.clear()
        self._weights.clear()
        self._kv.keys.clear()
        self._kv.values.clear()
        for name in ("_arena", "_sampler", "_staging"):
            self.__dict__.pop(name, None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _warm_up(self, null_block: int) -> None:
        """Compiles and captures what serving will use: a prompt, then decode steps, the largest first."""
        if self._device.type != "cuda":
            return
        most = min(self._limits)
        sizes = buckets(most) if self._graphs is not None else [bucket_of(n, most) for n in (most, 8, 4, 2, 1)]
        prompt = min(self._limits[0], self._loaded().max_model_len, 64)
        for counts in ([prompt], *([1] * size for size in sizes)):
            self.execute(_null_step(counts, null_block, self._block_size, self._loaded().num_kv_groups))
            self.sample(greedy(len(counts)))
        self.num_replays = self.num_foreign_calls = 0

    def _launch(self, step: DeviceStep) -> None:
        for launch in self._launches:
            launch(step)

    def _logits_on_device(self) -> torch.Tensor:
        return self._arena.view(self._loaded().logits)[: self._num_logits]

    def _loaded(self) -> Program:
        if self._program is None:
            raise StepError("the cuda runtime has no program: load() comes first")
        return self._program

    def _check_dtype(self, dtype: str) -> None:
        if _torch_dtype(dtype) != self._dtype:
            raise UnsupportedError(f"this cuda runtime was made for {self._dtype}, not {dtype}")

    def _kv_type(self, dtype: str | None) -> torch.dtype:
        if dtype == "fp8":
            return _FP8
        if dtype is not None and _DTYPES.get(dtype) != self._dtype:
            raise UnsupportedError(f"--kv-cache-dtype {dtype}: the cuda runtime keeps KV as {self._dtype} or fp8 here")
        return self._dtype

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "Triton's interpreter"


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise UnsupportedError(f"the cuda runtime computes in {' or '.join(_DTYPES)}, not {dtype}")
    return _DTYPES[dtype]


def _nothing() -> SamplerOutput:
    """The result of a step in which nobody samples."""
    none = np.zeros(0, np.int32)
    empty = np.zeros((0, 0), np.int32)
    return SamplerOutput(none, np.zeros(0, np.float32), none, empty, empty.astype(np.float32))


def _null_step(counts: list[int], null_block: int, block_size: int, num_groups: int) -> StepInputs:
    """Prompts of these lengths whose KV lies, all of it, in the null block: its numbers mean nothing."""
    num_tokens, num_requests = sum(counts), len(counts)
    ends = np.cumsum(counts)
    width = -(-max(counts) // block_size)
    return StepInputs(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.zeros(num_tokens, np.int32),
        slots=np.full((num_groups, num_tokens), null_block * block_size, np.int64),
        query_start_loc=np.concatenate(([0], ends)).astype(np.int32),
        seq_lens=np.array(counts, np.int32),
        block_tables=np.full((num_groups, num_requests, width), null_block, np.int32),
        logits_indices=(ends - 1).astype(np.int32),
    )


def greedy(num_rows: int) -> SamplingInputs:
    """The plainest sampling of so many rows."""
    zeros, ints = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int32)
    none, starts = np.zeros(0, np.int32), np.zeros(num_rows + 1, np.int32)
    return SamplingInputs(
        temperature=zeros,
        top_k=ints,
        top_p=zeros + 1,
        min_p=zeros,
        seeds=np.zeros(num_rows, np.uint64),
        positions=np.zeros(num_rows, np.int64),
        num_logprobs=ints - 1,
        bias_start=starts,
        bias_ids=none,
        bias_values=zeros[:0],
        repetition_penalty=zeros + 1,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        seen_start=starts,
        seen_ids=none,
        seen_counts=none,
    )
