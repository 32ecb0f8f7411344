"""The one parametric decoder: records a program from a ModelSpec. It computes nothing and never looks at a dtype."""

from dataclasses import replace
from typing import Literal

from octavo.models.spec import LayerSpec, ModelSpec
from octavo.program import ops
from octavo.program.ops import Activation, Buffer, Rows, Weight
from octavo.program.program import KVLayer, Program, ProgramBuilder


def record(spec: ModelSpec) -> Program:
    """The program of a model: embedding, layers, then norm and logits for the positions that are wanted."""
    return _Decoder(spec).record()


class _Decoder:
    """Holds the spec and the builder while recording.

    After the last attention only the positions whose logits are wanted go on (R rows instead of T).

    Between blocks the residual stream is a pair (stream, update): `update` is what the last block made and the next
    norm adds, so that sum and norm are one node. It is None where there is nothing to add.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._build = ProgramBuilder()
        self._embedding_size = spec.embedding_size or spec.hidden_size
        self._embed = Weight(
            "embed", ("embed",), (spec.vocab_size,), (spec.vocab_size, self._embedding_size), "embedding"
        )

    def record(self) -> Program:
        spec = self._spec
        stream, update = self._embedding(), None
        for index, layer in enumerate(spec.layers):
            is_last = index == spec.num_layers - 1
            stream, update = self._attention_block(f"layers.{index}", layer, stream, update, is_last=is_last)
            stream, update = self._mlp_block(f"layers.{index}", index, stream, update)
        hidden = self._last_states(stream, update)
        logits = self._logits(hidden)
        return self._build.finish(hidden=hidden, logits=logits, vocab_size=spec.vocab_size, max_len=spec.max_model_len)

    def _embedding(self) -> Buffer:
        """Token embeddings plus learned positions; narrow ones are widened before positions are added (OPT-350m)."""
        spec = self._spec
        is_narrow = self._embedding_size != spec.hidden_size
        table = self._position_table()
        tokens = self._build.tokens("embed", self._embedding_size)
        embedding = ops.Embedding("embed", self._embed, tokens, spec.embedding_scale)
        if not is_narrow:
            return self._build.add(replace(embedding, position_weight=table, position_offset=spec.position_offset))
        widened = self._linear("project_in", self._build.add(embedding), spec.hidden_size)
        if table is None:
            return widened
        positions = self._build.tokens("position_embed", spec.hidden_size)
        self._build.add(ops.Embedding("position_embed", None, positions, 1.0, table, spec.position_offset))
        return self._sum("embed_sum", widened, positions)

    def _position_table(self) -> Weight | None:
        rows, width = self._spec.learned_positions, self._spec.hidden_size
        return Weight("position_embed", ("position_embed",), (rows,), (rows, width), "embedding") if rows else None

    def _attention_block(
        self, label: str, layer: LayerSpec, stream: Buffer, update: Buffer | None, *, is_last: bool
    ) -> tuple[Buffer, Buffer | None]:
        spec, build = self._spec, self._build
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        kv_layer = build.kv_layer(KVLayer(spec.num_kv_heads, spec.head_dim, window=layer.window))

        x, stream = self._enter(f"{label}.attn_norm", stream, update)
        rows = {f"{label}.q": q_width, f"{label}.k": kv_width, f"{label}.v": kv_width}
        qkv = self._stacked_linear(f"{label}.qkv", x, rows, has_bias=spec.qkv_bias)
        q = build.add(
            ops.RopeKVWrite(
                f"{label}.rope",
                qkv,
                build.tokens(f"{label}.rope", q_width),
                kv_layer,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                layer.rope,
                q_norm=_vector(f"{label}.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
                k_norm=_vector(f"{label}.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
                eps=spec.norm_eps,
            )
        )
        mixed = build.add(
            ops.Attention(
                f"{label}.attention",
                q,
                build.tokens(f"{label}.attention", q_width),
                kv_layer,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                scale=spec.attention_scale or spec.head_dim**-0.5,
                window=layer.window,
                softcap=spec.attention_softcap,
            )
        )
        if is_last:
            mixed = self._gather(f"{label}.gather", mixed)
            stream = self._gather(f"{label}.gather_stream", stream)
        out = self._stacked_linear(
            f"{label}.o", mixed, {f"{label}.o": spec.hidden_size}, has_bias=spec.attention_out_bias
        )
        return self._leave(f"{label}.attn", stream, out)

    def _mlp_block(self, label: str, index: int, stream: Buffer, update: Buffer | None) -> tuple[Buffer, Buffer | None]:
        spec = self._spec
        x, stream = self._enter(f"{label}.mlp_norm", stream, update)
        is_dense = not spec.num_experts or index in spec.dense_layers
        out = self._mlp(label, x, spec.intermediate_size) if is_dense else self._experts(label, x)
        return self._leave(f"{label}.mlp", stream, out)

    def _mlp(self, label: str, x: Buffer, size: int) -> Buffer:
        spec = self._spec
        names = ("gate", "up") if spec.activation.endswith("_mul") else ("up",)
        rows = {f"{label}.{name}": size for name in names}
        inner = self._stacked_linear(
            f"{label}.{'_'.join(names)}", x, rows, has_bias=spec.mlp_bias, activation=spec.activation
        )
        return self._stacked_linear(f"{label}.down", inner, {f"{label}.down": spec.hidden_size}, has_bias=spec.mlp_bias)

    def _experts(self, label: str, x: Buffer) -> Buffer:
        """Routed experts, and the shared one where there is one."""
        spec, count = self._spec, self._spec.num_experts
        shared = self._mlp(f"{label}.shared", x, spec.shared_expert_size) if spec.shared_expert_size else None
        routers = {f"{label}.router": count} | ({f"{label}.shared_gate": 1} if shared else {})
        scores = self._stacked_linear(f"{label}.router", x, routers, has_bias=False, role="router")
        experts = [f"{label}.experts.{e}" for e in range(count)]
        pairs = {f"{expert}.{name}": spec.expert_size for expert in experts for name in ("gate", "up")}
        downs = {f"{expert}.down": spec.hidden_size for expert in experts}
        return self._build.add(
            ops.Experts(
                f"{label}.experts",
                x,
                scores,
                gate_up=_stack(f"{label}.experts.gate_up", pairs, spec.hidden_size),
                down=_stack(f"{label}.experts.down", downs, spec.expert_size),
                out=Buffer(f"{label}.experts", x.rows, spec.hidden_size),
                num_experts=count,
                top_k=spec.num_experts_per_token,
                renormalize=spec.renormalize_experts,
                activation=spec.activation,
                shared=shared,
            )
        )

    def _enter(self, norm: str, stream: Buffer, update: Buffer | None) -> tuple[Buffer, Buffer]:
        """What a block reads, and the stream with the last update added."""
        if not self._spec.pre_norm:
            return stream, stream
        if update is None:
            return self._norm(norm, stream), stream
        summed = Buffer(f"{norm}.stream", stream.rows, stream.width)
        return self._norm(norm, update, residual=stream, residual_out=summed), summed

    def _leave(self, block: str, stream: Buffer, out: Buffer) -> tuple[Buffer, Buffer | None]:
        """The stream and the update after a block."""
        if not self._spec.pre_norm:
            return self._norm(f"{block}_norm", out, residual=stream), None
        return stream, self._norm(f"{block}_post_norm", out) if self._spec.post_norms else out

    def _last_states(self, stream: Buffer, update: Buffer | None) -> Buffer:
        """The last states [R, hidden], normed where the model norms them."""
        if update is None:
            return self._norm("final_norm", stream) if self._spec.final_norm else stream
        if self._spec.final_norm:
            return self._norm("final_norm", update, residual=stream)
        return self._sum("final_sum", update, stream)

    def _logits(self, hidden: Buffer) -> Buffer:
        spec = self._spec
        if self._embedding_size != spec.hidden_size:
            hidden = self._linear("project_out", hidden, self._embedding_size)
        shape = (spec.vocab_size, self._embedding_size)
        tied = spec.tie_word_embeddings
        weight = self._embed if tied else Weight("lm_head", ("lm_head",), (spec.vocab_size,), shape, "linear")
        out = self._build.logit_rows("logits", spec.vocab_size)
        cap, scale = spec.logits_softcap, spec.logits_scale
        return self._build.add(ops.Linear("lm_head", hidden, weight, out, softcap=cap, scale=scale))

    def _norm(
        self, label: str, x: Buffer, *, residual: Buffer | None = None, residual_out: Buffer | None = None
    ) -> Buffer:
        spec = self._spec
        out = Buffer(label, x.rows, spec.hidden_size)
        weight = _vector(f"{label}.weight", spec.hidden_size)
        bias = _vector(f"{label}.bias", spec.hidden_size) if spec.norm == "layer" else None
        return self._build.add(ops.Norm(label, x, weight, out, spec.norm_eps, spec.norm, bias, residual, residual_out))

    def _stacked_linear(
        self,
        label: str,
        x: Buffer,
        rows: dict[str, int],
        *,
        has_bias: bool,
        activation: Activation = "none",
        role: Literal["linear", "router"] = "linear",
    ) -> Buffer:
        """One product for matrices that read the same input; `rows` maps each layer-qualified name to its rows."""
        weight = _stack(label, rows, x.width, role)
        total, counts = weight.shape[0], weight.part_rows
        bias = Weight(f"{label}.bias", tuple(f"{n}.bias" for n in rows), counts, (total,), "vector")
        out = Buffer(label, x.rows, total // 2 if activation.endswith("_mul") else total)
        return self._build.add(ops.Linear(label, x, weight, out, bias if has_bias else None, activation))

    def _linear(self, name: str, x: Buffer, out_features: int) -> Buffer:
        """A product with one matrix without bias."""
        weight = Weight(name, (name,), (out_features,), (out_features, x.width), "linear")
        return self._build.add(ops.Linear(name, x, weight, Buffer(name, x.rows, out_features)))

    def _sum(self, label: str, x: Buffer, y: Buffer) -> Buffer:
        return self._build.add(ops.Add(label, x, y, Buffer(label, x.rows, x.width)))

    def _gather(self, label: str, x: Buffer) -> Buffer:
        return self._build.add(ops.GatherRows(label, x, Buffer(label, Rows.LOGITS, x.width)))


def _stack(label: str, rows: dict[str, int], cols: int, role: Literal["linear", "router"] = "linear") -> Weight:
    counts = tuple(rows.values())
    return Weight(f"{label}.weight", tuple(f"{n}.weight" for n in rows), counts, (sum(counts), cols), role)


def _vector(name: str, size: int) -> Weight:
    return Weight(name, (name,), (size,), (size,), "vector")
