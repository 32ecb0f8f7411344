"""The GGUF header reader: what the gguf package writes reads back equal, and no damaged file gets past it."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.gguf_file import TENSOR_TYPES, GGUFFile
from octavo.models.reader import hold
from octavo.models.spec import ModelFiles
from octavo.runtime.base import Tensor
from octavo.runtime.reference.tensors import to_float32
from tests.model.gguf_tiny import add_value, finish, write_gguf

REAL_TYPES = ["F32", "F16", "BF16", "Q4_1", "Q8_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ2_XXS"]
METADATA: dict[str, Any] = {
    "a.count": 7,
    "a.flag": True,
    "a.off": False,
    "a.ratio": 0.25,
    "a.text": "naïve ▁ 日本 \N{PILE OF POO}",
    "a.texts": ["x", "", "né"],
    "a.numbers": [1, -2, 3],
    "a.floats": [0.5, -1.25],
    "a.flags": [True, False, True],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of every kind of value and three tensors."""
    tensors = {
        "one": np.arange(6, dtype=np.float32).reshape(2, 3),
        "two": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        "three": np.ones(5, dtype=np.float32),
    }
    return write_gguf(tmp_path / "small.gguf", METADATA, tensors).path


def patched(path: Path, offset: int, raw: bytes) -> Path:
    """A copy with some bytes replaced."""
    data = bytearray(path.read_bytes())
    data[offset : offset + len(raw)] = raw
    out = path.with_name("patched.gguf")
    out.write_bytes(data)
    return out


def header(num_tensors: int, num_entries: int, body: bytes = b"") -> bytes:
    """A file made by hand."""
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + body


def text(value: bytes) -> bytes:
    """A string of the format."""
    return struct.pack("<Q", len(value)) + value


def tensor_entry(
    name: bytes = b"t", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    """A tensor's entry; dims fastest first, as stored."""
    return text(name) + struct.pack(
        f"<I{len(dims)}QIQ", len(dims) if num_dims is None else num_dims, *dims, kind, offset
    )


def test_metadata_round_trip(small: Path) -> None:
    metadata = GGUFFile.open(small).metadata
    assert metadata.pop("general.architecture") == "llama"
    assert metadata == METADATA
    assert {key: type(value) for key, value in metadata.items()} == {key: type(v) for key, v in METADATA.items()}


def test_what_is_held_is_not_read_again_unless_the_file_has_changed(small: Path) -> None:
    held = hold(ModelFiles("small", "gguf", small))
    assert GGUFFile.open(small) is held
    small.write_bytes(small.read_bytes() + b"more")
    assert GGUFFile.open(small) is not held
    assert hold(ModelFiles("folder", "hf", small)) is None


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("sign", ["int", "uint"])
def test_integers_keep_their_extremes(tmp_path: Path, width: int, sign: str) -> None:
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if sign == "int" else (0, (1 << width) - 1)
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    getattr(out, f"add_{sign}{width}")("low", low)
    getattr(out, f"add_{sign}{width}")("high", high)
    finish(out, tmp_path / "x.gguf")
    metadata = GGUFFile.open(tmp_path / "x.gguf").metadata
    assert (metadata["low"], metadata["high"]) == (low, high)


def test_nested_arrays(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 5, 2) + struct.pack("<2i", -1, 2)
    path = tmp_path / "x.gguf"
    path.write_bytes(header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 2) + inner + inner))
    assert GGUFFile.open(path).metadata == {"k": [[-1, 2], [-1, 2]]}


def test_tensors_round_trip(small: Path) -> None:
    file = GGUFFile.open(small)
    assert file.tensors["two"].shape == (2, 3, 4)
    assert file.tensors["two"].type == "F16"
    np.testing.assert_array_equal(file.data("one"), np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(file.data("two"), np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    assert not file.data("one").flags.writeable


def test_custom_alignment(tmp_path: Path) -> None:
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    out.add_custom_alignment(256)
    out.add_tensor("a", np.full(3, 5, np.float32))
    out.add_tensor("b", np.full(3, 6, np.float32))
    finish(out, tmp_path / "x.gguf")
    file = GGUFFile.open(tmp_path / "x.gguf")
    assert file.tensors["b"].offset % 256 == 0
    assert file.data("b").tolist() == [6, 6, 6]


def test_the_type_table_is_that_of_the_format() -> None:
    for number, (name, block, block_bytes) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, block_bytes))


