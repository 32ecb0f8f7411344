"""Small programs, weights and steps for comparing a runtime with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from octavo.program.ops import Attention, Buffer, Embedding, GatherRows, Linear, Norm, Rope, RopeKVWrite, Weight
from octavo.program.program import KVLayer, Program, ProgramBuilder
from octavo.runtime.base import Runtime, SamplingInputs, StepInputs, Tensor

VOCAB = 61
MAX_LEN = 400
MAX_TOKENS = 160


def matrix(name: str, rows: int, cols: int, role: str = "linear") -> Weight:
    return Weight(name, (name,), (rows,), (rows, cols), role)


def vector(name: str, size: int) -> Weight:
    return Weight(name, (name,), (size,), (size,), "vector")


class RandomWeights:
    """A WeightSource of seeded float32 numbers for whatever shapes a program asks for."""

    def __init__(self, program: Program, seed: int = 0, scale: float = 1.0) -> None:
        random = np.random.default_rng(seed)
        self.tensors: dict[str, Tensor] = {}
        for weight in program.weights:
            for part, rows in zip(weight.parts, weight.part_rows, strict=True):
                shape = (rows, *weight.shape[1:])
                spread = scale / np.sqrt(shape[-1]) if len(shape) > 1 and weight.role == "linear" else scale
                values = (random.standard_normal(shape) * spread).astype(np.float32)
                self.tensors[part] = Tensor(part, "F32", shape, values)

    def get(self, part: str) -> Tensor:
        return self.tensors[part]

    def type_of(self, part: str) -> str:
        return self.tensors[part].type


@dataclass
class Piece:
    """`count` tokens of a request from position `start` on; `request` fixes its blocks and its ids."""

    request: int
    start: int
    count: int


class Steps:
    """Makes the arrays of a step. Tables of a request are not contiguous, and run the other way in odd groups."""

    def __init__(self, num_requests: int = 4, block_size: int = 16, groups: int = 1) -> None:
        self.block_size = block_size
        self.num_requests = num_requests
        self.per_request = -(-MAX_LEN // block_size)
        self.num_blocks = num_requests * self.per_request
        order = np.arange(self.num_blocks).reshape(self.per_request, num_requests).T
        self.tables = np.ascontiguousarray(order[:, ::-1].astype(np.int32))
        self.group_tables = [(self.num_blocks - 1 - self.tables) if g % 2 else self.tables for g in range(groups)]
        self.ids = np.random.default_rng(7).integers(0, VOCAB, (num_requests, MAX_LEN)).astype(np.int32)

    def inputs(self, pieces: Sequence[Piece], logits: str = "all") -> StepInputs:
        positions = [np.arange(p.start, p.start + p.count) for p in pieces]
        slots = [
            np.concatenate(
                [
                    table[p.request][at // self.block_size].astype(np.int64) * self.block_size + at % self.block_size
                    for p, at in zip(pieces, positions, strict=True)
                ]
            )
            for table in self.group_tables
        ]
        counts = np.array([p.count for p in pieces], dtype=np.int32)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        total = int(starts[-1])
        indices = {"all": np.arange(total), "last": starts[1:] - 1, "none": np.arange(0)}[logits]
        return StepInputs(
            token_ids=np.concatenate([self.ids[p.request][at] for p, at in zip(pieces, positions, strict=True)]),
            positions=np.concatenate(positions).astype(np.int32),
            slots=np.stack(slots),
            query_start_loc=starts,
            seq_lens=np.array([p.start + p.count for p in pieces], dtype=np.int32),
            block_tables=np.stack([table[[p.request for p in pieces]] for table in self.group_tables]),
            logits_indices=indices.astype(np.int32),
        )


# Chunks of a long prompt, mixed with another request's prefill and decode: contexts past two KV tiles.
MIXED = [
    [Piece(0, 0, 70), Piece(1, 0, 5)],
    [Piece(0, 70, 61), Piece(1, 5, 1), Piece(2, 0, 1)],
    [Piece(2, 1, 1), Piece(0, 131, 9), Piece(1, 6, 30)],
    [Piece(0, 140, 1)],
]


def sampling(num_rows: int, **changes: object) -> SamplingInputs:
    """Greedy, nothing else; `changes` replace fields."""
    return replace(SamplingInputs.greedy(num_rows), **({"seeds": np.arange(num_rows, dtype=np.uint64)} | changes))


def load(
    runtime: Runtime,
    program: Program,
    weights: RandomWeights | None = None,
    *,
    dtype: str = "float32",
    kv: str | None = None,
    steps: Steps | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Runtime:
    runtime.load(
        program,
        weights or RandomWeights(program),
        dtype=dtype,
        max_num_tokens=max_tokens,
        max_num_logits=max_tokens,
        max_num_requests=8,
    )
    steps = steps or Steps()
    runtime.allocate_kv(steps.num_blocks, steps.block_size, *([kv] if kv else []))
    return runtime


def run(runtime: Runtime, inputs: StepInputs) -> np.ndarray:
    runtime.execute(inputs)
    runtime.sample(sampling(len(inputs.logits_indices)))
    return runtime.logits()


def row_program(width: int, body: Callable[[ProgramBuilder, Buffer], Buffer], **embedding: object) -> Program:
    """Embedding -> body -> the rows as logits."""
    build = ProgramBuilder()
    x = build.tokens("x", width)
    build.add(Embedding("embed", weight=matrix("embed", VOCAB, width, "embedding"), out=x, **embedding))  # type: ignore[arg-type]
    y = body(build, x)
    logits = build.logit_rows("logits", y.width)
    build.add(GatherRows("gather", x=y, out=logits))
    return build.finish(hidden=logits, logits=logits, vocab_size=VOCAB, max_len=MAX_LEN)


def attention_program(
    *, heads: int, kv_heads: int, dim: int, window: int = 0, softcap: float = 0.0, qk_norm: bool = False, rope: int = -1
) -> Program:
    """Embedding as qkv -> RopeKVWrite -> Attention. `rope` is the number of rotated pairs (-1: all)."""

    def body(build: ProgramBuilder, x: Buffer) -> Buffer:
        half = dim // 2 if rope < 0 else rope
        layer = build.kv_layer(KVLayer(kv_heads, dim, window=window))
        q, out = build.tokens("q", heads * dim), build.tokens("mixed", heads * dim)
        shape = {"kv_layer": layer, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        build.add(
            RopeKVWrite(
                "rope",
                qkv=x,
                out=q,
                rope=Rope(tuple(10.0 ** (-i / half) for i in range(half)), 1.25) if half else None,
                q_norm=vector("q_norm", dim) if qk_norm else None,
                k_norm=vector("k_norm", dim) if qk_norm else None,
                **shape,  # type: ignore[arg-type]
            )
        )
        build.add(
            Attention("attn", q=q, out=out, scale=dim**-0.5, window=window, softcap=softcap, **shape)  # type: ignore[arg-type]
        )
        return out

    return row_program((heads + 2 * kv_heads) * dim, body)


def decoder_program(
    *, hidden: int = 48, heads: int = 6, kv_heads: int = 2, dim: int = 20, inner: int = 75, groups: int = 1
) -> Program:
    """Two Llama layers with a tied head; odd sizes. With two KV groups the second layer follows the second table."""
    build = ProgramBuilder()
    embed = matrix("embed", VOCAB, hidden, "embedding")
    stream, update = build.tokens("embed", hidden), None
    build.add(Embedding("embed", weight=embed, out=stream))
    rope = Rope(tuple(100.0 ** (-i / (dim // 2)) for i in range(dim // 2)))
    for n in range(2):
        layer = build.kv_layer(KVLayer(kv_heads, dim, group=n % groups))
        shape = {"kv_layer": layer, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
        normed, qkv = build.tokens("normed", hidden), build.tokens("qkv", (heads + 2 * kv_heads) * dim)
        q, mixed, out = build.tokens("q", heads * dim), build.tokens("mixed", heads * dim), build.tokens("o", hidden)
        if update is None:
            build.add(Norm("norm", x=stream, weight=vector(f"{n}.norm", hidden), out=normed, eps=1e-5))
        else:
            stream = _add_norm(build, stream, update, f"{n}.norm", normed)
        parts = tuple(f"{n}.{p}" for p in "qkv")
        rows = (heads * dim, kv_heads * dim, kv_heads * dim)
        build.add(
            Linear("qkv", x=normed, weight=Weight(f"{n}.qkv", parts, rows, (sum(rows), hidden), "linear"), out=qkv)
        )
        build.add(RopeKVWrite("rope", qkv=qkv, out=q, rope=rope, **shape))  # type: ignore[arg-type]
        build.add(Attention("attn", q=q, out=mixed, scale=dim**-0.5, **shape))  # type: ignore[arg-type]
        build.add(Linear("o", x=mixed, weight=matrix(f"{n}.o", hidden, heads * dim), out=out))
        normed2, gated, down = build.tokens("normed2", hidden), build.tokens("act", inner), build.tokens("down", hidden)
        stream = _add_norm(build, stream, out, f"{n}.norm2", normed2)
        both = Weight(f"{n}.gu", (f"{n}.gate", f"{n}.up"), (inner, inner), (2 * inner, hidden), "linear")
        build.add(Linear("gate_up", x=normed2, weight=both, out=gated, activation="silu_mul"))
        build.add(Linear("down", x=gated, weight=matrix(f"{n}.down", hidden, inner), out=down))
        update = down
    last, rows_out = build.tokens("last", hidden), build.logit_rows("hidden", hidden)
    assert update is not None
    _add_norm(build, stream, update, "final", last)
    logits = build.logit_rows("logits", VOCAB)
    build.add(GatherRows("gather", x=last, out=rows_out))
    build.add(Linear("lm_head", x=rows_out, weight=embed, out=logits))
    return build.finish(hidden=rows_out, logits=logits, vocab_size=VOCAB, max_len=MAX_LEN)


def _add_norm(build: ProgramBuilder, stream: Buffer, update: Buffer, name: str, out: Buffer) -> Buffer:
    summed = build.tokens("sum", stream.width)
    build.add(
        Norm(name, x=update, weight=vector(name, stream.width), out=out, eps=1e-5, residual=stream, residual_out=summed)
    )
    return summed
