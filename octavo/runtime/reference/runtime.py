"""An interpreter: walks the nodes of a program and calls the function that defines each op."""

from collections.abc import Callable

import numpy as np

from octavo.errors import UnsupportedError
from octavo.program import ops
from octavo.program.ops import FLOAT_BYTES, AnyOp, Buffer, Weight
from octavo.program.program import Program
from octavo.runtime.base import Float32, Int32, Runtime, SamplerOutput, SamplingInputs, StepInputs, WeightSource
from octavo.runtime.bfloat16 import round_to_bfloat16
from octavo.runtime.reference import compute
from octavo.runtime.reference.int8 import BLOCK, Int8Matrix
from octavo.runtime.reference.sampler import sample
from octavo.runtime.reference.tensors import stack

DTYPES = ("float32", "bfloat16", "quantized", "int8")
KV_ROUNDING: dict[str, Callable[[Float32], Float32]] = {
    "float32": lambda x: x,
    "bfloat16": round_to_bfloat16,
    "int8": compute.round_to_int8,
    "fp8": compute.round_to_e4m3,
}


class ReferenceRuntime(Runtime):
    """In numpy float32. Slow, and right by definition.

    Buffers live in the slots of the program's plan, so that a plan that folds two living buffers gives wrong numbers.
    """

    name = "reference"

    def __init__(self) -> None:
        self.num_foreign_calls = 0
        self.max_depth = 1
        self._weights: dict[tuple[str, ...], Float32] = {}  # by parts: a tied weight is there once
        self._int8: dict[tuple[str, ...], Int8Matrix] = {}  # the others, with dtype int8
        self._keys: list[Float32] = []  # per place: [slots, KV heads, head_dim]
        self._values: list[Float32] = []
        self._block_size = 0
        self._round_kv = KV_ROUNDING["float32"]
        self._rounds_attention = False
        self._rounds = False  # matrices and the activations they meet
        self._arena: dict[int, Float32] = {}

    def load(
        self, program: Program, weights: WeightSource, *, dtype: str, max_num_tokens: int, max_num_logits: int,
        max_num_requests: int,
    ) -> str:  # fmt: skip
        """Reads every weight as float32.

        With "bfloat16" and "quantized" (which differ in what a runtime keeps, not in what it computes) the values of
        matrices are rounded to bfloat16, and so are the activations that a Linear reads; sums stay float32. "int8" is
        defined in int8.py.
        """
        if dtype not in DTYPES:
            raise UnsupportedError(f"the reference runtime computes in {', '.join(DTYPES)}, not {dtype}")
        self._rounds = dtype in ("bfloat16", "quantized")
        self._program = program
        self._slot_of = dict(zip(program.buffers, program.plan_buffers().slot_of, strict=True))
        for weight in program.weights:
            if dtype == "int8" and not weight.is_exact:
                self._int8[weight.parts] = Int8Matrix.of(stack(weight, weights, "float32"))
            else:
                self._weights[weight.parts] = stack(weight, weights, dtype)
        return f"reference (numpy, {dtype})"

    def weight_bytes(self, program: Program, weights: WeightSource, dtype: str) -> int:
        """Everything but int8 is kept as float32, whatever `dtype` its values were rounded to."""
        return sum(_kept_bytes(w.shape, dtype == "int8" and not w.is_exact) for w in program.weights)

    def arena_bytes(self, program: Program, max_num_tokens: int, max_num_logits: int) -> int:
        """Activations of the largest step, in float32."""
        return program.plan_buffers().elements(max_num_tokens, max_num_logits) * FLOAT_BYTES

    def kv_bytes_per_block(self, program: Program, block_size: int, dtype: str = "float32") -> int:
        """Bytes of one KV block over all layers: float32, whatever `dtype` its values are rounded to."""
        return program.kv_elements_per_block(block_size) * FLOAT_BYTES

    def allocate_kv(self, num_blocks: int, block_size: int, dtype: str = "float32", num_host_blocks: int = 0) -> None:
        """Reserves zeroed pages, which the system backs when they are first written."""
        if dtype not in KV_ROUNDING:
            raise UnsupportedError(f"the KV cache is kept as {', '.join(KV_ROUNDING)}, not {dtype}")
        self._round_kv = KV_ROUNDING[dtype]
        self._rounds_attention = dtype != "float32"
        self._block_size = block_size
        shapes = [
            ((num_blocks + num_host_blocks) * block_size, kv.num_kv_heads, kv.head_dim)
            for kv in self._program.kv_places
        ]
        self._keys = [np.zeros(shape, dtype=np.float32) for shape in shapes]
        self._values = [np.zeros(shape, dtype=np.float32) for shape in shapes]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole KV blocks (from, to) in all layers."""
        size = self._block_size
        for pool in (*self._keys, *self._values):
            for source, target in pairs:
                pool[target * size : (target + 1) * size] = pool[source * size : (source + 1) * size]

    def execute(self, inputs: StepInputs) -> None:
        """Runs the nodes in order."""
        self._num_states = inputs.num_states
        for node in self._program.nodes:
            self._run(node, inputs)

    def sample(self, sampling: SamplingInputs) -> SamplerOutput:
        """Chooses one token for each of the R positions of the last execute()."""
        output = sample(self._read(self._program.logits), sampling)
        if self._num_states:
            output.states = self._read(self._program.hidden)[-self._num_states :].copy()
        return output

    def logits(self) -> Float32:
        """A copy of the last step's raw logits [R, vocab]."""
        return self._read(self._program.logits).copy()

    def close(self) -> None:
        """Lets go of weights, KV and buffers."""
        self._weights.clear()
        self._int8.clear()
        self._keys.clear()
        self._values.clear()
        self._arena.clear()

    def _read(self, buffer: Buffer) -> Float32:
        return self._arena[self._slot_of[buffer]]

    def _write(self, buffer: Buffer, values: Float32) -> None:
        self._arena[self._slot_of[buffer]] = values

    def _weight(self, weight: Weight) -> Float32:
        return self._weights[weight.parts]

    def _optional(self, weight: Weight | None) -> Float32 | None:
        return None if weight is None else self._weights[weight.parts]

    def _run(self, node: AnyOp, inputs: StepInputs) -> None:
        match node:
            case ops.Embedding():
                self._embedding(node, inputs)
            case ops.Norm():
                self._norm(node)
            case ops.Add():
                self._write(node.out, self._read(node.x) + self._read(node.y))
            case ops.Linear():
                x = self._read(node.x)
                if node.out is self._program.logits:
                    x = x[: len(x) - inputs.num_states]
                product = compute.scale_and_bias(self._product(x, node.weight), self._optional(node.bias), node.scale)
                self._write(node.out, compute.softcap(compute.activate(product, node.activation), node.softcap))
            case ops.Experts():
                self._experts(node)
            case ops.RopeKVWrite():
                self._rope_kv_write(node, inputs)
            case ops.Attention():
                self._attention(node, inputs)
            case ops.GatherRows():
                self._write(node.out, self._read(node.x)[inputs.logits_indices])

    def _embedding(self, node: ops.Embedding, inputs: StepInputs) -> None:
        out = np.zeros((len(inputs.token_ids), node.out.width), dtype=np.float32)
        if node.weight is not None:
            out += self._look_up(node.weight, inputs.token_ids) * np.float32(node.scale)
        if node.position_weight is not None:
            out += self._look_up(node.position_weight, inputs.positions + node.position_offset)
        self._write(node.out, out)

    def _look_up(self, weight: Weight, ids: Int32) -> Float32:
        matrix = self._int8.get(weight.parts)
        return self._weight(weight)[ids] if matrix is None else matrix.rows(ids)

    def _product(self, x: Float32, weight: Weight, channels: slice = slice(None)) -> Float32:
        """x times the transposed matrix, or some of its rows, in the arithmetic of the loaded dtype."""
        matrix = self._int8.get(weight.parts)
        if matrix is not None:
            return matrix.linear(x, channels)
        rounds = self._rounds and not weight.is_exact
        return (round_to_bfloat16(x) if rounds else x) @ self._weight(weight)[channels].T

    def _experts(self, node: ops.Experts) -> None:
        x, scores = self._read(node.x), self._read(node.scores)
        shares = compute.route(scores[:, : node.num_experts], node.top_k, node.renormalize)
        out = np.zeros((len(x), node.out.width), dtype=np.float32)
        if node.shared is not None:
            out += compute.sigmoid(scores[:, node.num_experts :]) * self._read(node.shared)
        pair = node.gate_up.shape[0] // node.num_experts
        for e in np.flatnonzero(shares.any(axis=0)).tolist():
            rows = np.flatnonzero(shares[:, e])
            inner = compute.activate(
                self._product(x[rows], node.gate_up, slice(e * pair, (e + 1) * pair)), node.activation
            )
            down = slice(e * node.out.width, (e + 1) * node.out.width)
            out[rows] += shares[rows, e, None] * self._product(inner, node.down, down)
        self._write(node.out, out)

    def _norm(self, node: ops.Norm) -> None:
        x = self._read(node.x)
        if node.residual is not None:
            x = x + self._read(node.residual)
        if node.residual_out is not None:
            self._write(node.residual_out, x)
        weight = self._weight(node.weight)
        if node.kind == "rms":
            self._write(node.out, compute.rms_norm(x, weight, node.eps))
        else:
            self._write(node.out, compute.layer_norm(x, weight, self._optional(node.bias), node.eps))

    def _rope_kv_write(self, node: ops.RopeKVWrite, inputs: StepInputs) -> None:
        num_tokens = len(inputs.token_ids)
        heads = self._read(node.qkv).reshape(num_tokens, -1, node.head_dim)
        q, k, v = np.split(heads, (node.num_heads, node.num_heads + node.num_kv_heads), axis=1)
        if node.q_norm is not None:
            q = compute.rms_norm(q, self._weight(node.q_norm), node.eps)
        if node.k_norm is not None:
            k = compute.rms_norm(k, self._weight(node.k_norm), node.eps)
        if node.rope is not None:
            q = compute.rotate(q, inputs.positions, node.rope)
            k = compute.rotate(k, inputs.positions, node.rope)
        layer = self._program.kv_layers[node.kv_layer]
        slots = inputs.slots[layer.group]
        self._keys[layer.place][slots] = self._round_kv(k)
        self._values[layer.place][slots] = self._round_kv(v)
        self._write(node.out, q.reshape(num_tokens, -1))

    def _attention(self, node: ops.Attention, inputs: StepInputs) -> None:
        q, layer = self._read(node.q), self._program.kv_layers[node.kv_layer]
        mixed = compute.attention(
            q.reshape(len(q), node.num_heads, node.head_dim),
            self._keys[layer.place],
            self._values[layer.place],
            inputs,
            group=layer.group,
            block_size=self._block_size,
            scale=node.scale,
            window=node.window,
            cap=node.softcap,
            rounds=self._rounds_attention,
        )
        self._write(node.out, mixed.reshape(len(q), -1))


def _kept_bytes(shape: tuple[int, ...], int8: bool) -> int:
    if not int8:
        return int(np.prod(shape)) * FLOAT_BYTES
    channels, width = shape
    return channels * (-(-width // BLOCK) * BLOCK + FLOAT_BYTES)
