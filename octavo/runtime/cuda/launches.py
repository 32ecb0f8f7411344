"""A program as a flat list of launches: each node becomes one closure over its buffers and weights, once, at load."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from octavo.config import FUSIONS
from octavo.errors import UnsupportedModelError
from octavo.program import ops
from octavo.program.program import Program
from octavo.runtime.cuda import operators
from octavo.runtime.cuda.backend import AttentionBackend
from octavo.runtime.cuda.fusion import Fusion, find_fusion
from octavo.runtime.cuda.graphs import bucket_of
from octavo.runtime.cuda.kernels import attention, linear, rope, rows
from octavo.runtime.cuda.packing import rope_tables
from octavo.runtime.cuda.staging import DeviceStep

Launch = Callable[[DeviceStep], None]
_MANY_WEIGHTS = 1 << 25  # from which on reading them takes so long that more rows may be streamed (docs/kernels.md)
HeadTensors = tuple[torch.Tensor, torch.Tensor] | None


@dataclass(slots=True)
class KVPool:
    """Keys and values of every KV layer, [blocks + 1, KV heads, block_size, head_dim]; the last block is the null one.

    The lists are filled when the pool is allocated, after the launches were made.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [*self.keys, *self.values]


class Arena:
    """The activation buffers: slots of the program's plan, viewed as each buffer's matrix."""

    def __init__(
        self, program: Program, max_tokens: int, max_logits: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        plan = program.plan_buffers()
        most = {ops.Rows.TOKENS: max_tokens, ops.Rows.LOGITS: max_logits}
        slots = [
            torch.zeros(most[kind] * width, dtype=dtype, device=device)
            for kind, width in zip(plan.slot_rows, plan.slot_width, strict=True)
        ]
        self._views = {
            b: slots[slot][: most[b.rows] * b.width].view(most[b.rows], b.width)
            for b, slot in zip(program.buffers, plan.slot_of, strict=True)
        }
        self._product = torch.empty(_product_elements(program, most), dtype=dtype, device=device)

    @staticmethod
    def elements(program: Program, max_tokens: int, max_logits: int) -> int:
        """Elements of the slots and of the product that gated activations read."""
        most = {ops.Rows.TOKENS: max_tokens, ops.Rows.LOGITS: max_logits}
        return program.plan_buffers().elements(max_tokens, max_logits) + _product_elements(program, most)

    def view(self, buffer: ops.Buffer) -> torch.Tensor:
        """[max rows, width]"""
        return self._views[buffer]

    def product(self, num_rows: int, width: int) -> torch.Tensor:
        """Room beside the slots, for what one launch gives to the next, [num_rows, width]."""
        return self._product[: num_rows * width].view(num_rows, width)


class Launches:
    """Makes the closures. Weights are looked up by parts, so that a tied one is there once."""

    def __init__(
        self, program: Program, weights: dict[tuple[str, ...], torch.Tensor], arena: Arena, kv: KVPool,
        max_decodes: int, row_tokens: torch.Tensor, backend: AttentionBackend, *, fusions: Collection[str] = FUSIONS,
        uses_cpp: bool = False,
    ) -> None:  # fmt: skip
        if uses_cpp:
            operators.load()
        self._fusions, self._uses_cpp = fusions, uses_cpp
        self._row_tokens, self._backend, self._max_decodes = row_tokens, backend, max_decodes
        self._program, self._weights, self._arena, self._kv = program, weights, arena, kv
        self._device = arena.view(program.logits).device
        found = find_fusion(program)
        self._fusion = found if "norm" in fusions else Fusion(heads_of=found.heads_of)
        self._chained = "pdl" in fusions and can_chain(self._device)
        self._can_take_over = self._device.type == "cuda" and arena.view(program.logits).dtype == torch.bfloat16
        self._ropes: dict[ops.Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self._turned: dict[ops.Buffer, Callable[[int], bool]] = {}  # q: whether its product makes it in so many rows
        self._turn_of: dict[ops.Buffer, Callable[[DeviceStep], operators.Turn | None]] = {}  # q: what attention does
        shapes = {(n.num_heads, n.num_kv_heads, n.head_dim) for n in program.nodes if isinstance(n, ops.Attention)}
        sizes = [(attention.partial_rows(max_decodes, heads, kv_heads), dim) for heads, kv_heads, dim in shapes]
        kv_heads = max((shape[1] for shape in shapes), default=0)
        self._partials = attention.Partials(
            torch.empty(max((n * d for n, d in sizes), default=0), device=self._device),
            torch.empty(max((n for n, _ in sizes), default=0), device=self._device),
            torch.zeros(max_decodes * kv_heads, dtype=torch.int32, device=self._device),
        )

    def make(self) -> list[Launch]:
        """One closure for each node, in order."""
        makers: dict[type[ops.AnyOp], Callable[[Any], Launch]] = {
            ops.Embedding: self._embedding, ops.Norm: self._norm, ops.Add: self._add, ops.Linear: self._linear,
            ops.RopeKVWrite: self._rope_kv_write, ops.Attention: self._attention, ops.GatherRows: self._gather,
        }  # fmt: skip
        return [makers[type(node)](node) for node in self._program.nodes]

    def _weight(self, weight: ops.Weight | None) -> torch.Tensor | None:
        return None if weight is None else self._weights[weight.parts]

    def _optional(self, buffer: ops.Buffer | None) -> torch.Tensor | None:
        return None if buffer is None else self._arena.view(buffer)

    def _embedding(self, node: ops.Embedding) -> Launch:
        table, positions = self._weight(node.weight), self._weight(node.position_weight)
        out, scale, offset = self._arena.view(node.out), node.scale, node.position_offset
        kept = self._row_tokens

        def launch(step: DeviceStep) -> None:
            rows.embedding(step.num_tokens, step.token_ids, kept, step.positions, table, positions, out, scale, offset)

        return launch

    def _norm(self, node: ops.Norm) -> Launch:
        x, out = self._arena.view(node.x), self._arena.view(node.out)
        residual, kept = self._optional(node.residual), self._optional(node.residual_out)
        weight, bias = self._weights[node.weight.parts], self._weight(node.bias)
        count, eps, is_layer, chained = _row_count(node.out), node.eps, node.kind == "layer", self._chained
        least = linear.MAX_FEW_ROWS if node in self._fusion.norm_of.values() else 0
        in_cpp = is_layer and self._uses_cpp and operators.can_norm(x.shape[1])
        add = None
        if node.residual and node.residual_out and "residual" not in self._fusions:
            add = self._add(ops.Add(node.label, node.x, node.residual, node.residual_out))
            x, residual, kept = self._arena.view(node.residual_out), None, None

        def launch(step: DeviceStep) -> None:
            if (num_rows := count(step)) <= least:
                return
            if add:
                add(step)
            if in_cpp:
                operators.layer_norm(x, residual, weight, bias, out, kept, eps, num_rows, False)
            else:
                rows.norm(num_rows, x, residual, weight, bias, out, kept, eps=eps, is_layer=is_layer, chained=chained)

        return launch

    def _add(self, node: ops.Add) -> Launch:
        x, y, out = self._arena.view(node.x), self._arena.view(node.y), self._arena.view(node.out)
        count = _row_count(node.out)

        def launch(step: DeviceStep) -> None:
            if num_rows := count(step):
                rows.add(num_rows, x, y, out)

        return launch

    def _gather(self, node: ops.GatherRows) -> Launch:
        x, out = self._arena.view(node.x), self._arena.view(node.out)

        def launch(step: DeviceStep) -> None:
            if step.num_logits:
                rows.gather(step.num_logits, x, step.logits_indices, out)

        return launch

    def _linear(self, node: ops.Linear) -> Launch:
        x, out = self._arena.view(node.x), self._arena.view(node.out)
        weight, bias = self._weights[node.weight.parts], self._weight(node.bias)
        transposed = weight.t()
        count = (lambda step: step.num_sampled) if node.out is self._program.logits else _row_count(node.out)
        most = 0 if node.out.rows is ops.Rows.TOKENS else min(self._max_decodes, out.shape[0])
        arena, num_in_rows, chained = self._arena, weight.shape[0], self._chained
        gated = node.activation.endswith("_mul")
        is_plain = bias is None and node.activation == "none" and not node.softcap and node.scale == 1.0
        is_apart = node.activation != "none" and "activation" not in self._fusions
        activation, scale, softcap = node.activation, node.scale, node.softcap
        fused_x, fused_out, fused = self._fused(node)
        in_cpp = self._uses_cpp and _is_gelu(node) and out.shape[1] % 8 == 0
        of_many, turns = self._of_many(node), self._turns(self._fusion.heads_of.get(node))
        streamed, backend = self._streamed(node), self._backend
        most_measured = self._max_decodes if self._can_take_over else 0
        most_streamed = 16 if node in self._fusion.heads_of else 64 if weight.numel() >= _MANY_WEIGHTS else 32

        def launch(step: DeviceStep) -> None:
            num_rows = count(step)
            if 0 < num_rows < most:  # as captured decodes, whose kernel is loaded: loading another waits for the device
                num_rows = bucket_of(num_rows, most)
            if not num_rows or of_many(step, num_rows):
                return
            is_few = num_rows <= linear.MAX_FEW_ROWS
            if is_few and not is_apart:
                to = arena.product(1, num_in_rows) if turns(num_rows) else fused_out
                linear.few_rows(
                    num_rows, fused_x, weight, bias, to, activation=activation, scale=scale, softcap=softcap,
                    fused=fused, chained=chained,
                )  # fmt: skip
                return
            if streamed is not None and num_rows <= most_streamed and backend.has_cpp:
                streamed.stream(num_rows)
                return
            product = arena.product(num_rows, num_in_rows) if gated else out[:num_rows]
            if is_few:
                linear.few_rows(num_rows, fused_x, weight, None, product, fused=fused, chained=chained)
            elif (
                num_rows > most_measured or not backend.has_cpp or not operators.multiply(x[:num_rows], weight, product)
            ):
                torch.mm(x[:num_rows], transposed, out=product)
            if in_cpp and bias is not None:
                operators.bias_gelu(product, bias, out, num_rows, activation == "gelu_tanh")
            elif not is_plain:
                rows.epilogue(
                    num_rows, product, bias, out, activation=activation, scale=scale, softcap=softcap, chained=chained
                )

        return launch

    def _streamed(self, node: ops.Linear) -> operators.Product | None:
        """The kernel for up to 128 rows, of which some are faster than cuBLAS."""
        is_on = self._can_take_over and (node.activation == "none" or "activation" in self._fusions)
        if not is_on or not operators.can_multiply(node):
            return None
        tensors = self._arena.view(node.x), self._weights[node.weight.parts], self._weight(node.bias)
        return operators.Product(node, *tensors, self._arena.view(node.out), chained=self._chained)

    def _of_many(self, node: ops.Linear) -> Callable[[DeviceStep, int], bool]:
        """Launches a product and what follows it, in a step whose rows fill the card; else returns False."""
        heads = self._fusion.heads_of.get(node)
        is_on = self._can_take_over and ("qkv" if heads else "activation") in self._fusions
        is_followed = heads is not None or node.activation != "none"
        if not is_on or not is_followed or not operators.can_multiply(node):
            return lambda step, num_rows: False
        weight, bias, x = self._weights[node.weight.parts], self._weight(node.bias), self._arena.view(node.x)
        if heads is None:
            out, norms, table = self._arena.view(node.out), None, None
        else:
            out, norms = self._arena.product(1, heads.out.width), self._head_norms(heads)
            assert heads.rope is not None
            table, layer = self._rope(heads.rope), self._program.kv_layers[heads.kv_layer]
        product = operators.Product(
            node, x, weight, bias, out, heads=heads, table=table, norms=norms, chained=self._chained
        )
        num_out, backend, kv = weight.shape[0], self._backend, self._kv

        def is_taken(num_rows: int) -> bool:
            return (backend.writes_kv if heads else backend.has_cpp) and operators.fills(num_rows, num_out)

        def launch(step: DeviceStep, num_rows: int) -> bool:
            if not is_taken(num_rows):
                return False
            if heads:
                slots = step.slots_of(layer.group)
                product.place(step.positions, slots, kv.keys[layer.place], kv.values[layer.place])
            product.launch(num_rows)
            return True

        if heads:
            self._turned[heads.out] = is_taken
        return launch

    def _turns(self, heads: ops.RopeKVWrite | None) -> Callable[[int], bool]:
        """Whether decode attention norms and rotates the heads, and writes k and v, in a step of so many tokens.

        Of one: else it might read what another program of it writes. The product is kept beside the slots for it, since
        its own output may have the memory of what it reads.
        """
        if heads is None or not self._can_take_over or "attention" not in self._fusions:
            return _never
        backend = self._backend
        return lambda num_tokens: num_tokens == 1 and backend.turns

    def _fused(self, node: ops.Linear) -> tuple[torch.Tensor, torch.Tensor, linear.Fused]:
        """What a product of few rows reads and writes, and what it takes over from the norms beside it."""
        norm, stream = self._fusion.norm_of.get(node), self._fusion.residual_of.get(node)
        x, out = self._arena.view(node.x), self._arena.view(node.out)
        if norm is not None:
            x = self._arena.view(norm.x if norm.residual is None else norm.residual)
        residual = None if stream is None else self._arena.view(stream)
        fused = linear.Fused(
            norm_weight=None if norm is None else self._weights[norm.weight.parts],
            eps=0.0 if norm is None else norm.eps,
            residual=residual,
        )
        return x, out if residual is None else residual, fused

    def _rope_kv_write(self, node: ops.RopeKVWrite) -> Launch:
        qkv, out = self._arena.view(node.qkv), self._arena.view(node.out)
        layer, kv = self._program.kv_layers[node.kv_layer], self._kv
        table = None if node.rope is None else self._rope(node.rope)
        norms, chained, is_turned = self._head_norms(node), self._chained, self._turned.get(node.out, _never)
        turns = self._turns(node if node in self._fusion.heads_of.values() else None)
        is_apart = "rope" not in self._fusions
        if table is not None:
            self._turn_of[node.out] = lambda step: (
                operators.Turn(step.positions, step.slots_of(layer.group), table, norms, node.eps)
                if turns(step.num_tokens)
                else None
            )

        def launch(step: DeviceStep) -> None:
            if is_turned(step.num_tokens) or turns(step.num_tokens):
                return
            slots = step.slots_of(layer.group)
            keys, values, how = kv.keys[layer.place], kv.values[layer.place], (table, norms)
            if is_apart:
                norm_and_rotate(node, qkv[: step.num_tokens], step.positions, table, norms)
                how = (None, None)
            rope.rope_kv_write(
                step.num_tokens, node, qkv, step.positions, slots, *how, out, keys, values, chained=chained
            )

        return launch

    def _head_norms(self, node: ops.RopeKVWrite) -> HeadTensors:
        q_norm, k_norm = self._weight(node.q_norm), self._weight(node.k_norm)
        if (q_norm is None) != (k_norm is None):
            raise UnsupportedModelError(f"{node.label}: the cuda runtime norms both q and k, or neither")
        return None if q_norm is None or k_norm is None else (q_norm, k_norm)

    def _rope(self, wanted: ops.Rope) -> tuple[torch.Tensor, torch.Tensor]:
        for known, tables in self._ropes.items():
            if (known.inv_freq, known.scale) == (wanted.inv_freq, wanted.scale):
                return tables
        self._ropes[wanted] = rope_tables(wanted, self._program.max_model_len, self._device)
        return self._ropes[wanted]

    def _attention(self, node: ops.Attention) -> Launch:
        slot, out, arena = self._arena.view(node.q), self._arena.view(node.out), self._arena
        layer, kv = self._program.kv_layers[node.kv_layer], self._kv
        partials, chained, backend = self._partials, self._chained, self._backend
        is_turned, turn_of = self._turned.get(node.q, _never), self._turn_of.get(node.q)
        product_width = (node.num_heads + 2 * node.num_kv_heads) * node.head_dim

        def launch(step: DeviceStep) -> None:
            inputs, keys, values = step.attention, kv.keys[layer.place], kv.values[layer.place]
            if turn_of is not None and (turn := turn_of(step)):
                q = arena.product(1, product_width)
                operators.decode_attention(
                    inputs, node, layer.group, q, keys, values, out, partials, chained=chained, turn=turn
                )
                return
            q = arena.product(step.num_tokens, slot.shape[1]) if is_turned(step.num_tokens) else slot
            if inputs.num_decodes:
                decode = backend.decode(node, inputs.num_decodes, keys.shape[2], keys.element_size())
                decode(inputs, node, layer.group, q, keys, values, out, partials, chained=chained)
            if inputs.num_tiles:
                backend.prefill(inputs, node, layer.group, q, keys, values, out)

        return launch


def norm_and_rotate(
    node: ops.RopeKVWrite, qkv: torch.Tensor, positions: torch.Tensor, table: HeadTensors, norms: HeadTensors
) -> None:
    """What rope.rope_kv_write() does to q and k before it writes them, where they lie, by operations of torch."""
    heads = qkv.view(len(qkv), -1, node.head_dim)  # of q, k, v
    q, k, _ = heads.tensor_split([node.num_heads, node.num_heads + node.num_kv_heads], 1)
    for part, weight in zip((q, k), norms or (None, None), strict=True):
        if weight is not None:
            part.copy_(torch.nn.functional.rms_norm(part.float(), part.shape[-1:], weight, node.eps))
        if table is not None:
            cos, sin = (values[positions, None] for values in table)
            x, y, _ = part.float().tensor_split([cos.shape[-1], 2 * cos.shape[-1]], -1)
            part[..., : 2 * cos.shape[-1]] = torch.cat((x * cos - y * sin, x * sin + y * cos), -1)


def _never(num_rows: int) -> bool:
    return False


def _product_elements(program: Program, most: dict[ops.Rows, int]) -> int:
    """Of the largest product that a gated activation halves, of q, or of one token's q, k and v."""
    gated = [n.out for n in program.nodes if isinstance(n, ops.Linear) and n.activation.endswith("_mul")]
    heads = [n for n in program.nodes if isinstance(n, ops.RopeKVWrite)]
    sizes = [2 * most[out.rows] * out.width for out in gated] + [most[n.out.rows] * n.out.width for n in heads]
    return max(sizes + [n.qkv.width for n in heads], default=0)


def _is_gelu(node: ops.Linear) -> bool:
    return node.activation in ("gelu", "gelu_tanh") and not node.softcap and node.scale == 1.0


def can_chain(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended (programmatic dependent launch: Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _row_count(buffer: ops.Buffer) -> Callable[[DeviceStep], int]:
    """How many rows of a buffer a step fills."""
    if buffer.rows is ops.Rows.TOKENS:
        return lambda step: step.num_tokens
    return lambda step: step.num_logits
