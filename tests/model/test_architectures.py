"""Every architecture row and RoPE kind against transformers in float32: same greedy tokens, same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from octavo.models.reader import read_spec
from octavo.runtime.base import Runtime
from tests.model.tiny import ARCHITECTURES, Engine, load_oracle, make_tiny, oracle_logits, reference, runtimes

NUM_TOKENS = 24
CHUNK = 5
TOLERANCE = 1e-4
PROMPTS = [[1, 17, 93, 4, 55, 60, 2, 8, 100, 31, 31, 7, 42], [1, 5, 77]]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "llama-plain": ("llama", {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": 4}),
    "llama-head-dim": ("llama", {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2-no-window": ("qwen2", {"use_sliding_window": False}),
    "qwen3-windows": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2moe-windows": (
        "qwen2moe",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3moe-sparse": (
        "qwen3moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": False, "num_experts_per_tok": 1, "attention_bias": True},
    ),
    "gemma3-untied": ("gemma3", {"tie_word_embeddings": False, "attention_bias": True}),
    "gpt2-relu": ("gpt2", {"activation_function": "relu", "n_inner": 56}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu"}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
}


def assert_equal_to_oracle(engine: Engine, oracle: Any, prompts: list[list[int]]) -> None:
    texts, logits = engine.generate(prompts, NUM_TOKENS, CHUNK)
    for prompt, generated, ours in zip(prompts, texts, logits, strict=True):
        expected = oracle_logits(oracle, prompt + generated)[: len(ours)]
        assert np.abs(ours - expected).max() < TOLERANCE
        greedy = expected.argmax(axis=-1)[len(prompt) - 1 :]  # each token follows from the oracle's own logits
        assert generated == greedy.tolist()
        assert np.ptp(expected, axis=0).max() > 1, "logits that ignore the text would prove little"


@pytest.mark.parametrize("make_runtime", runtimes())
@pytest.mark.parametrize("variant", VARIANTS)
def test_row_equals_transformers(variant: str, make_runtime: Callable[[], Runtime], tmp_path: Path) -> None:
    architecture, overrides = VARIANTS[variant]
    files = make_tiny(architecture, tmp_path, **overrides)
    assert_equal_to_oracle(Engine(make_runtime, files), load_oracle(files), PROMPTS)


LONG = list(range(3, 43))  # 40 tokens, past the trained 32
ROPES: dict[str, tuple[dict[str, Any], int]] = {  # rope_parameters, max_model_len
    "linear": ({"rope_type": "linear", "factor": 4.0}, 96),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 96),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "original_max_position_embeddings": 32}, 96),
    "yarn-mscale": (
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
        96,
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        32,
    ),
    "longrope-long": (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.5, 6.0, 8.0],
            "original_max_position_embeddings": 32,
        },
        96,
    ),
    "longrope-short": (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.5, 6.0, 8.0],
            "original_max_position_embeddings": 32,
        },
        32,
    ),
}


@pytest.mark.parametrize("make_runtime", runtimes())
@pytest.mark.parametrize("kind", ROPES)
def test_rope_kind_equals_transformers(kind: str, make_runtime: Callable[[], Runtime], tmp_path: Path) -> None:
    parameters, max_model_len = ROPES[kind]
    files = make_tiny(
        "llama", tmp_path, max_position_embeddings=32, rope_parameters={"rope_theta": 10_000.0, **parameters}
    )
    oracle = load_oracle(files)
    prompt = LONG if max_model_len > 32 else LONG[:8]
    if kind == "dynamic":  # transformers grows its base with the text and keeps the largest; ours is fixed at load
        oracle_logits(oracle, list(range(96)))
    engine = Engine(make_runtime, files, max_model_len=max_model_len)
    assert_equal_to_oracle(engine, oracle, [prompt])


def test_rope_scaling_of_transformers_4_reads_the_same(tmp_path: Path) -> None:
    files = make_tiny(
        "llama",
        tmp_path,
        max_position_embeddings=32,
        rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0},
    )
    path = tmp_path / "config.json"
    newer = read_spec(files)
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}))
    older = read_spec(files)
    assert older.layers[0].rope is not None
    assert newer.layers[0].rope is not None
    assert older.layers[0].rope.inv_freq == newer.layers[0].rope.inv_freq
    assert older.max_model_len == newer.max_model_len == 96


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_narrow_checkpoint_equals_transformers(stored: str, tmp_path: Path) -> None:
    files = make_tiny("gemma3", tmp_path, dtype=stored)
    engine = Engine(reference, files)
    assert engine.spec.stored_dtype == stored
    assert_equal_to_oracle(engine, load_oracle(files), PROMPTS)


def test_nested_text_config_and_its_prefix(tmp_path: Path) -> None:
    files = make_tiny("gemma3", tmp_path)
    _, before = Engine(reference, files).generate(PROMPTS, 4, CHUNK)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    _, after = Engine(reference, files).generate(PROMPTS, 4, CHUNK)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_bfloat16_matrices_stay_close_to_float32(tmp_path: Path) -> None:
    files = make_tiny("llama", tmp_path)
    exact = Engine(reference, files).step([(0, 0, LONG)])
    rounded = Engine(reference, files, dtype="bfloat16").step([(0, 0, LONG)])
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.ptp(exact)