@pytest.mark.parametrize("type_name", REAL_TYPES)
def test_block_types_dequantise_as_the_gguf_reader_does(tmp_path: Path, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (3, 512)
    raw = np.random.default_rng(0).integers(0, 120, (shape[0], shape[1] // block * block_bytes), dtype=np.uint8)
    path = tmp_path / "x.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_tensor("w", raw, raw_dtype=kind)
    finish(out, path)
    file = GGUFFile.open(path)
    theirs = gguf.GGUFReader(path).tensors[0]
    assert file.tensors["w"].shape == shape
    ours = to_float32(Tensor("w", file.tensors["w"].type, file.tensors["w"].shape, file.data("w")))
    np.testing.assert_array_equal(ours, gguf.dequantize(theirs.data, theirs.tensor_type).reshape(shape))
    assert np.ptp(ours) > 0


def test_every_truncation_is_refused(small: Path) -> None:
    data = small.read_bytes()
    end = max(t.offset + t.nbytes for t in GGUFFile.open(small).tensors.values())
    cut = small.with_name("cut.gguf")
    for size in range(end):
        cut.write_bytes(data[:size])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            GGUFFile.open(cut)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_end_in_a_model_error_or_a_readable_file(small: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(small.read_bytes())
    for at, bits in flips:
        data[at % len(data)] ^= bits
    path = small.with_name("flipped.gguf")
    path.write_bytes(data)
    try:
        file = GGUFFile.open(path)
    except (ModelFileError, UnsupportedModelError):
        return
    for name, tensor in file.tensors.items():
        assert file.data(name).nbytes == tensor.nbytes


HUGE = (1 << 64) - 1
LYING = {
    "tensor count": (header(HUGE, 0), "tensor count"),
    "tensor count, plausible": (header(3, 0, tensor_entry()), "tensor count|runs to"),
    "metadata count": (header(0, HUGE), "metadata count"),
    "key length": (header(0, 1, struct.pack("<Q", HUGE) + bytes(64)), "metadata key 0"),
    "string length": (header(0, 1, text(b"k") + struct.pack("<IQ", 8, 1 << 40) + bytes(64)), "'k'"),
    "string array": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 40) + bytes(64)), "'k'"),
    "number array": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 12, 1 << 23) + bytes(64)), "'k'"),
    "huge number array": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, HUGE) + bytes(64)), "limit"),
    "array of arrays": (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 24) + bytes(64)), "'k'"),
    "deep nesting": (header(0, 1, text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 2000), "deep"),
    "value type": (header(0, 1, text(b"k") + struct.pack("<I", 13) + bytes(64)), "value type 13"),
    "boolean": (header(0, 1, text(b"k") + struct.pack("<IB", 7, 2)), "boolean of 2"),
    "key without text": (header(0, 1, text(b"") + struct.pack("<IB", 7, 1)), "0 bytes"),
    "UTF-8": (header(0, 1, text(b"k") + struct.pack("<I", 8) + text(b"\xff\xfe")), "UTF-8"),
    "key twice": (header(0, 2, (text(b"k") + struct.pack("<IB", 7, 1)) * 2), "occurs twice"),
    "dimensions": (header(1, 0, tensor_entry(num_dims=1 << 31) + bytes(64)), "dimensions"),
    "no dimensions": (header(1, 0, tensor_entry(dims=()) + bytes(64)), "dimensions"),
    "zero dimension": (header(1, 0, tensor_entry(dims=(4, 0)) + bytes(64)), "shape"),
    "product": (header(1, 0, tensor_entry(dims=(HUGE, HUGE, HUGE, HUGE)) + bytes(64)), "shape"),
    "product that wraps to zero": (header(1, 0, tensor_entry(dims=(1 << 32, 1 << 32)) + bytes(64)), "shape"),
    "half a block": (header(1, 0, tensor_entry(dims=(16, 4), kind=8) + bytes(256)), "blocks of 32"),
    "offset": (header(1, 0, tensor_entry(offset=1 << 62) + bytes(64)), "ends at byte"),
    "offset alignment": (header(1, 0, tensor_entry(offset=8) + bytes(64)), "alignment"),
    "data": (header(1, 0, tensor_entry(dims=(64,)) + bytes(64)), "ends at byte|shape"),
    "tensor twice": (header(2, 0, tensor_entry() * 2 + bytes(128)), "occurs twice"),
    "overlap": (header(2, 0, tensor_entry(b"a", (16,)) + tensor_entry(b"b", (16,), 0, 32) + bytes(256)), "overlaps"),
    "alignment": (
        header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 24)),
        r"general\.alignment must be a power of two",
    ),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_headers_are_refused_without_large_allocations(tmp_path: Path, case: str) -> None:
    raw, reason = LYING[case]
    path = tmp_path / "lying.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=reason):
        GGUFFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_unknown_tensor_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header(1, 0, tensor_entry(kind=77) + bytes(64)))
    with pytest.raises(UnsupportedModelError, match="type number 77"):
        GGUFFile.open(path)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "fewer than 4 bytes"),
        (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=reason):
        GGUFFile.open(path)


def test_unreadable_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelFileError, match="cannot be read"):
            GGUFFile.open(path)


def test_split_files_are_refused_by_name(tmp_path: Path) -> None:
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    out.add_uint16("split.count", 3)
    add_value(out, "other", 1)
    finish(out, tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match=r"one of 3 parts.*--merge"):
        GGUFFile.open(tmp_path / "x.gguf")


def test_a_version_that_is_patched_is_refused(small: Path) -> None:
    with pytest.raises(ModelFileError, match="version 9"):
        GGUFFile.open(patched(small, 4, struct.pack("<I", 9)))
