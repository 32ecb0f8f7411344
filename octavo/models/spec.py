"""What a model is, in numbers and flags: the bridge between a checkpoint's own config and the decoder.

Readers (Hugging Face config.json, GGUF metadata) produce a `ModelSpec`; the decoder records a program from it and
nothing else. Also the files a model consists of.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from octavo.program.ops import Activation, Rope


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a resolved model lies on disk. Made by models/hub.py; the engine process gets it ready-made."""

    name: str  # what the user typed: alias, path or repo id
    format: Literal["hf", "gguf"]
    path: Path  # folder ("hf") or file ("gguf")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int = 0  # sliding window in tokens; 0 is global
    rope: Rope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only model in numbers. `architecture` is the row of models/architectures.py it came from."""

    architecture: str  # "llama", "qwen3", "gemma3", "gpt2", "opt", ...
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int  # what the checkpoint says it can do
    max_model_len: int  # what RoPE factors and tables were fixed for
    layers: tuple[LayerSpec, ...]

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # weights stored as (w - 1): folded at load (Gemma in HF form)
    activation: Activation = "silu_mul"
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    post_norms: bool = False  # sandwich norms after attention and MLP (Gemma 2, 3)
    pre_norm: bool = True  # False: norm after the residual sum (OPT-350m)
    final_norm: bool = True
    attention_scale: float = 0.0  # 0: head_dim ** -0.5
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    logits_scale: float = 1.0
    embedding_scale: float = 1.0
    embedding_size: int = 0  # 0: hidden_size; else projections in and out (OPT-350m)
    learned_positions: int = 0  # rows of the position table; 0: none
    position_offset: int = 0  # OPT: 2
    tie_word_embeddings: bool = False

    num_experts: int = 0  # 0: every MLP is dense
    num_experts_per_token: int = 0
    expert_size: int = 0  # inner width of one expert
    shared_expert_size: int = 0  # of the expert that all tokens go through; 0: none
    renormalize_experts: bool = False  # the shares of the chosen experts sum to one
    dense_layers: tuple[int, ...] = ()  # layers without experts

    stored_dtype: str = "float32"  # "float32" | "bfloat16" | "float16" | "quantized"
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: dict[str, int | float] = field(default_factory=dict)  # what it recommends of SamplingParams
