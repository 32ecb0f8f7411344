"""CudaRuntime: the Runtime protocol over torch and Triton. A decode step is a copy, a graph replay and a copy back."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection
from functools import partial

import torch

from octavo.config import FUSIONS
from octavo.errors import MemoryPlanError, StepError, UnsupportedError
from octavo.program.ops import Attention, Experts, Linear, Rows
from octavo.program.program import Program
from octavo.runtime.base import Float32, Runtime, SamplerOutput, SamplingInputs, StepInputs, WeightSource
from octavo.runtime.cuda import graphs, operators
from octavo.runtime.cuda.backend import AttentionBackend
from octavo.runtime.cuda.host import HostBlocks
from octavo.runtime.cuda.launches import Arena, KVPool, Launch, Launches
from octavo.runtime.cuda.launching import compile_kernels, quick_launches
from octavo.runtime.cuda.null_steps import adjusting, null_sampling, null_step
from octavo.runtime.cuda.packing import pack, packed_bytes
from octavo.runtime.cuda.results import Results, output_of, output_of_nobody
from octavo.runtime.cuda.sampler import Sampler
from octavo.runtime.cuda.staging import DeviceStep, Settings, Staging, padded_views, send_padded, send_step

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FP8 = torch.float8_e4m3fn  # how "fp8" keeps K and V, with a scale of one
_FP8_CAPABILITY = (8, 9)  # from which on cards convert it
_RESERVE = 1 << 30  # bytes for cuBLAS, graphs and kernels in the plan made before anything is loaded
_FOR_GRAPHS = 1 << 28  # bytes that KV leaves to the graphs, which are captured after it


class CudaRuntime(Runtime):
    """On one device; matrices, activations and KV in `dtype`, sums in float32.

    Args:
        dtype: "bfloat16" or "float32" (no TF32).
        use_graphs: replay decode steps, and small steps with prompts, as CUDA graphs.
        device: "cuda", or "cpu" to run the kernels under Triton's interpreter.
        max_depth: steps that may be in flight.
        fusions: those of FUSIONS that are on; without one, what it joins runs apart.
        attention_backend: "auto", "triton" or "cuda", see AttentionBackend.
        cuda_ops: "triton", or "cuda" for C++ norms and activations (bfloat16 only), built if need be.

    Raises:
        UnsupportedError: another dtype, or one that the C++ operators have not.
    """

    name = "cuda"

    def __init__(
        self, dtype: str = "bfloat16", *, use_graphs: bool = True, device: str = "cuda", max_depth: int = 2,
        fusions: Collection[str] = FUSIONS, attention_backend: str = "auto", cuda_ops: str = "triton",
    ) -> None:  # fmt: skip
        if cuda_ops == "cuda" and dtype != "bfloat16":
            raise UnsupportedError(f"--cuda-ops cuda: the C++ operators compute in bfloat16, not {dtype}: take triton")
        self._fusions, self._uses_cpp = fusions, cuda_ops == "cuda"
        self._dtype = _torch_dtype(dtype)
        self._device = torch.device(device)
        self._backend = AttentionBackend(attention_backend, self._dtype, self._device)
        self.max_depth = max_depth
        self.num_foreign_calls = 0
        self.num_replays = 0  # steps that ran as a graph
        self._graphs = graphs.Graphs() if use_graphs and self._device.type == "cuda" else None
        self._launched: set[tuple[graphs.Shape, str]] = set()  # what its kernels are loaded for
        self._padded: dict[graphs.Shape, DeviceStep] = {}  # the views of what its graphs read
        self._program: Program | None = None
        self._launches: list[Launch] = []
        self._kv = KVPool([], [])
        self._weights: dict[tuple[str, ...], torch.Tensor] = {}
        self._inputs: StepInputs | None = None
        self._settings: Settings | None = None  # of the last step's rows
        self._num_logits = 0

    def load(
        self, program: Program, weights: WeightSource, *, dtype: str, max_num_tokens: int, max_num_logits: int,
        max_num_requests: int,
    ) -> str:  # fmt: skip
        """Puts the weights on the device, reserves every buffer of the largest step, prepares the launches.

        Raises:
            UnsupportedError: a dtype other than the one this runtime was made for; a mixture of experts.
            MemoryPlanError: the device has no room.
            ModelFileError: a tensor of an unexpected shape.
        """
        self._check_dtype(dtype)
        for node in program.nodes:
            if isinstance(node, Experts):
                raise UnsupportedError(f"{node.label}: the cuda runtime has no experts (MoE): take --runtime native")
        self._program = program
        self._limits = (max_num_tokens, max_num_logits, max_num_requests)
        num_weights = sum(math.prod(weight.shape) for weight in program.weights)
        self._most_mixed = min(max_num_tokens, graphs.most_mixed_tokens(num_weights))
        try:
            for weight in program.weights:
                self._weights[weight.parts] = pack(weight, weights, self._dtype, self._device)
            self._arena = Arena(program, max_num_tokens, max_num_logits, self._dtype, self._device)
            self._sampler = Sampler(max_num_logits, program.vocab_size, self._device, num_rows_kept=max_num_requests)
            row_tokens = self._sampler.row_tokens
            self._launches = Launches(
                program, self._weights, self._arena, self._kv, max_num_requests, row_tokens, self._backend,
                fusions=self._fusions, uses_cpp=self._uses_cpp,
            ).make()  # fmt: skip
            self._results = Results(self._sampler.tokens, self.max_depth + 1)
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(f"the device has no room for the weights: {error}") from None
        notes = ", C++ operators" * self._uses_cpp + ", no graphs" * (self._graphs is None)
        return f"cuda ({self._device_name()}, {dtype}{notes})"

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
        """What is free on the device, less the share of all its memory that others are to keep and room for graphs."""
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return max(int(free - (1 - utilization) * total) - _FOR_GRAPHS, 0)

    def kv_bytes_per_block(self, program: Program, block_size: int, dtype: str | None = None) -> int:
        """Bytes of one KV block over all layers."""
        return program.kv_elements_per_block(block_size) * self._kv_type(dtype).itemsize

    def rehearse(self, block_size: int, dtype: str | None = None) -> None:
        """Compiles the kernels, then runs the largest prompt and captures the largest decode, on a KV pool of nothing.

        Raises MemoryPlanError: the device has no room for them.
        """
        if self._device.type != "cuda":
            return
        most_tokens, _, most_rows = self._limits
        most = min(self._limits)
        try:
            self._make_pool(0, block_size, dtype, waits=False)
            with torch.inference_mode():
                compile_kernels(self._launch_null_steps, self._warm_products)
            self._drop_pool()
            self._make_pool(0, block_size, dtype)
            self._measure_products()
            length = min(most_tokens, self._loaded().max_model_len)
            prompts = [length] * min(most_tokens // length, most_rows)
            for counts in (prompts, [1] * most):
                self._run_null_step(counts, graphs.DRAWS)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(f"the device has no room for the largest step: {error}") from None
        self._drop_pool()

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: str | None = None, num_host_blocks: int = 0) -> None:
        """Reserves the pool, one block more than asked for: padding rows of graphs write there. Captures the graphs.

        Raises:
            MemoryPlanError: the device has no room.
            UnsupportedError: a KV type other than the one computed in and fp8.
        """
        try:
            self._make_pool(num_blocks, block_size, dtype)
            self._blocks = HostBlocks(self._kv.tensors, num_host_blocks, num_blocks)
            if self._device.type == "cuda":
                for size in graphs.buckets(min(self._limits)):
                    for ending in (graphs.GREEDY, graphs.DRAWS):
                        self._run_null_step([1] * size, ending)
                torch.cuda.synchronize()
                gc.freeze()  # else a collection now and then looks through all of torch: a step waits 50 ms for it
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(
                f"the device has no room for {num_blocks} KV blocks and the graphs of its steps: lower "
                f"--gpu-memory-utilization, --num-gpu-blocks-override or --max-num-seqs: {error}"
            ) from None
        self.num_replays = self.num_foreign_calls = 0

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole KV blocks (from, to) in all layers, one pair after the other, without waiting."""
        with torch.inference_mode(), quick_launches():
            self._blocks.copy(pairs)

    def execute(self, inputs: StepInputs) -> None:
        """Takes the step. It is launched by sample(), so that inputs and sampling cross the bus in one piece."""
        self._loaded()
        self._inputs = inputs
        self.num_foreign_calls += 1

    def sample(self, sampling: SamplingInputs) -> SamplerOutput:
        """Runs the step, chooses one token for each of its R positions, and waits for them."""
        return self.sample_later(sampling)()

    def sample_later(self, sampling: SamplingInputs) -> Callable[[], SamplerOutput]:
        """Launches the step and the choice of its tokens. Only what this returns waits for the device.

        Raises StepError without execute().
        """
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise StepError("sample() without execute()")
        self._num_logits = len(inputs.logits_indices) - inputs.num_states
        settings = self._settings_of(sampling)
        ending = _ending(sampling, settings)
        shape = self._shape(inputs) if self._graphs is not None else None
        step = self._send_padded(inputs, sampling, shape) if shape is not None else None
        if step is not None and shape is not None:
            self._replay(step, shape, ending)
        else:
            step = self._send(inputs, sampling)
            self._launch_quickly(step, ending)
        if not len(inputs.logits_indices):
            return partial(output_of_nobody, self._results.fetch(0))
        fill = states = None
        if ending == graphs.LOGITS:
            with torch.inference_mode(), quick_launches():
                self._launch_adjusted(self._logits_on_device(), step, sampling)
        if settings.tells:
            with torch.inference_mode():
                fill = self._sampler.logprobs(self._logits_on_device(), sampling)
        if inputs.num_states:
            states = self._states(inputs)
        return partial(output_of, self._results.fetch(self._num_logits), sampling, fill, states)

    def logits(self) -> Float32:
        """A copy of the last step's raw logits [R, vocab]."""
        values: Float32 = self._logits_on_device().float().cpu().numpy().copy()
        return values

    def close(self) -> None:
        """Lets go of everything on the device."""
        self._program = None
        self._launches.clear()
        self._weights.clear()
        for name in ("_arena", "_sampler", "_staging", "_results", "_blocks"):
            self.__dict__.pop(name, None)
        self._drop_pool()
        self._graphs = None
        gc.unfreeze()

    def _make_pool(self, num_blocks: int, block_size: int, dtype: str | None, *, waits: bool = True) -> None:
        program, kv_type = self._loaded(), self._kv_type(dtype)
        max_tokens, max_logits, max_requests = self._limits
        self._null_block, self._block_size = num_blocks, block_size
        layers = [n for n in program.nodes if isinstance(n, Attention)]
        self._tile_queries = self._backend.prepare(layers, block_size, kv_type.itemsize, waits=waits)
        for layer in program.kv_places:
            shape = (num_blocks + 1, layer.num_kv_heads, block_size, layer.head_dim)
            for pool in (self._kv.keys, self._kv.values):
                pool.append(torch.empty(shape, dtype=kv_type, device=self._device))
                pool[-1][num_blocks].zero_()
        max_blocks = -(-program.max_model_len // block_size)
        capacity = Staging.capacity(max_tokens, max_logits, max_requests, program.num_kv_groups, max_blocks)
        self._staging = Staging(capacity, self.max_depth + 1, self._device)

    def _drop_pool(self) -> None:
        """Undoes _make_pool(), and drops the graphs, which hold its addresses."""
        if self._graphs is not None:
            self._graphs.clear()
        self._launched.clear()
        self._padded.clear()
        self._kv.keys.clear()
        self._kv.values.clear()
        torch.cuda.empty_cache()

    def _launch_null_steps(self) -> None:
        """One step for each kernel that serving may need: which one it is depends on the number of rows."""
        most_tokens = self._limits[0]
        mixed = [
            graphs.Shape(size, rows, is_decode=False)
            for size in ((64, 256) if self._graphs is not None else ())
            for rows in graphs.mixed_rows(min(self._limits))
            if size <= self._most_mixed
        ]
        for ending in (graphs.GREEDY, graphs.DRAWS):
            for counts in ([min(64, most_tokens)], *([1] * size for size in graphs.buckets(min(self._limits)))):
                self._launch(self._send(self._null_step(counts), null_sampling(len(counts), ending)), ending)
            for shape in mixed:
                counts = [3, 1][: shape.num_rows]
                if step := self._send_padded(self._null_step(counts), null_sampling(len(counts), ending), shape):
                    self._launch(step, ending)
            sampling = adjusting(null_sampling(1, ending), self._loaded().vocab_size)
            step = self._send(self._null_step([1]), sampling)
            self._launch_adjusted(self._arena.view(self._loaded().logits)[:1], step, sampling)
        HostBlocks(self._kv.tensors, 0, 1).copy([(0, 0)])

    def _products(self) -> list[Linear]:
        """One of each shape, of those that a step's tokens go through."""
        nodes = [n for n in self._loaded().nodes if isinstance(n, Linear) and n.out.rows is Rows.TOKENS]
        return list({n.weight.shape: n for n in nodes}.values())

    def _warm_products(self) -> None:
        """cuBLAS chooses and loads a kernel for a shape when first asked: up to 20 ms in steps that are captured."""
        for size in graphs.mixed_sizes(self._most_mixed):
            for node in self._products():
                torch.mm(self._arena.view(node.x)[:size], self._weights[node.weight.parts].t())

    def _measure_products(self) -> None:
        """Which of cuBLAS's kernels is the fastest in decodes, of weights that take some time to read."""
        large = [n for n in self._products() if math.prod(n.weight.shape) >= 1 << 24]
        is_there = self._backend.has_cpp and self._dtype == torch.bfloat16
        for size in [n for n in graphs.buckets(min(self._limits)) if n > 32] if is_there else ():
            for node in large:
                x, weight = self._arena.view(node.x)[:size], self._weights[node.weight.parts]
                operators.multiply(x, weight, x.new_empty(size, len(weight)), measures=True)

    def _null_step(self, counts: list[int]) -> StepInputs:
        return null_step(counts, self._null_block, self._block_size, self._loaded().num_kv_groups)

    def _run_null_step(self, counts: list[int], ending: str) -> None:
        """Runs a step that means nothing; a decode is captured by it, if it was not."""
        self.execute(self._null_step(counts))
        self.sample_later(null_sampling(len(counts), ending))()

    def _shape(self, inputs: StepInputs) -> graphs.Shape | None:
        """What the step is padded to for a graph; None where it has to be launched piece by piece."""
        num_tokens, num_requests = len(inputs.token_ids), len(inputs.seq_lens)
        if inputs.num_states or not num_requests or len(inputs.logits_indices) > num_requests:
            return None
        all_sample = num_requests == num_tokens == len(inputs.logits_indices)
        if all_sample and inputs.logits_indices.tobytes() == inputs.query_start_loc[:-1].tobytes():  # in their order
            size = graphs.bucket_of(num_requests, min(self._limits))
            return graphs.Shape(size, size, is_decode=True)
        return graphs.mixed_shape(num_tokens, num_requests, self._most_mixed, min(self._limits))

    def _settings_of(self, sampling: SamplingInputs) -> Settings:
        if self._settings is None or not self._settings.are_of(sampling):
            self._settings = Settings(sampling, self._limits[2])
        return self._settings

    def _send(self, inputs: StepInputs, sampling: SamplingInputs) -> DeviceStep:
        settings = self._settings_of(sampling)
        return send_step(self._staging, inputs, sampling, settings, tile_queries=self._tile_queries)

    def _send_padded(self, inputs: StepInputs, sampling: SamplingInputs, shape: graphs.Shape) -> DeviceStep | None:
        spans = send_padded(
            self._staging, inputs, sampling, self._settings_of(sampling), shape, tile_queries=self._tile_queries,
            null_slot=self._null_block * self._block_size,
        )  # fmt: skip
        if spans is not None and shape not in self._padded:
            self._padded[shape] = padded_views(self._staging, spans, shape, self._tile_queries)
        return None if spans is None else self._padded[shape]

    def _replay(self, step: DeviceStep, shape: graphs.Shape, ending: str) -> None:
        """Runs a graph on what was sent. Of a decode it is captured after the first run, at start; of a step with
        prompts in front of the second, so that no step waits for both."""
        assert self._graphs is not None
        key = (shape, ending)
        launch = partial(self._launch_quickly, step, ending)
        if not (is_loaded := key in self._launched):
            launch()
            self._launched.add(key)
        if key not in self._graphs and (is_loaded or shape.is_decode):
            self._graphs.capture(key, launch)
        if is_loaded:
            self._graphs.replay(key)
            self.num_replays += 1

    def _launch(self, step: DeviceStep, ending: str) -> None:
        """Launches the program and, unless biases and penalties come between, what chooses the tokens."""
        for launch in self._launches:
            launch(step)
        if step.num_sampled and ending != graphs.LOGITS:
            logits = self._arena.view(self._loaded().logits)[: step.num_sampled]
            self._sampler.launch(logits, step.sampling, draws=ending == graphs.DRAWS)

    def _launch_quickly(self, step: DeviceStep, ending: str) -> None:
        with torch.inference_mode(), quick_launches():
            self._launch(step, ending)

    def _launch_adjusted(self, logits: torch.Tensor, step: DeviceStep, sampling: SamplingInputs) -> None:
        """Launches biases, masks and penalties, and what chooses the tokens after them."""
        draws = self._settings_of(sampling).draws
        self._sampler.launch(self._sampler.adjust(logits, sampling), step.sampling, draws=draws)

    def _states(self, inputs: StepInputs) -> torch.Tensor:
        """The last states that are wanted, on their way to the host."""
        hidden = self._arena.view(self._loaded().hidden)[self._num_logits : len(inputs.logits_indices)]
        return hidden.to("cpu", torch.float32, non_blocking=True, copy=True)

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
            if self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) < _FP8_CAPABILITY:
                raise UnsupportedError(
                    f"--kv-cache-dtype fp8: {self._device_name()} does not convert e4m3 (compute capability 8.9 and "
                    "later do): take --kv-cache-dtype auto"
                )
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


def _ending(sampling: SamplingInputs, settings: Settings) -> str:
    """How a step ends: biases, masks and penalties are not captured."""
    if len(sampling.bias_ids) or len(sampling.seen_ids) or sampling.masks is not None:
        return graphs.LOGITS
    return graphs.DRAWS if settings.draws else graphs.GREEDY
