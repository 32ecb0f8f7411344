"""A ModelSpec from a GGUF file: metadata keys through a row per architecture; what a file has decides biases and tying.

Source of the keys: the format's specification, docs/gguf.md in ggml-org/ggml.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.architectures import MAX_EXPERTS
from octavo.models.gguf_file import FLOAT_TYPES, GGUFFile
from octavo.models.hf_config import Fields
from octavo.models.hf_spec import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MIN_THETA, served_length
from octavo.models.rope import RopeParameters, make_rope
from octavo.models.spec import LayerSpec, ModelFiles, ModelSpec

LOCAL_THETA = 10_000.0  # Gemma 3's local layers, where the file does not say
GEMMA3_PERIOD = 6  # every sixth layer is global
GEMMA3_27B_LAYERS = 62  # the one size whose attention is scaled by hidden_size / num_heads, which no key says
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SCALING_KEYS = frozenset(
    ("type", "factor", "original_context_length", "attn_factor", "finetuned", "yarn_beta_fast", "yarn_beta_slow")
)
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """A row: what `general.architecture` implies. `flags` are fields of ModelSpec."""

    name: str
    permuted: bool = False  # q and k rows are stored with rotated pairs next to each other
    eps_key: str = "attention.layer_norm_rms_epsilon"
    has_rope: bool = True
    windows: bool = False  # attention.sliding_window counts
    period: int = 0  # every period-th layer is global and the others have a RoPE base of their own
    flags: Mapping[str, Any] = field(default_factory=dict)
    renormalizes_experts: bool = True  # no key says


GGUF_ARCHITECTURES = {
    row.name: row
    for row in (
        GGUFArchitecture(name="llama", permuted=True, windows=True, flags={"activation": "silu_mul"}),
        GGUFArchitecture(name="qwen2", flags={"activation": "silu_mul"}),
        GGUFArchitecture(name="qwen3", flags={"activation": "silu_mul", "qk_norm": True}),
        GGUFArchitecture(name="qwen2moe", flags={"activation": "silu_mul"}, renormalizes_experts=False),
        GGUFArchitecture(name="qwen3moe", flags={"activation": "silu_mul", "qk_norm": True}),
        GGUFArchitecture(
            name="gemma3",
            windows=True,
            period=GEMMA3_PERIOD,
            flags={"activation": "gelu_tanh_mul", "qk_norm": True, "post_norms": True},
        ),
        GGUFArchitecture(
            name="gpt2",
            eps_key="attention.layer_norm_epsilon",
            has_rope=False,
            flags={"activation": "gelu_tanh", "norm": "layer"},
        ),
    )
}


def read_gguf_spec(files: ModelFiles, *, max_model_len: int | None = None) -> ModelSpec:
    """The spec of a GGUF file. Raises as models.reader.read_spec does."""
    return _SpecReader(GGUFFile.open(files.path)).read(max_model_len)


def gguf_architecture_of(file: GGUFFile) -> GGUFArchitecture:
    """The row of a file.

    Raises:
        ModelFileError: `general.architecture` is missing.
        UnsupportedModelError: no such row; names the known ones.
    """
    name = Fields(file.metadata, file.path).text("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: architecture {name!r:.80} is not known; known ones: {', '.join(GGUF_ARCHITECTURES)}"
        )
    return GGUF_ARCHITECTURES[name]


class _SpecReader:
    """Reads one file's metadata through its row."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._row = gguf_architecture_of(file)
        self._fields = Fields(file.metadata, file.path)

    def read(self, max_model_len: int | None) -> ModelSpec:
        row, tensors = self._row, self._file.tensors
        self._refuse_unbuilt()
        hidden_size = self._integer("embedding_length")
        num_heads = self._integer("attention.head_count", high=MAX_HEADS)
        num_kv_heads = self._integer("attention.head_count_kv", num_heads, high=MAX_HEADS)
        if num_heads % num_kv_heads:
            raise self._wrong("attention.head_count", f"a multiple of attention.head_count_kv ({num_kv_heads})")
        head_dim = self._head_dim(hidden_size, num_heads)
        num_layers = self._integer("block_count", high=MAX_LAYERS)
        context = self._integer("context_length", high=MAX_CONTEXT)
        vocab_size = self._vocab_size()
        rope = self._rope_parameters(context) if row.has_rope else None
        reach = rope.reach if rope and not row.period else context
        served = served_length(max_model_len, reach)
        return ModelSpec(
            architecture=row.name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=self._integer("feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=reach,
            max_model_len=served,
            layers=self._layers(num_layers, rope, head_dim, served),
            norm_eps=self._number(row.eps_key, high=1.0),
            qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
            attention_out_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            attention_scale=self._attention_scale(hidden_size, num_heads, num_layers),
            logits_softcap=self._number("final_logit_softcapping", 0.0) if row.period else 0.0,
            embedding_scale=math.sqrt(hidden_size) if row.period else 1.0,
            learned_positions=0 if row.has_rope else context,
            tie_word_embeddings="output.weight" not in tensors,
            stored_dtype=self._stored_dtype(),
            eos_token_ids=self._eos_token_ids(vocab_size),
            **row.flags,
            **self._experts(),
        )

    def _experts(self) -> dict[str, Any]:
        count = self._integer("expert_count", 0, low=0, high=MAX_EXPERTS)
        if not count:
            return {}
        shared = self._file.tensors.get("blk.0.ffn_up_shexp.weight")
        return {
            "num_experts": count,
            "num_experts_per_token": self._integer("expert_used_count", high=count),
            "expert_size": self._integer("expert_feed_forward_length", self._integer("feed_forward_length")),
            "shared_expert_size": shared.shape[0] if shared else 0,
            "renormalize_experts": self._row.renormalizes_experts,
        }

    def _refuse_unbuilt(self) -> None:
        prefix = f"{self._row.name}.rope.scaling."
        for key in self._file.metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in _SCALING_KEYS:
                raise UnsupportedModelError(f"{self._file.path}: the RoPE setting {key!r:.80} is not supported")

    def _key(self, name: str) -> str:
        return f"{self._row.name}.{name}"

    def _wrong(self, name: str, must: str) -> ModelFileError:
        return self._fields.wrong(self._key(name), must)

    def _integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        """A number that may also be stored once per layer."""
        key, value = self._key(name), self._file.metadata.get(self._key(name))
        if not isinstance(value, list):
            return self._fields.integer(key, default, low=low, high=high)
        if len(set(value)) != 1:
            raise UnsupportedModelError(f"{self._file.path}: {key} differs from layer to layer, which is not supported")
        return Fields({key: value[0]}, self._file.path).integer(key, low=low, high=high)

    def _number(self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A float32 as stored, without the digits that float64 would make up (1e-5, not 9.99999974e-06)."""
        value = self._fields.number(self._key(name), default, low=low, high=high)
        return float(str(np.float32(value)))

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self._fields.has(self._key("attention.key_length")):
            head_dim = self._integer("attention.key_length", high=MAX_HEADS)
        elif hidden_size % num_heads:
            raise self._wrong("embedding_length", f"a multiple of attention.head_count ({num_heads})")
        else:
            head_dim = hidden_size // num_heads
        if self._integer("attention.value_length", head_dim) != head_dim:
            raise self._wrong("attention.value_length", f"the same as the key length ({head_dim})")
        return head_dim

    def _vocab_size(self) -> int:
        """Rows of the embedding: the tokens that can go in and come out."""
        embed = self._file.tensors.get("token_embd.weight")
        if embed is None or len(embed.shape) != 2:
            raise ModelFileError(f"{self._file.path} has no matrix token_embd.weight: it is no whole model")
        if embed.shape[0] > MAX_VOCAB:
            raise ModelFileError(f"{self._file.path}: a vocabulary of {embed.shape[0]} is above the limit {MAX_VOCAB}")
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > embed.shape[0]:
            raise self._fields.wrong("tokenizer.ggml.tokens", f"at most the {embed.shape[0]} rows of token_embd.weight")
        return embed.shape[0]

    def _attention_scale(self, hidden_size: int, num_heads: int, num_layers: int) -> float:
        if self._row.name == "gemma3" and num_layers == GEMMA3_27B_LAYERS:
            return float((hidden_size // num_heads) ** -0.5)
        return 0.0

    def _layers(
        self, num_layers: int, rope: RopeParameters | None, head_dim: int, served: int
    ) -> tuple[LayerSpec, ...]:
        row = self._row
        window = self._integer("attention.sliding_window", 0, low=0, high=MAX_CONTEXT) if row.windows else 0
        if rope is None:
            return (LayerSpec(window),) * num_layers
        rotary_dim = self._rotary_dim(head_dim)
        whole = LayerSpec(0 if row.period else window, make_rope(rope, rotary_dim=rotary_dim, max_model_len=served))
        if not row.period:
            return (whole,) * num_layers
        theta = self._number("rope.freq_base_swa", LOCAL_THETA, low=MIN_THETA)
        plain = RopeParameters(max_position_embeddings=rope.max_position_embeddings, theta=theta)
        local = LayerSpec(window, make_rope(plain, rotary_dim=rotary_dim, max_model_len=served))
        period = self._integer("attention.sliding_window_pattern", row.period)
        return tuple(local if window and (index + 1) % period else whole for index in range(num_layers))

    def _rotary_dim(self, head_dim: int) -> int:
        rotary_dim = self._integer("rope.dimension_count", head_dim)
        if rotary_dim > head_dim or (self._row.permuted and rotary_dim != head_dim):
            raise self._wrong("rope.dimension_count", f"the head dimension {head_dim}")
        return rotary_dim

    def _rope_parameters(self, context: int) -> RopeParameters:
        """Scaling by keys (linear, yarn), or by the divisors in rope_freqs.weight that Llama 3 conversions carry."""
        theta = self._number("rope.freq_base", 10_000.0, low=MIN_THETA)
        kind = self._fields.text(self._key("rope.scaling.type"), "none")
        if "rope_freqs.weight" in self._file.tensors:
            if kind != "none":
                raise self._wrong("rope.scaling.type", "absent where rope_freqs.weight scales")
            divisors = self._frequency_divisors()
            return RopeParameters(
                max_position_embeddings=context,
                kind="longrope",  # one list for every length, and no scale: 1 / (divisor * theta^(2i/d))
                theta=theta,
                attention_factor=1.0,
                short_factor=divisors,
                long_factor=divisors,
            )
        if kind not in ("none", "linear", "yarn"):
            raise UnsupportedModelError(f"{self._file.path}: RoPE scaling {kind!r:.80} is not supported in GGUF files")
        factor = self._number("rope.scaling.factor", 1.0, low=1e-6, high=1e4)
        attn_factor = self._number("rope.scaling.attn_factor", 1.0, low=1e-6)
        return RopeParameters(
            max_position_embeddings=context,
            kind="default" if kind == "none" else kind,
            theta=theta,
            factor=factor,
            original_max_position_embeddings=self._integer(
                "rope.scaling.original_context_length", context, low=2, high=MAX_CONTEXT
            ),
            attention_factor=attn_factor * (1 + 0.1 * math.log(max(factor, 1.0))),
            beta_fast=self._number("rope.scaling.yarn_beta_fast", 32.0, low=1e-6),
            beta_slow=self._number("rope.scaling.yarn_beta_slow", 1.0, low=1e-6),
        )

    def _frequency_divisors(self) -> tuple[float, ...]:
        tensor = self._file.tensors["rope_freqs.weight"]
        if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_HEADS:
            raise ModelFileError(
                f"{self._file.path}: rope_freqs.weight must be a short F32 vector, not {tensor.type} {tensor.shape}"
            )
        divisors = self._file.data(tensor.name)
        if not (np.isfinite(divisors).all() and (divisors > 0).all()):
            raise ModelFileError(f"{self._file.path}: rope_freqs.weight must hold positive numbers")
        return tuple(divisors.tolist())

    def _stored_dtype(self) -> str:
        """The float type that holds most bytes of the matrices; "quantized" when any is in blocks."""
        nbytes: dict[str, int] = {}
        for tensor in self._file.tensors.values():
            if len(tensor.shape) > 1:
                nbytes[tensor.type] = nbytes.get(tensor.type, 0) + tensor.nbytes
        if not nbytes.keys() <= FLOAT_TYPES.keys():
            return "quantized"
        return _DTYPES[max(nbytes, key=lambda name: nbytes[name])]

    def _eos_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The ids that the file names, and the end-of-turn token that its chat template writes: files converted from
        instruction-tuned Gemma name only the end of the document."""
        ids = [
            number
            for name in ("eos", "eot", "eom")
            for number in self._fields.token_ids(f"tokenizer.ggml.{name}_token_id", vocab_size)
        ]
        template, tokens = (self._file.metadata.get(f"tokenizer.{name}") for name in ("chat_template", "ggml.tokens"))
        if isinstance(template, str) and isinstance(tokens, list):
            ids += [tokens.index(text) for text in _END_OF_TURN if text in template and text in tokens]
        return tuple(dict.fromkeys(ids))
