"""One row per architecture: how its config.json reads, and what its tensors are called. A model is a row, not a file.

A row holds only what differs. `octavo/models/reader.py` turns a row and a config into a ModelSpec,
`octavo/models/safetensors_weights.py` turns its tensor names into canonical ones (octavo/models/names.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.errors import UnsupportedModelError
from octavo.models.hf_config import Fields
from octavo.program.ops import Activation

MAX_EXPERTS = 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint, or the `piece`-th of `pieces` equal parts of its output features."""

    name: str
    transposed: bool = False  # stored [in, out] (GPT-2's Conv1D)
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row; what it leaves out is as in Llama. Names of config fields are Hugging Face's.

    `keys` maps Llama's config keys to the row's own. `defaults` are the values that Hugging Face assumes for absent
    keys. `only` lists keys with the one value that is built. `extras` reads what no other row has: it gets the config
    and hidden_size, and gives fields of ModelSpec, as `flags` do.
    """

    name: str
    model_types: tuple[str, ...]
    roots: tuple[str, ...] = ("model.", "")  # prefixes of tensor names, tried in order
    tensors: Mapping[str, str | Stored] = field(default_factory=lambda: _LLAMA_TENSORS)  # canonical: stored
    layer: str = "layers.{}."  # prefix of layer N below the root
    layer_tensors: Mapping[str, str | Stored] = field(default_factory=lambda: _LLAMA_LAYER)  # {}: the expert's number
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    extras: Callable[[Fields, int], dict[str, Any]] | None = None
    mlp_ratio: int = 0  # intermediate_size / hidden_size where the config may leave it out
    bias_key: str | None = None  # config key that gives every attention projection a bias
    windows: Literal["none", "all", "upper", "pattern"] = "none"  # which layers have a sliding window
    positions: Literal["rope", "learned"] = "rope"
    context_is_scaled: bool = False  # max_position_embeddings counts what RoPE scaling adds already

    def key(self, name: str) -> str:
        """This row's config key for one of ours."""
        return self.keys.get(name, name)

    def stored(self, part: str) -> Stored:
        """Where the tensor with a canonical name lies, below the root."""
        if not part.startswith("layers."):
            return self._entry(self.tensors, part, "")
        _, index, name = part.split(".", 2)
        if not name.startswith("experts."):
            return self._entry(self.layer_tensors, name, self.layer.format(index))
        _, expert, name = name.split(".", 2)
        entry = self._entry(self.layer_tensors, f"experts.{name}", self.layer.format(index))
        return replace(entry, name=entry.name.format(expert))

    @staticmethod
    def _entry(table: Mapping[str, str | Stored], name: str, prefix: str) -> Stored:
        base, _, kind = name.rpartition(".")
        entry = table[base] if base in table else table[name]
        suffix = f".{kind}" if base in table else ""
        if isinstance(entry, str):
            return Stored(f"{prefix}{entry}{suffix}")
        is_matrix = kind == "weight"
        return Stored(f"{prefix}{entry.name}{suffix}", entry.transposed and is_matrix, entry.piece, entry.pieces)


_LLAMA_TENSORS: dict[str, str] = {"embed": "embed_tokens.weight", "final_norm": "norm"}
_LLAMA_LAYER: dict[str, str] = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GEMMA_LAYER = _LLAMA_LAYER | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_MIXTRAL_LAYER = _LLAMA_LAYER | {
    "router": "block_sparse_moe.gate",
    "experts.gate": "block_sparse_moe.experts.{}.w1",
    "experts.up": "block_sparse_moe.experts.{}.w3",
    "experts.down": "block_sparse_moe.experts.{}.w2",
}
_QWEN_MOE_LAYER = _LLAMA_LAYER | {
    "router": "mlp.gate",
    "experts.gate": "mlp.experts.{}.gate_proj",
    "experts.up": "mlp.experts.{}.up_proj",
    "experts.down": "mlp.experts.{}.down_proj",
    "shared_gate": "mlp.shared_expert_gate",
    "shared.gate": "mlp.shared_expert.gate_proj",
    "shared.up": "mlp.shared_expert.up_proj",
    "shared.down": "mlp.shared_expert.down_proj",
}
_GPT2_TENSORS = {"embed": "wte.weight", "position_embed": "wpe.weight", "final_norm": "ln_f"}
_GPT2_LAYER: Mapping[str, str | Stored] = {
    "attn_norm": "ln_1",
    "q": Stored("attn.c_attn", transposed=True, piece=0, pieces=3),
    "k": Stored("attn.c_attn", transposed=True, piece=1, pieces=3),
    "v": Stored("attn.c_attn", transposed=True, piece=2, pieces=3),
    "o": Stored("attn.c_proj", transposed=True),
    "mlp_norm": "ln_2",
    "up": Stored("mlp.c_fc", transposed=True),
    "down": Stored("mlp.c_proj", transposed=True),
}
_OPT_TENSORS = {
    "embed": "embed_tokens.weight",
    "position_embed": "embed_positions.weight",
    "final_norm": "final_layer_norm",
    "project_in": "project_in.weight",
    "project_out": "project_out.weight",
}
_OPT_LAYER = {
    "attn_norm": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}


def _llama_extras(config: Fields, hidden_size: int) -> dict[str, Any]:
    return {"mlp_bias": config.boolean("mlp_bias", False)}


def _mixtral_extras(config: Fields, hidden_size: int) -> dict[str, Any]:
    return {**_expert_counts(config), "expert_size": config.integer("intermediate_size"), "renormalize_experts": True}


