"""NativeRuntime: the Runtime protocol over the C++ library. All of a step happens in one foreign call."""

import ctypes
import time
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import StepError, UnsupportedError
from octavo.program.ops import AnyOp, Attention, Experts, Linear, Rows, Sizes
from octavo.program.profile import Limits, Profile
from octavo.program.program import Program
from octavo.runtime.base import Float32, Runtime, SamplerOutput, SamplingInputs, StepInputs, WeightSource
from octavo.runtime.native import library as lib
from octavo.runtime.native.packing import Packer
from octavo.runtime.native.table import Tables, build_tables

_FLOAT_BYTES = 4
_ARITHMETICS = ("float32", "bfloat16", "int8")  # whose limits are measured
_ROUNDED_ROWS = 16  # rows whose inputs a Linear lays out together (kRoundedRows there)
_SLOTS_OF_PIECE = 16  # slots of the KV cache that lie together (kGroup in native/kernels.h)

# What the library takes each array for; checked before any pointer is handed over.
_STEP_DTYPES: dict[str, type[np.generic]] = dict.fromkeys(lib.STEP_ARRAYS, np.int32) | {"slots": np.int64}
_SAMPLING_FIELDS = {name: "positions" if name == "sample_positions" else name for name in lib.SAMPLING_ARRAYS}
_SAMPLING_DTYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(lib.SAMPLING_ARRAYS, np.float32),
    **dict.fromkeys(("top_k", "num_logprobs", "bias_start", "bias_ids"), np.int32),
    **dict.fromkeys(("seen_start", "seen_ids", "seen_counts"), np.int32),
    "seeds": np.uint64,
    "sample_positions": np.int64,
}
_PER_ROW = (
    *("temperature", "top_k", "top_p", "min_p", "seeds", "sample_positions", "num_logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class NativeRuntime(Runtime):
    """On the CPU; matrices as float32, bfloat16 or stored blocks, the rest float32.

    Results do not depend on the number of threads, on batch mates, or on how a prompt is cut into chunks.

    Raises:
        UnsupportedError: an instruction level that this machine lacks.
        ConfigError: the library is missing or was built from other sources.
    """

    name = "native"

    def __init__(self, num_threads: int, level: str = "auto") -> None:
        self.level = lib.resolve_level(level)
        self.num_threads = num_threads
        self.num_foreign_calls = 0
        self.max_depth = 1
        self._library = lib.load_library()
        self._engine = ctypes.c_void_p()
        code = self._library.octavo_create(num_threads, self.level.encode(), ctypes.byref(self._engine))
        lib.check(self._library, code)
        self._finalizer = weakref.finalize(self, self._library.octavo_destroy, self._engine)
        self._program: Program | None = None
        self._tables: Tables | None = None
        self._step = lib.StepTable()
        self._step_pointer = ctypes.pointer(self._step)
        self._placed: dict[str, npt.NDArray[Any]] = {}  # arrays whose addresses stand in the step table
        self._inputs: StepInputs | None = None
        self._filled: tuple[StepInputs, SamplingInputs, SamplerOutput] | None = None  # what the step table is made of
        self._weight_bytes: dict[tuple[str, ...], int] = {}
        self._dtype = self._kv_dtype = "float32"
        self._profile: Profile | None = None

    def load(
        self, program: Program, weights: WeightSource, *, dtype: str, max_num_tokens: int, max_num_logits: int,
        max_num_requests: int,
    ) -> str:  # fmt: skip
        """Packs the weights with all threads and hands the program over.

        Raises:
            UnsupportedError: a dtype other than float32, bfloat16 and quantized.
            MemoryPlanError: the system refuses the memory.
            ModelFileError: a tensor of an unexpected shape.
        """
        _check_dtype(dtype)
        packer = Packer(self._library, program, weights, dtype)
        ids = packer.pack(self._handle())
        self._tables = build_tables(program, ids, (max_num_tokens, max_num_logits, max_num_requests))
        self._call(self._library.octavo_set_program, ctypes.byref(self._tables.program))
        self._program, self._weight_bytes, self._dtype = program, packer.bytes(), dtype
        return f"native ({self.level}, {self.num_threads} threads, {dtype})"

    def weight_bytes(self, program: Program, weights: WeightSource, dtype: str) -> int:
        """Bytes that load() would make resident, from shapes and stored types alone."""
        _check_dtype(dtype)
        return sum(Packer(self._library, program, weights, dtype).bytes().values())

    def arena_bytes(self, program: Program, max_num_tokens: int, max_num_logits: int) -> int:
        """Activations of the largest step in float32, those inside experts too, and the widest input of a Linear as
        packed weights want it; twice where steps may be cut into blocks, which have memory of their own."""
        copies = 2 if max_num_tokens >= 64 * self.num_threads else 1
        rows = {Rows.TOKENS: max_num_tokens, Rows.LOGITS: max_num_logits}
        inputs = [rows[node.x.rows] * node.x.width for node in program.nodes if isinstance(node, Linear)]
        sums = []
        for node in program.nodes:
            if isinstance(node, Experts):
                places, inner = _expert_places(node, rows[node.x.rows]), node.down.shape[1]
                inputs.append(places * max(node.x.width, inner))
                sums.append(places * (inner + node.out.width))
        elements = program.plan_buffers().elements(copies * max_num_tokens, max_num_logits) + max(sums, default=0)
        return elements * _FLOAT_BYTES + copies * max(inputs, default=0) * _rounded_bytes(self.level)

    def kv_bytes_per_block(self, program: Program, block_size: int, dtype: str = "float32") -> int:
        """Bytes of one KV block over all layers, with the padding of V and the scales of int8."""
        code = _kv_code(dtype)
        pieces: int = sum(self._library.octavo_kv_bytes(code, kv.num_kv_heads, kv.head_dim) for kv in program.kv_places)
        return pieces * block_size // _SLOTS_OF_PIECE

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: str = "float32", num_host_blocks: int = 0) -> None:
        """Reserves the pool; the system backs a block when it is first written."""
        self._call(self._library.octavo_allocate_kv, num_blocks + num_host_blocks, block_size, _kv_code(dtype))
        self._kv_dtype = dtype

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole KV blocks (from, to) in all layers."""
        flat = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self._call(self._library.octavo_copy_blocks, _address(flat), len(flat))

    def execute(self, inputs: StepInputs) -> None:
        """Keeps the inputs; sample() runs program and sampler in one foreign call."""
        self._inputs = inputs

    def sample(self, sampling: SamplingInputs) -> SamplerOutput:
        """Runs the step and chooses one token for each of the R positions.

        Handed the same two objects as last time, whose arrays may hold new numbers but none has been replaced, it looks
        at nothing again, and the results are in the same arrays too.

        Raises:
            NativeError: an index out of its bounds; nothing was touched.
            StepError: called without execute().
        """
        inputs, self._inputs = self._inputs, None
        if inputs is None:
            raise StepError("sample() without execute()")
        if self._filled is None or self._filled[0] is not inputs or self._filled[1] is not sampling:
            self._filled = None
            output = self._fill(self._step, inputs, sampling)
            self._filled = (inputs, sampling, output) if sampling.mask_of is None else None
        else:
            output = self._filled[2]
        self.num_foreign_calls += 1
        began = time.perf_counter()
        if self._profile is None:
            if code := self._library.octavo_step(self._handle(), self._step_pointer):
                lib.check(self._library, code)
        else:
            self._measured_step(self._profile, inputs)
        output.foreign_seconds = time.perf_counter() - began
        if inputs.num_states:
            assert self._program is not None
            output.states = self._copy(self._library.octavo_states, inputs.num_states, self._program.hidden.width)
        return output

    def logits(self) -> Float32:
        """A copy of the last step's raw logits [R, vocab]."""
        if self._program is None:
            raise StepError("logits() before load()")
        return self._copy(self._library.octavo_logits, self._step.num_logits, self._program.logits.width)

    def _copy(self, function: Any, num_rows: int, width: int) -> Float32:
        address = function(self._handle())
        if num_rows == 0:
            return np.empty((0, width), dtype=np.float32)
        values = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (num_rows, width))
        return values.copy()

    def start_profile(self) -> None:
        """Measures the machine's limits (half a second), then times every node of each step until stop_profile()."""
        if self._program is None:
            raise StepError("start_profile() before load()")
        rates = (ctypes.c_double * (1 + len(_ARITHMETICS)))()
        self._call(self._library.octavo_probe, rates)
        block_bytes = self.kv_bytes_per_block(self._program, _SLOTS_OF_PIECE, self._kv_dtype)
        kv_bytes = block_bytes / max(1, self._program.kv_elements_per_block(_SLOTS_OF_PIECE))
        limits = Limits(rates[0], dict(zip(_ARITHMETICS, rates[1:], strict=True)))
        kinds = [self._arithmetic(node) for node in self._program.nodes]
        self._profile = Profile(self._program, limits, lambda w: self._weight_bytes[w.parts], kv_bytes, kinds)

    def _arithmetic(self, node: AnyOp) -> str:
        """What a node's multiply-adds are of."""
        if isinstance(node, Attention):
            return "float32" if self._kv_dtype == "float32" else "bfloat16"
        if not isinstance(node, Linear | Experts) or node.weights[0].is_exact:
            return "float32"
        return {"quantized": "bfloat16"}.get(self._dtype, self._dtype)

    def stop_profile(self) -> Profile:
        """What was measured since start_profile(). Steps pay nothing from here on."""
        profile, self._profile = self._profile, None
        return profile or super().stop_profile()

    def close(self) -> None:
        """Frees everything; threads end. Further calls raise StepError."""
        self._finalizer()
        self._engine = ctypes.c_void_p()
        self._tables = None

    def _measured_step(self, profile: Profile, inputs: StepInputs) -> None:
        assert self._program is not None
        times = np.zeros((len(self._program.nodes) + 1, 2), dtype=np.int64)
        self._step.out_times = _address(times)
        try:
            self._call(self._library.octavo_step, self._step_pointer)
        finally:
            self._step.out_times = None
        attended = float(inputs.positions.mean()) + 1 if len(inputs.positions) else 0.0
        sizes = Sizes(len(inputs.token_ids), len(inputs.logits_indices), attended, len(inputs.seq_lens))
        profile.add(sizes, [(ns, barriers) for ns, barriers in times.tolist()])

    def _handle(self) -> ctypes.c_void_p:
        if not self._engine:
            raise StepError("the native runtime is closed")
        return self._engine

    def _call(self, function: Any, *arguments: Any) -> None:
        lib.check(self._library, function(self._handle(), *arguments))

    def _fill(self, step: lib.StepTable, inputs: StepInputs, sampling: SamplingInputs) -> SamplerOutput:
        """Writes a step into the table; returns the arrays that its results will be in."""
        self._fill_inputs(step, inputs)
        self._fill_sampling(step, sampling, step.num_logits)
        output = SamplerOutput.without_logprobs(np.empty(step.num_logits, np.int32), sampling.num_logprobs)
        step.max_logprobs = output.top_ids.shape[1]
        for name in lib.OUTPUT_ARRAYS:
            setattr(step, f"out_{name}", _address(getattr(output, name)))
        return output

    def _fill_inputs(self, step: lib.StepTable, inputs: StepInputs) -> None:
        if self._program is None:
            raise StepError("execute() before load()")
        num_tokens, num_requests = len(inputs.token_ids), len(inputs.seq_lens)
        groups = self._program.num_kv_groups
        max_blocks = inputs.block_tables.shape[-1]
        shapes = {
            "token_ids": (num_tokens,),
            "positions": (num_tokens,),
            "slots": (groups, num_tokens),
            "query_start_loc": (num_requests + 1,),
            "seq_lens": (num_requests,),
            "block_tables": (groups, num_requests, max_blocks),
            "logits_indices": (len(inputs.logits_indices),),
        }
        for name, shape in shapes.items():
            self._place(step, name, getattr(inputs, name), _STEP_DTYPES[name], shape)
        step.num_tokens, step.num_requests, step.max_blocks = num_tokens, num_requests, max_blocks
        step.num_logits, step.num_states = len(inputs.logits_indices) - inputs.num_states, inputs.num_states

    def _fill_sampling(self, step: lib.StepTable, sampling: SamplingInputs, num_logits: int) -> None:
        num_bias, num_seen = len(sampling.bias_ids), len(sampling.seen_ids)
        shapes = dict.fromkeys(_PER_ROW, (num_logits,)) | {
            "bias_start": (num_logits + 1,),
            "bias_ids": (num_bias,),
            "bias_values": (num_bias,),
            "seen_start": (num_logits + 1,),
            "seen_ids": (num_seen,),
            "seen_counts": (num_seen,),
        }
        for name, shape in shapes.items():
            self._place(step, name, getattr(sampling, _SAMPLING_FIELDS[name]), _SAMPLING_DTYPES[name], shape)
        step.num_bias, step.num_seen = num_bias, num_seen
        step.mask_of = step.masks = None
        if sampling.mask_of is not None and sampling.masks is not None:
            assert self._program is not None
            num_masks, width = len(sampling.masks), -(-self._program.logits.width // 32)
            step.mask_of = _checked("mask_of", sampling.mask_of, np.int32, (num_logits,))
            step.masks = _checked("masks", sampling.masks, np.uint32, (num_masks, width))
            step.num_masks = num_masks

    def _place(
        self, step: lib.StepTable, name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]
    ) -> None:
        """Puts the array's address into the table; an array that stands there already costs next to nothing."""
        if self._placed.get(name) is not array or array.shape != shape:
            setattr(step, name, _checked(name, array, dtype, shape))
            self._placed[name] = array


def _expert_places(node: Experts, num_rows: int) -> int:
    """Rows that a pass over experts has room for (native/experts.cpp)."""
    padded = -(-num_rows // _ROUNDED_ROWS) + min(node.num_experts, num_rows * node.top_k)
    return padded * _ROUNDED_ROWS


def _rounded_bytes(level: str) -> int:
    """Bytes of a rounded activation: bfloat16, or float32 that holds one where the level has no products of it."""
    return 2 if level in ("avx512bf16", "amx") else _FLOAT_BYTES


def _check_dtype(dtype: str) -> None:
    if dtype not in lib.DTYPES:
        raise UnsupportedError(f"the native runtime keeps weights as {', '.join(lib.DTYPES)}, not {dtype}")


def _kv_code(dtype: str) -> int:
    if dtype not in lib.KV_DTYPES:
        raise UnsupportedError(f"the KV cache is kept as {', '.join(lib.KV_DTYPES)}, not {dtype}")
    return lib.KV_DTYPES[dtype]


def _checked(name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> int:
    """The array's address, if it is what the library will take it for."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise StepError(
            f"{name} must be a C-contiguous {dtype.__name__} array {shape}, not {array.dtype} {array.shape}"
        )
    return _address(array)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
    return address
