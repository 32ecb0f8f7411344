"""Writes GGUF files for tests with the gguf package's own writer and name map: an oracle that is not our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from octavo.models.spec import ModelFiles

ARCHES = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray], arch: str = "llama", **writer: Any
) -> ModelFiles:
    """A file with float tensors as they are. Metadata values: int (uint32), float, bool, str, lists of these."""
    out = gguf.GGUFWriter(path, arch, **writer)
    for key, value in metadata.items():
        add_value(out, key, value)
    for name, tensor in tensors.items():
        out.add_tensor(name, tensor)
    return finish(out, path)


def finish(out: gguf.GGUFWriter, path: Path) -> ModelFiles:
    """Writes everything and closes."""
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return ModelFiles(str(path), "gguf", path)


def add_value(out: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One metadata entry by the value's Python type."""
    adders = {bool: out.add_bool, int: out.add_uint32, float: out.add_float32, str: out.add_string}
    (out.add_array if isinstance(value, list) else adders[type(value)])(key, value)


def convert(files: ModelFiles, path: Path, *, quantize: gguf.GGMLQuantizationType | None = None) -> ModelFiles:
    """A Hugging Face checkpoint of tests.model.tiny as a GGUF file, converted as llama.cpp's script does."""
    config = json.loads((files.path / "config.json").read_text())
    config = config.get("text_config", config)
    kind = config["model_type"].removesuffix("_text")
    arch = ARCHES.get(kind, kind)
    out = gguf.GGUFWriter(path, arch)
    metadata = _gpt2_metadata(config) if arch == "gpt2" else _metadata(config)
    for key, value in metadata.items():
        if value is not None:
            add_value(out, f"{arch}.{key}", value)
    add_value(out, "tokenizer.ggml.bos_token_id", config["bos_token_id"])
    add_value(out, "tokenizer.ggml.eos_token_id", config["eos_token_id"])
    num_layers = metadata["block_count"]
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), num_layers)
    heads = {"q_proj": metadata["attention.head_count"], "k_proj": metadata.get("attention.head_count_kv")}
    for hf_name, tensor in _stack_experts(load_file(files.path / "model.safetensors")).items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        if arch == "gpt2" and tensor.ndim == 2 and any(part in name for part in CONV1D):
            tensor = np.ascontiguousarray(tensor.T)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch == "llama":
            for part, count in heads.items():
                tensor = permute(tensor, count) if f"{part}." in hf_name else tensor
        if "shared_expert_gate" in hf_name:
            tensor = tensor.reshape(-1)
        if quantize is not None and tensor.ndim >= 2 and "ffn_gate_inp" not in name:
            out.add_tensor(name, gguf.quantize(tensor, quantize), raw_dtype=quantize)
        else:
            out.add_tensor(name, tensor)
    return finish(out, path)


def _stack_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of each layer's experts as one, under a name without the expert's number."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        before, found, after = name.partition(".experts.")
        number, _, matrix = after.partition(".")
        if found:
            out.setdefault(f"{before}.experts.{matrix}", {})[int(number)] = tensor
        else:
            out[name] = tensor
    return {k: np.stack([v[i] for i in range(len(v))]) if isinstance(v, dict) else v for k, v in out.items()}


def permute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from half-split to neighbouring pairs, as conversions of Llama store them."""
    rows = tensor.shape[0]
    pairs = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(tensor.shape))


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    is_gemma = "sliding_attention" in ropes
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "expert_count": config.get("num_local_experts", config.get("num_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": config.get("sliding_window"),
        "attention.sliding_window_pattern": 2 if is_gemma else None,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": None if rope["rope_type"] == "default" else rope["rope_type"],
        "rope.scaling.factor": rope.get("factor"),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def _gpt2_metadata(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "block_count": config["n_layer"],
        "context_length": config["n_positions"],
        "embedding_length": config["n_embd"],
        "feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
        "attention.head_count": config["n_head"],
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
    }
