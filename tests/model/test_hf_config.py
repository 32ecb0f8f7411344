"""Reading config.json: rows, defaults, context lengths, and every wrong value refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ConfigError, ModelFileError, UnsupportedModelError
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.sampling_params import SamplingParams

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def read(folder: Path, *, max_model_len: int | None = None, **changes: Any) -> ModelSpec:
    """The spec of LLAMA with fields changed; ... drops a field."""
    config = {name: value for name, value in {**LLAMA, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(ModelFiles("test", "hf", folder), max_model_len=max_model_len)


def test_bare_llama_gets_the_defaults(tmp_path: Path) -> None:
    spec = read(tmp_path)
    assert (spec.num_kv_heads, spec.head_dim, spec.norm_eps, spec.activation) == (4, 16, 1e-6, "silu_mul")
    assert (spec.tie_word_embeddings, spec.stored_dtype, spec.max_model_len) == (False, "float32", 2048)
    assert spec.layers[1].rope is not None
    assert spec.layers[1].rope.inv_freq[1] == pytest.approx(10_000 ** (-2 / 16), rel=1e-6)


def test_sparse_gemma3_gets_its_own_defaults(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 12, "sliding_window": 1024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    spec = read_spec(ModelFiles("test", "hf", tmp_path), max_model_len=4096)
    assert (spec.vocab_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (262208, 8, 4, 256)
    assert [layer.window for layer in spec.layers] == [1024] * 5 + [0] + [1024] * 5 + [0]
    local, far = spec.layers[0].rope, spec.layers[5].rope
    assert local is not None
    assert far is not None
    assert (local.inv_freq[0], far.inv_freq[0]) == (1.0, 0.125)  # only global layers are scaled
    assert local.inv_freq[64] == pytest.approx(10_000**-0.5, rel=1e-6)
    assert far.inv_freq[64] == pytest.approx(1_000_000**-0.5 / 8, rel=1e-6)
    assert spec.embedding_scale == pytest.approx(2560**0.5)
    assert spec.tie_word_embeddings


def test_layers_without_experts(tmp_path: Path) -> None:
    spec = read(tmp_path, **MOE, num_hidden_layers=7, decoder_sparse_step=3, mlp_only_layers=[5, 99])
    assert spec.dense_layers == (0, 1, 3, 4, 5, 6)
    assert (spec.num_experts, spec.num_experts_per_token, spec.expert_size) == (8, 2, 24)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_in_both_places(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, **{key: "bfloat16"}).stored_dtype == "bfloat16"


def test_generation_config_wins_and_gives_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2,)
    generation = {"eos_token_id": [7, 9, 7, 1000], "temperature": 0.6, "top_k": 20.0, "do_sample": True, "top_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    spec = read(tmp_path, eos_token_id=2)
    assert spec.eos_token_ids == (7, 9)  # 1000 is outside the vocabulary
    assert spec.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert SamplingParams(**spec.generation_defaults).top_k == 20
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    with pytest.raises(ModelFileError, match=r"generation_config.json: top_p must be a number from 0 to 1, not 7"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, 2048),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 4096),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}}, 2048),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}, 64),
    ],
)
def test_context_is_bound_by_what_the_model_can_do(tmp_path: Path, changes: dict[str, Any], limit: int) -> None:
    spec = read(tmp_path, max_model_len=limit, **changes)
    assert spec.max_model_len == spec.max_position_embeddings == limit
    assert read(tmp_path, max_model_len=5, **changes).max_model_len == 5
    with pytest.raises(ConfigError, match=rf"max_model_len {limit + 1} is more than the model's {limit} positions"):
        read(tmp_path, max_model_len=limit + 1, **changes)


def test_dynamic_rope_changes_only_when_more_is_asked_for(tmp_path: Path) -> None:
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    plain, dynamic = read(tmp_path).layers[0].rope, read(tmp_path, **scaling)
    longer = read(tmp_path, max_model_len=4096, **scaling).layers[0].rope
    assert plain is not None
    assert longer is not None
    assert dynamic.max_model_len == 2048
    assert dynamic.layers[0].rope is not None
    assert dynamic.layers[0].rope.inv_freq == plain.inv_freq
    assert longer.inv_freq[-1] < plain.inv_freq[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"vocab_size": "100"}, "vocab_size must be an integer"),
        ({"hidden_size": 0}, "hidden_size must be an integer from 1"),
        ({"hidden_size": 10**400}, "hidden_size must be an integer from 1"),
        ({"hidden_size": 65}, "hidden_size must be a multiple of 4"),
        ({"num_hidden_layers": 1e3}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers must be an integer from 1 to 1024"),
        ({"num_key_value_heads": 3}, r"num_attention_heads must be a multiple of num_key_value_heads \(3\)"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"rope_theta": 0}, "rope_theta must be a number"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor must be a number from"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [0]}}, "long_factor must be a list of positive"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 values"),
        ({"head_dim": 15}, "must be even and at least 2, not 15"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "float8"}, "torch_dtype must be one of float32, bfloat16, float16"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"model_type": ...}, "model_type must be the architecture's name"),
        ({"text_config": 3}, "text_config must be an object"),
        ({"model_type": "mixtral"}, "num_experts is missing"),
        ({**MOE, "num_local_experts": 2000}, "num_local_experts must be an integer from 1 to 1024"),
        ({**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok must be an integer from 1 to 8"),
        ({**MOE, "mlp_only_layers": [-1]}, "mlp_only_layers must be a list of numbers"),
        ({**MOE, "moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' is not known; known types: llama, mistral, qwen2"),
        ({"hidden_act": "xielu"}, "activation 'xielu' is not known for llama; known ones: silu"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "RoPE kind 'spiral' is not known; known kinds: default, linear"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised checkpoints \(awq\) are not supported"),
        ({**MOE, "use_sliding_window": True}, "qwen3moe with use_sliding_window=True is not supported"),
        ({"model_type": "opt", "ffn_dim": 64, "enable_bias": False}, "opt with enable_bias=False"),
    ],
)
def test_what_is_not_built_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must hold a JSON object, not list"),
    ],
)
def test_broken_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_spec(ModelFiles("test", "hf", tmp_path))


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config.json cannot be read: No such file"):
        read_spec(ModelFiles("test", "hf", tmp_path))


def test_gemma3_says_its_scaled_context_itself(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    gemma = {"model_type": "gemma3_text", "head_dim": 16, "max_position_embeddings": 131072, "rope_scaling": scaling}
    assert read(tmp_path, **gemma).max_model_len == 131072
    assert read(tmp_path, rope_scaling=scaling).max_model_len == 8 * 2048
