"""The op set: what a model may ask a runtime to compute. One dataclass per op; its docstring defines it.

Ops name buffers, weights and numbers, never arrays: a program is data. `runtime/reference` is the executable
definition; every other runtime is tested against it. T is the number of tokens in a step, R the number of positions
whose logits are wanted, B the number of requests in the step.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal


class Rows(StrEnum):
    """What a buffer has one row for."""

    TOKENS = "tokens"  # T rows
    LOGITS = "logits"  # R rows


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A handle to a float matrix [T or R, width] that lives from the node that writes it to the last that reads it."""

    name: str
    rows: Rows
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A handle to a parameter: tensors of the checkpoint stacked along dimension 0.

    `parts` are canonical tensor names (models/weights.py maps a checkpoint's names to them); parts may differ in
    stored type, so a runtime packs each part by itself. `shape` is that of the stack: [out, in] for a matrix.
    `role` says how a runtime may treat it: only "linear" and "embedding" weights are ever kept in a narrow type. A
    router is a matrix whose products decide, so that roundings there would choose other experts.
    """

    name: str
    parts: tuple[str, ...]
    part_rows: tuple[int, ...]
    shape: tuple[int, ...]
    role: Literal["linear", "embedding", "vector", "router"]

    @property
    def is_exact(self) -> bool:
        """Whether every runtime keeps it as float32, and computes with it in float32."""
        return self.role in ("vector", "router")


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary embedding, fixed at load: angle(p, i) = float32(p) * inv_freq[i]; cos and sin are multiplied by `scale`.

    The first 2 * len(inv_freq) values of a head are rotated in half-split order (x[i] with x[i + half], "neox"):
    out[i] = x[i] cos - x[i + half] sin; out[i + half] = x[i + half] cos + x[i] sin. The rest pass unchanged.
    Source: Su et al. 2021 (RoFormer); the linear, dynamic, yarn, llama3 and longrope kinds only change these numbers.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """The symbols of a program, bound: for counting bytes and operations."""

    num_tokens: int
    num_logits: int
    context_len: float  # mean KV length a query attends to
    num_requests: int | None = None  # that the tokens belong to; None: one each


FLOAT_BYTES = 4  # of an activation
WeightBytes = Callable[[Weight], int]  # resident bytes of a weight in the runtime that will run it
Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu_mul", "gelu_tanh_mul"]


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """Base of all ops. `label` places the node in the model ("layers.3.attention")."""

    label: str

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """Buffers this node writes."""
        return tuple(b for name in self._outputs() if isinstance(b := getattr(self, name), Buffer))

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        """Buffers this node reads."""
        out = self._outputs()
        values = (getattr(self, f.name) for f in fields(self) if f.name not in out)
        return tuple(v for v in values if isinstance(v, Buffer))

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Parameters this node reads."""
        return tuple(v for f in fields(self) if isinstance(v := getattr(self, f.name), Weight))

    def inplace(self) -> tuple[tuple[Buffer, Buffer], ...]:
        """(output, input) pairs that a runtime must allow to be the same memory."""
        return ()

    def operations(self, sizes: Sizes) -> int:
        """Floating-point operations (a multiply-add counts two)."""
        return sum(b.width * rows_of(b, sizes) for b in self.outputs)

    def bytes_moved(self, sizes: Sizes, weight_bytes: WeightBytes, kv_bytes: float) -> int:
        """Bytes that must move: weights once, buffers once, KV as attended. `kv_bytes` is per KV element."""
        buffers = sum(b.width * rows_of(b, sizes) for b in self.inputs + self.outputs)
        return buffers * FLOAT_BYTES + sum(weight_bytes(w) for w in self.weights)

    def _outputs(self) -> tuple[str, ...]:
        return ("out",)


def rows_of(buffer: Buffer, sizes: Sizes) -> int:
    """Rows of a buffer under bound sizes."""
    return sizes.num_tokens if buffer.rows is Rows.TOKENS else sizes.num_logits


@dataclass(frozen=True, slots=True, eq=False)
class Embedding(Op):
    """out[t] = weight[token_ids[t]] * scale (+ position_weight[positions[t] + position_offset] when given).

    weight None: the position term alone (OPT-350m widens token embeddings before it adds positions).
    """

    weight: Weight | None  # [vocab, width], role "embedding"
    out: Buffer
    scale: float = 1.0
    position_weight: Weight | None = None  # [max positions, width]: GPT-2, OPT
    position_offset: int = 0

    def bytes_moved(self, sizes: Sizes, weight_bytes: WeightBytes, kv_bytes: float) -> int:
        per_row = sum(weight_bytes(w) // w.shape[0] for w in self.weights)
        return sizes.num_tokens * (per_row + self.out.width * FLOAT_BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class Norm(Op):
    """Root-mean-square or layer norm of each row, in float32; with `residual`, of the sum, which is kept.

    s = x (+ residual);  residual_out = s
    kind "rms":   out = s / sqrt(mean(s^2) + eps) * weight
    kind "layer": out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias      (biased variance)
    Gemma's (1 + w) is folded into the weight at load. Sources: Zhang & Sennrich 2019; Ba et al. 2016.
    """

    x: Buffer
    weight: Weight
    out: Buffer
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: Weight | None = None
    residual: Buffer | None = None
    residual_out: Buffer | None = None

    def _outputs(self) -> tuple[str, ...]:
        return ("out", "residual_out")

    def inplace(self) -> tuple[tuple[Buffer, Buffer], ...]:
        return ((self.residual_out, self.residual),) if self.residual_out and self.residual else ()


@dataclass(frozen=True, slots=True, eq=False)
class Add(Op):
    """out = x + y (the residual sum where no norm follows, as in post-norm models)."""

    x: Buffer
    y: Buffer
    out: Buffer

    def inplace(self) -> tuple[tuple[Buffer, Buffer], ...]:
        return ((self.out, self.x),)


@dataclass(frozen=True, slots=True, eq=False)
class Linear(Op):
    """out = act(x @ weight.T + bias), weight [out features, in features].

    "silu_mul" and "gelu_tanh_mul": the weight stacks gate over up (two equal halves of rows); out = act(gate) * up.
    "gelu" is the exact error-function form, "gelu_tanh" the tanh approximation (Hendrycks & Gimpel 2016).
    `softcap` c > 0: out = c * tanh(out / c). `scale` multiplies the product before bias.
    """

    x: Buffer
    weight: Weight
    out: Buffer
    bias: Weight | None = None
    activation: Activation = "none"
    softcap: float = 0.0
    scale: float = 1.0

    def operations(self, sizes: Sizes) -> int:
        return 2 * rows_of(self.x, sizes) * self.weight.shape[0] * self.weight.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Experts(Op):
    """out[t] = sum over the `top_k` experts e of t of share[t, e] * MLP_e(x[t])  (+ sigmoid(gate[t]) * shared[t]).

    MLP_e(x) = act(gate_e x) * (up_e x) through down_e, a gated activation as in Linear. The experts of t are those of
    its largest scores, of equal ones the first. share = softmax of the scores over all experts or, with
    `renormalize`, over the chosen ones. The sum goes over the experts in order.
    `shared` is what an expert of all tokens gave, and the last column of `scores` its gate.
    Sources: Shazeer et al. 2017; Jiang et al. 2024 (Mixtral); Qwen2-MoE for the shared expert.
    """

    x: Buffer
    scores: Buffer  # [rows, num_experts], or [rows, num_experts + 1] with `shared`
    gate_up: Weight  # [num_experts * 2 * inner, in]: of each expert gate over up, one part each
    down: Weight  # [num_experts * out, inner]: one part for each expert
    out: Buffer
    num_experts: int
    top_k: int
    renormalize: bool
    activation: Activation = "silu_mul"
    shared: Buffer | None = None

    def operations(self, sizes: Sizes) -> int:
        weights = sum(w.shape[0] * w.shape[1] for w in self.weights)
        return 2 * rows_of(self.x, sizes) * self.top_k * weights // self.num_experts

    def bytes_moved(self, sizes: Sizes, weight_bytes: WeightBytes, kv_bytes: float) -> int:
        missed = (1 - self.top_k / self.num_experts) ** rows_of(self.x, sizes)  # of tokens that choose at random
        buffers = sum(b.width * rows_of(b, sizes) for b in self.inputs + self.outputs)
        return int(buffers * FLOAT_BYTES + (1 - missed) * sum(weight_bytes(w) for w in self.weights))


@dataclass(frozen=True, slots=True, eq=False)
class RopeKVWrite(Op):
    """Splits qkv into heads, norms and rotates q and k, writes k and v to the KV cache, returns q.

    qkv row: [num_heads * head_dim | num_kv_heads * head_dim | num_kv_heads * head_dim].
    q_norm / k_norm (weight [head_dim]): RMS norm of each head before the rotation (Qwen3, Gemma3).
    rope None: no rotation. k and v of token t go to slot slots[group][t] of KV layer `kv_layer`.
    A step writes every token's KV before any attention of the same layer reads, so requests of one step may share
    blocks that this very step fills.
    """

    qkv: Buffer
    out: Buffer  # q, [T, num_heads * head_dim]
    kv_layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None = None
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    eps: float = 1e-6

    def bytes_moved(self, sizes: Sizes, weight_bytes: WeightBytes, kv_bytes: float) -> int:
        moved = (self.qkv.width + self.out.width) * FLOAT_BYTES + 2 * self.num_kv_heads * self.head_dim * kv_bytes
        return int(sizes.num_tokens * moved)


@dataclass(frozen=True, slots=True, eq=False)
class Attention(Op):
    """Causal attention of the step's queries over the paged KV cache.

    Queries are ragged: request b owns tokens query_start_loc[b] .. query_start_loc[b + 1] - 1, the last ones of its
    seq_lens[b] positions; there may be one query (decode) or many (prefill, drafts). Query head h reads KV head
    h // (num_heads // num_kv_heads). The query at position p sees key positions j <= p and, with a window w, only
    j > p - w. weights = softmax(softcap(q . k * scale)); softcap c > 0: c * tanh(s / c). KV at position j of request b
    lies in slot block_tables[group][b][j // block_size] * block_size + j % block_size.
    Source: Kwon et al. 2023 (PagedAttention); Milakov & Gimelshein 2018 (online softmax).
    """

    q: Buffer
    out: Buffer  # [T, num_heads * head_dim]
    kv_layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0  # 0: none
    softcap: float = 0.0  # 0: none

    def operations(self, sizes: Sizes) -> int:
        return int(4 * sizes.num_tokens * self.num_heads * self.head_dim * self._attended(sizes))

    def bytes_moved(self, sizes: Sizes, weight_bytes: WeightBytes, kv_bytes: float) -> int:
        others = sizes.num_tokens / (sizes.num_requests or sizes.num_tokens or 1) - 1  # tokens of the same request
        read = sizes.context_len + others / 2  # positions of a request, read once for all its tokens
        if self.window:
            read = min(read, self.window + others)
        kv = 2 * read * self.num_kv_heads * self.head_dim * kv_bytes
        return int(sizes.num_tokens * (kv / (1 + others) + (self.q.width + self.out.width) * FLOAT_BYTES))

    def _attended(self, sizes: Sizes) -> float:
        return min(sizes.context_len, self.window) if self.window else sizes.context_len


@dataclass(frozen=True, slots=True, eq=False)
class GatherRows(Op):
    """out[r] = x[logits_indices[r]]: from here on only positions whose logits are wanted."""

    x: Buffer  # T rows
    out: Buffer  # R rows

    def bytes_moved(self, sizes: Sizes, weight_bytes: WeightBytes, kv_bytes: float) -> int:
        return int(2 * sizes.num_logits * self.out.width * FLOAT_BYTES)  # only the rows that are kept are read


AnyOp = Embedding | Norm | Add | Linear | Experts | RopeKVWrite | Attention | GatherRows
