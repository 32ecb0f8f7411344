"""GGUF models against the Hugging Face checkpoints they were converted from, and specs that cannot be."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError, ModelError, ModelFileError, UnsupportedModelError
from octavo.models.decoder import record
from octavo.models.gguf_file import GGUFFile
from octavo.models.gguf_weights import GGUFWeights, half_split_rows
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.models.weights import open_weights
from octavo.runtime.reference.tensors import to_float32
from tests.model.gguf_tiny import convert, permute, write_gguf
from tests.model.tiny import Engine, make_tiny, reference

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"mlp_bias": False}),
    "llama-no-bias": ("llama", {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10_000.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen2moe": ("qwen2moe", {"mlp_only_layers": None}),
    "qwen3moe": ("qwen3moe", {}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 24}),
    "gpt2": ("gpt2", {}),
}
UNEQUAL = {"architecture", "max_position_embeddings", "layers", "norm_plus_one", "attention_scale"}
MINIMAL: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def minimal_tensors(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Tensors for MINIMAL; a change of None leaves one out."""
    shapes = {
        "token_embd": (10, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (8, 8),
        "blk.0.attn_v": (8, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8),
        "blk.0.ffn_down": (8, 12),
    }
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


def minimal(tmp_path: Path, metadata: dict[str, Any] | None = None, **changes: Any) -> ModelFiles:
    """The smallest Llama, with changed metadata (None leaves a key out) and tensors."""
    merged = {**MINIMAL, **(metadata or {})}
    kept = {key: value for key, value in merged.items() if value is not None}
    return write_gguf(tmp_path / "x.gguf", kept, minimal_tensors(**changes))


def all_weights(files: ModelFiles, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Every tensor that the program asks for, dequantised."""
    source = open_weights(files, spec)
    return {part: to_float32(source.get(part)) for part in record(spec).parts}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_model_is_the_model(tmp_path: Path, variant: str) -> None:
    architecture, overrides = VARIANTS[variant]
    hf = make_tiny(architecture, tmp_path / "hf", **overrides)
    files = convert(hf, tmp_path / "x.gguf")
    theirs, ours = read_spec(hf, max_model_len=100), read_spec(files, max_model_len=100)
    for name in {field.name for field in fields(ModelSpec)} - UNEQUAL:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.attention_scale or ours.head_dim**-0.5) == (theirs.attention_scale or theirs.head_dim**-0.5)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.window == other.window
        assert (mine.rope is None) == (other.rope is None)
        if mine.rope is not None and other.rope is not None:
            np.testing.assert_allclose(mine.rope.inv_freq, other.rope.inv_freq, rtol=1e-6)
            assert mine.rope.scale == pytest.approx(other.rope.scale, rel=1e-6)
    expected = all_weights(hf, theirs)
    for part, tensor in all_weights(files, ours).items():
        np.testing.assert_array_equal(tensor, expected[part], err_msg=part)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_quantised_models_generate_what_their_rounded_weights_say(tmp_path: Path, architecture: str) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    overrides = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "query_pre_attn_scalar": 16}
    if architecture != "gemma3":
        overrides = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "mlp_bias": False}
    hf = make_tiny(architecture, tmp_path / "hf", **overrides)
    files = convert(hf, tmp_path / "x.gguf", quantize=kind)
    spec = read_spec(files)
    assert spec.stored_dtype == "quantized"
    assert open_weights(files, spec).type_of("layers.0.q.weight") == "Q8_0"
    exact, rounded = all_weights(hf, read_spec(hf)), all_weights(files, spec)
    for part, tensor in rounded.items():
        if tensor.ndim == 2 and "router" not in part:
            expected = gguf.dequantize(gguf.quantize(exact[part], kind), kind)
            np.testing.assert_array_equal(tensor, expected, err_msg=part)
    prompt = [1, 17, 93, 4, 55]
    tokens, logits = Engine(reference, files).generate([prompt], 8, 5)
    _, exact_logits = Engine(reference, hf).generate([prompt], 1, 5)
    assert len(tokens[0]) == 8
    error = np.abs(logits[0][:5] - exact_logits[0][:5]).max()
    assert 0 < error < 0.2 * np.abs(exact_logits[0][:5]).max()


@pytest.mark.parametrize(("rows", "heads"), [(8, 1), (64, 2), (96, 3)])
def test_half_split_rows_undo_the_conversion(rows: int, heads: int) -> None:
    original = np.arange(rows * 2).reshape(rows, 2)
    stored = permute(original, heads)
    assert not np.array_equal(stored, original)
    np.testing.assert_array_equal(stored[half_split_rows(rows, heads)], original)


def test_half_split_rows_are_exact_on_quantised_rows() -> None:
    kind = gguf.GGMLQuantizationType.Q4_0
    matrix = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    stored = gguf.quantize(permute(matrix, 3), kind)
    np.testing.assert_array_equal(stored[half_split_rows(24, 3)], gguf.quantize(matrix, kind))


def test_views_stay_on_the_map_where_rows_allow_it(tmp_path: Path) -> None:
    files = minimal(tmp_path)
    weights = GGUFWeights(files, read_spec(files))
    assert weights.get("layers.0.v.weight").data.base is not None
    assert weights.get("layers.0.q.weight").data.flags.c_contiguous


@pytest.mark.parametrize(
    ("dtype", "stored"), [(np.float32, "float32"), (np.float16, "float16"), (np.uint16, "bfloat16")]
)
def test_stored_dtype_is_that_of_the_matrices(tmp_path: Path, dtype: type, stored: str) -> None:
    path = tmp_path / "x.gguf"
    out = gguf.GGUFWriter(path, "llama")
    for key, value in MINIMAL.items():
        (out.add_float32 if isinstance(value, float) else out.add_uint32)(key, value)
    for name, tensor in minimal_tensors().items():
        raw = gguf.GGMLQuantizationType.BF16 if stored == "bfloat16" and tensor.ndim == 2 else None
        data = tensor.astype(dtype) if tensor.ndim == 2 else tensor
        out.add_tensor(name, data.view(np.uint8) if raw else data, raw_dtype=raw)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    files = ModelFiles("x", "gguf", path)
    spec = read_spec(files)
    assert spec.stored_dtype == stored
    assert open_weights(files, spec).get("layers.0.v.weight").shape == (8, 8)


def test_llama3_divisors_scale_the_frequencies(tmp_path: Path) -> None:
    plain = read_spec(minimal(tmp_path)).layers[0].rope
    divisors = np.array([1.0, 8.0], np.float32)
    scaled = read_spec(minimal(tmp_path, **{"rope_freqs.weight": divisors})).layers[0].rope
    assert plain is not None
    assert scaled is not None
    np.testing.assert_allclose(np.array(scaled.inv_freq) * divisors, plain.inv_freq, rtol=1e-6)
    assert scaled.scale == 1.0


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(9)] + ["<end_of_turn>"]
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.tokens": tokens}
    assert read_spec(minimal(tmp_path, ids)).eos_token_ids == (1, 4)
    chat = {**ids, "tokenizer.chat_template": "{{ message }}<end_of_turn>"}
    assert read_spec(minimal(tmp_path, chat)).eos_token_ids == (1, 4, 9)
    assert read_spec(minimal(tmp_path, {"tokenizer.ggml.eos_token_id": 10})).eos_token_ids == ()  # no such token


def test_output_weight_unties(tmp_path: Path) -> None:
    assert read_spec(minimal(tmp_path)).tie_word_embeddings
    untied = minimal(tmp_path, **{"output.weight": np.full((10, 8), 2, np.float32)})
    spec = read_spec(untied)
    assert not spec.tie_word_embeddings
    assert open_weights(untied, spec).get("lm_head").data[0, 0] == 2


def test_per_layer_numbers_must_agree(tmp_path: Path) -> None:
    assert read_spec(minimal(tmp_path, {"llama.feed_forward_length": [12, 12]})).intermediate_size == 12
    with pytest.raises(UnsupportedModelError, match="differs from layer to layer"):
        read_spec(minimal(tmp_path, {"llama.feed_forward_length": [12, 16]}))


def test_max_model_len_is_bounded_by_the_file(tmp_path: Path) -> None:
    files = minimal(tmp_path)
    assert read_spec(files).max_model_len == 64
    assert read_spec(files, max_model_len=10).max_model_len == 10
    with pytest.raises(ConfigError, match="at most 64"):
        read_spec(files, max_model_len=65)
    stretched = minimal(tmp_path, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert read_spec(stretched).max_position_embeddings == 128


WRONG: dict[str, tuple[dict[str, Any], type[ModelError], str]] = {
    "missing": ({"llama.block_count": None}, ModelFileError, r"llama\.block_count is missing"),
    "type": ({"llama.block_count": "one"}, ModelFileError, "integer from 1"),
    "no layers": ({"llama.block_count": 0}, ModelFileError, "integer from 1"),
    "layers": ({"llama.block_count": 1 << 31}, ModelFileError, "from 1 to 1024"),
    "context": ({"llama.context_length": 0xFFFFFFFF}, ModelFileError, "context_length"),
    "odd heads": ({"llama.attention.head_count": 3}, ModelFileError, "multiple of attention"),
    "kv heads": ({"llama.attention.head_count_kv": 4}, ModelFileError, "multiple of attention.head_count_kv"),
    "head size": ({"llama.attention.value_length": 6}, ModelFileError, "same as the key length"),
    "partial rotary": ({"llama.rope.dimension_count": 2}, ModelFileError, "rope.dimension_count"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, ModelFileError, "epsilon"),
    "NaN": ({"llama.rope.freq_base": float("nan")}, ModelFileError, "freq_base"),
    "theta": ({"llama.rope.freq_base": 1.0}, ModelFileError, "freq_base"),
    "scaling": ({"llama.rope.scaling.type": "spiral"}, UnsupportedModelError, "spiral"),
    "scaling key": ({"llama.rope.scaling.spin": 1.0}, UnsupportedModelError, "spin"),
    "experts": ({"llama.expert_count": 8}, ModelFileError, "expert_used_count is missing"),
    "chosen experts": (
        {"llama.expert_count": 8, "llama.expert_used_count": 9},
        ModelFileError,
        "expert_used_count must be an integer from 1 to 8",
    ),
    "tokens": ({"tokenizer.ggml.tokens": ["x"] * 11}, ModelFileError, "at most the 10 rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_metadata_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, error, reason = WRONG[case]
    with pytest.raises(error, match=reason):
        read_spec(minimal(tmp_path, changes))


def test_unknown_architectures_are_named(tmp_path: Path) -> None:
    files = write_gguf(tmp_path / "x.gguf", {}, {}, arch="mamba")
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not known; known ones: llama"):
        read_spec(files)


def test_vocabulary_files_are_no_model(tmp_path: Path) -> None:
    files = write_gguf(tmp_path / "x.gguf", MINIMAL, {})
    with pytest.raises(ModelFileError, match="no matrix token_embd"):
        read_spec(files)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"blk.0.ffn_up.weight": None}, ModelFileError, r"ffn_up\.weight \(layers\.0\.up\.weight\) is missing"),
        ({"blk.0.ffn_up.weight": np.ones((8, 12), np.float32)}, ModelFileError, r"shape \[8, 12\].*\[12, 8\]"),
        ({"blk.0.attn_norm.weight": np.ones(8, np.float64)}, UnsupportedModelError, "F64"),
        ({"rope_freqs.weight": np.zeros(2, np.float32)}, ModelFileError, "positive"),
        ({"rope_freqs.weight": np.ones(3, np.float32)}, ModelFileError, "rotary dimension needs 2"),
        ({"rope_freqs.weight": np.ones(2, np.float16)}, ModelFileError, "F32 vector"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], error: type[ModelError], reason: str
) -> None:
    files = minimal(tmp_path, **changes)
    with pytest.raises(error, match=reason):
        open_weights(files, read_spec(files))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1 << 16), bits=st.integers(1, 255))
def test_flipped_headers_end_in_a_model_error_or_a_model(tmp_path: Path, at: int, bits: int) -> None:
    path = tmp_path / "x.gguf"
    if not path.exists():
        minimal(tmp_path)
    whole = path.read_bytes()
    end = GGUFFile.open(path).tensors["token_embd.weight"].offset
    data = bytearray(whole)
    data[at % end] ^= bits
    flipped = tmp_path / "flipped.gguf"
    flipped.write_bytes(data)
    files = ModelFiles("x", "gguf", flipped)
    try:
        spec = read_spec(files)
        source = open_weights(files, spec)
    except ModelError:
        return
    for part in record(spec).parts:
        assert source.get(part).nbytes > 0


@pytest.mark.model
def test_smollm2_reads_as_what_it_is() -> None:
    files = resolve_model("smollm2")
    spec = read_spec(files)
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert (spec.vocab_size, spec.max_model_len, spec.norm_eps) == (49152, 8192, 1e-5)
    assert (spec.tie_word_embeddings, spec.stored_dtype, spec.eos_token_ids) == (True, "quantized", (2,))
    weights = open_weights(files, spec)
    assert weights.type_of("embed") == "Q8_0"
    assert weights.get("layers.7.q.weight").data.shape == (576, 576 // 32 * 20)
    assert np.isfinite(to_float32(weights.get("layers.29.down.weight"))).all()
