"""Safetensors single and sharded, dummy weights, and every corruption of a file refused by name."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from octavo.errors import ConfigError, ModelError, ModelFileError, UnsupportedModelError
from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.safetensors_file import SafetensorsFile
from octavo.models.spec import ModelFiles
from octavo.models.weights import open_weights
from tests.model.tiny import Engine, make_tiny, reference

PROMPT = [1, 17, 93, 4, 55, 60, 2, 8]


@pytest.fixture
def tiny(tmp_path: Path) -> ModelFiles:
    return make_tiny("llama", tmp_path, num_hidden_layers=1)


def shard(folder: Path) -> None:
    """Splits model.safetensors in two and writes the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def change_index(folder: Path, name: str, file: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def open_all(files: ModelFiles) -> None:
    spec = read_spec(files)
    source = open_weights(files, spec)
    for part in record(spec).parts:
        assert source.get(part).type == source.type_of(part)


def test_shards_answer_like_one_file(tiny: ModelFiles) -> None:
    whole = Engine(reference, tiny).step([(0, 0, PROMPT)])
    shard(tiny.path)
    assert np.array_equal(Engine(reference, tiny).step([(0, 0, PROMPT)]), whole)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin", 3])
def test_index_cannot_leave_the_folder(tiny: ModelFiles, file: Any) -> None:
    shard(tiny.path)
    change_index(tiny.path, "model.norm.weight", file)
    with pytest.raises(ModelFileError, match=r"model.norm.weight must be (the name of a .safetensors file|a string)"):
        open_all(tiny)


def test_missing_shard_and_missing_tensors_are_named(tiny: ModelFiles) -> None:
    shard(tiny.path)
    change_index(tiny.path, "ghost", "model-1-of-2.safetensors")
    with pytest.raises(ModelFileError, match=r"places tensor ghost in model-1-of-2"):
        open_all(tiny)
    (tiny.path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"model-2-of-2.safetensors is missing"):
        open_all(tiny)


def test_missing_and_misshapen_tensors_are_named(tiny: ModelFiles) -> None:
    path = tiny.path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name][:-1]}, path)
    with pytest.raises(ModelFileError, match=rf"tensor {name} in .* has shape \[23, 48\], but .* \[24, 48\]"):
        open_all(tiny)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(ModelFileError, match=rf"tensor {name} \(layers.0.k.weight\) is missing"):
        open_all(tiny)
    save_file({**tensors, name: tensors[name].astype(np.float64)}, path)
    with pytest.raises(UnsupportedModelError, match=rf"tensor {name} has dtype F64"):
        open_all(tiny)


def test_other_formats_are_named(tiny: ModelFiles) -> None:
    (tiny.path / "model.safetensors").rename(tiny.path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"neither model.safetensors nor"):
        open_all(tiny)


def write_raw(path: Path, header: Any, data: bytes = b"\0" * 64) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b"[]", "not a JSON object"),
        ({"x": 1}, "entry of tensor 'x' is not an object"),
        ({"x": {"shape": [1], "data_offsets": [0, 4]}}, "tensor 'x' has no dtype"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "has shape"),
        ({"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, "has shape"),
        ({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}}, "has shape"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "but has 4 bytes"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "lies at bytes 4 to 0"),
        ({"x": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}, "but the file holds 64 bytes"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, True]}}, "has data_offsets"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "has data_offsets"),
    ],
)
def test_corrupt_headers(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        SafetensorsFile(write_raw(tmp_path / "x.safetensors", header))


def test_lying_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for claimed in (9, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", claimed) + b"{}")
        with pytest.raises(ModelFileError, match=rf"the header claims {claimed} bytes, but the file has 10"):
            SafetensorsFile(path)
    path.write_bytes(b"\0" * 7)
    with pytest.raises(ModelFileError, match="7 bytes are too few"):
        SafetensorsFile(path)


def test_unaligned_data_is_copied_not_refused(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]}}).encode()
    file = SafetensorsFile(write_raw(tmp_path / "x.safetensors", header, b"\0" + values.tobytes()))
    data = file.get("x").data
    assert data.flags.aligned
    assert np.array_equal(data, values)


@given(position=st.integers(0, 2000), value=st.integers(0, 255), cut=st.none() | st.integers(0, 30_000))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_give_an_error_or_a_model(tiny: ModelFiles, position: int, value: int, cut: int | None) -> None:
    original = tiny.path / "model.safetensors"
    broken = tiny.path / "broken"
    broken.mkdir(exist_ok=True)
    content = bytearray(original.read_bytes())
    content[position] = value
    (broken / "model.safetensors").write_bytes(content[:cut])
    (broken / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    with contextlib.suppress(ModelError):  # nothing else may come out
        open_all(ModelFiles("broken", "hf", broken))


def test_gpt2_fused_and_transposed_tensors(tmp_path: Path) -> None:
    files = make_tiny("gpt2", tmp_path, n_layer=1)
    tensors = load_file(tmp_path / "model.safetensors")
    source = open_weights(files, read_spec(files))
    fused = tensors["transformer.h.0.attn.c_attn.weight"]  # [in, q | k | v]
    assert np.array_equal(source.get("layers.0.k.weight").data, fused[:, 48:96].T)
    assert np.array_equal(source.get("layers.0.v.bias").data, tensors["transformer.h.0.attn.c_attn.bias"][96:])
    assert np.array_equal(source.get("layers.0.down.weight").data, tensors["transformer.h.0.mlp.c_proj.weight"].T)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")  # as the first GPT-2 files are
    assert np.array_equal(open_weights(files, read_spec(files)).get("layers.0.k.weight").data, fused[:, 48:96].T)


def test_tensors_are_views_on_the_file(tiny: ModelFiles) -> None:
    data = open_weights(tiny, read_spec(tiny)).get("embed").data
    owner: Any = data
    while owner.base is not None and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap)
    assert not data.flags.writeable


def test_dummy_weights_need_config_only_and_follow_the_seed(tiny: ModelFiles) -> None:
    (tiny.path / "model.safetensors").unlink()
    spec = read_spec(tiny)
    first, same, other = (open_weights(tiny, spec, load_format="dummy", seed=s) for s in (3, 3, 4))
    parts = list(record(spec).parts)
    forwards = {part: first.get(part).data for part in parts}
    backwards = {part: same.get(part).data for part in reversed(parts)}
    assert all(np.array_equal(forwards[part], backwards[part]) for part in parts)
    assert not np.array_equal(forwards["embed"], other.get("embed").data)
    assert not np.array_equal(forwards["layers.0.gate.weight"], forwards["layers.0.up.weight"])
    assert abs(forwards["layers.0.attn_norm.weight"].mean() - 1) < 0.02
    assert 0.015 < forwards["embed"].std() < 0.025
    logits = Engine(reference, tiny, load_format="dummy").step([(0, 0, PROMPT)])
    assert np.isfinite(logits).all()
    assert 0.05 < logits.std() < 5


def test_load_format_must_fit_the_files(tiny: ModelFiles) -> None:
    spec = read_spec(tiny)
    with pytest.raises(ConfigError, match=r"--load-format gguf: .* is safetensors"):
        open_weights(tiny, spec, load_format="gguf")
    assert open_weights(tiny, spec, load_format="safetensors").type_of("embed") == "F32"