def _qwen3_moe_extras(config: Fields, hidden_size: int) -> dict[str, Any]:
    step, dense = config.integer("decoder_sparse_step", 1), config.indices("mlp_only_layers")
    layers = range(config.integer("num_hidden_layers"))
    return {
        **_expert_counts(config),
        "expert_size": config.integer("moe_intermediate_size"),
        "renormalize_experts": config.boolean("norm_topk_prob", False),
        "dense_layers": tuple(index for index in layers if (index + 1) % step or index in dense),
    }


def _qwen2_moe_extras(config: Fields, hidden_size: int) -> dict[str, Any]:
    return {
        **_qwen3_moe_extras(config, hidden_size),
        "shared_expert_size": config.integer("shared_expert_intermediate_size"),
        "qkv_bias": config.boolean("qkv_bias", True),
    }


def _expert_counts(config: Fields) -> dict[str, int]:
    count = config.integer("num_local_experts" if config.has("num_local_experts") else "num_experts", high=MAX_EXPERTS)
    return {"num_experts": count, "num_experts_per_token": config.integer("num_experts_per_tok", high=count)}


def _gemma3_extras(config: Fields, hidden_size: int) -> dict[str, Any]:
    return {
        "attention_scale": config.number("query_pre_attn_scalar", 256.0, low=1e-6) ** -0.5,
        "embedding_scale": math.sqrt(hidden_size),
        "logits_softcap": config.number("final_logit_softcapping", 0.0),
    }


def _opt_extras(config: Fields, hidden_size: int) -> dict[str, Any]:
    pre_norm = config.boolean("do_layer_norm_before", True)
    return {
        "pre_norm": pre_norm,
        "final_norm": pre_norm and not config.boolean("_remove_final_layer_norm", False),
        "embedding_size": config.integer("word_embed_proj_dim", hidden_size),
    }


ARCHITECTURES = (
    Architecture(
        name="llama",
        model_types=("llama",),
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"},
        extras=_llama_extras,
        bias_key="attention_bias",
    ),
    Architecture(
        name="mistral",
        model_types=("mistral",),
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "hidden_act": "silu"},
        windows="all",
    ),
    Architecture(
        name="qwen2",
        model_types=("qwen2",),
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu"},
        flags={"qkv_bias": True},
        windows="upper",
    ),
    Architecture(
        name="qwen3",
        model_types=("qwen3",),
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "head_dim": 128},
        flags={"qk_norm": True},
        bias_key="attention_bias",
        windows="upper",
    ),
    Architecture(
        name="mixtral",
        model_types=("mixtral",),
        layer_tensors=_MIXTRAL_LAYER,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "hidden_act": "silu", "rope_theta": 1e6},
        extras=_mixtral_extras,
        windows="all",
    ),
    Architecture(
        name="qwen2moe",
        model_types=("qwen2_moe",),
        layer_tensors=_QWEN_MOE_LAYER,
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu"},
        extras=_qwen2_moe_extras,
        windows="upper",
    ),
    Architecture(
        name="qwen3moe",
        model_types=("qwen3_moe",),
        layer_tensors=_QWEN_MOE_LAYER,
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu"},
        only={"use_sliding_window": False},
        flags={"qk_norm": True},
        extras=_qwen3_moe_extras,
        bias_key="attention_bias",
    ),
    Architecture(
        name="gemma3",
        model_types=("gemma3_text", "gemma3"),
        roots=("model.", "language_model.model.", "model.language_model.", ""),
        layer_tensors=_GEMMA_LAYER,
        keys={"hidden_act": "hidden_activation"},
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
        },
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        flags={"qk_norm": True, "post_norms": True, "norm_plus_one": True},
        extras=_gemma3_extras,
        bias_key="attention_bias",
        windows="pattern",
        context_is_scaled=True,
    ),
    Architecture(
        name="gpt2",
        model_types=("gpt2",),
        roots=("transformer.", ""),
        tensors=_GPT2_TENSORS,
        layer="h.{}.",
        layer_tensors=_GPT2_LAYER,
        keys={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True},
        only={"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False},
        flags={"norm": "layer", "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
        mlp_ratio=4,
        positions="learned",
    ),
    Architecture(
        name="opt",
        model_types=("opt",),
        roots=("model.decoder.", "decoder.", ""),
        tensors=_OPT_TENSORS,
        layer_tensors=_OPT_LAYER,
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={"activation_function": "relu", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        only={"layer_norm_elementwise_affine": True, "enable_bias": True},
        flags={
            "norm": "layer",
            "qkv_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "position_offset": 2,  # the table has two rows before position 0
        },
        extras=_opt_extras,
        positions="learned",
    ),
)

_GATED: Mapping[str, Activation] = {
    "silu": "silu_mul",
    "swish": "silu_mul",
    "gelu_pytorch_tanh": "gelu_tanh_mul",
    "gelu_new": "gelu_tanh_mul",
}
_PLAIN: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def architecture_of(model_type: str) -> Architecture:
    """The row for a `model_type`.

    Raises:
        UnsupportedModelError: no such row; names the known ones.
    """
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            return row
    known = ", ".join(t for row in ARCHITECTURES for t in row.model_types)
    raise UnsupportedModelError(f"model type {model_type!r} is not known; known types: {known}")


def architecture_named(name: str) -> Architecture:
    """The row with this name (ModelSpec.architecture)."""
    return next(row for row in ARCHITECTURES if row.name == name)


def activation_of(row: Architecture, name: str) -> Activation:
    """The op's activation for a Hugging Face activation name; gated where the row's MLP has a gate.

    Raises:
        UnsupportedModelError: no such activation; names the known ones.
    """
    table = _GATED if "gate" in row.layer_tensors else _PLAIN
    if name not in table:
        raise UnsupportedModelError(f"activation {name!r} is not known for {row.name}; known ones: {', '.join(table)}")
    return table[name]
