"""Weights of a Hugging Face folder: one safetensors file, or shards with an index, under canonical names."""

from pathlib import Path

import numpy as np

from octavo.errors import ModelFileError
from octavo.models.architectures import Stored, architecture_named
from octavo.models.decoder import record
from octavo.models.hf_config import Fields, read_json
from octavo.models.safetensors_file import SafetensorsFile, StoredTensor
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.runtime.base import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsWeights:
    """Implements runtime.base.WeightSource. Opening reads headers only and checks every tensor the program needs.

    Raises:
        ModelFileError: a missing, truncated or corrupt file; a missing tensor or one of the wrong shape.
    """

    def __init__(self, files: ModelFiles, spec: ModelSpec) -> None:
        self._folder = files.path
        self._has_shifted_norms = spec.norm_plus_one
        self._row = architecture_named(spec.architecture)
        self._files = _open_files(files.path)  # by tensor name
        embed = self._row.stored("embed").name
        self._root = next((root for root in self._row.roots if f"{root}{embed}" in self._files), self._row.roots[0])
        for part, shape in record(spec).parts.items():
            self._check(part, shape)

    def get(self, part: str) -> Tensor:
        """The tensor with this canonical name, [out, in]; Gemma's norms get the 1 that they are stored without."""
        stored = self._stored(part)
        tensor = self._files[stored.name].get(stored.name)
        data = tensor.data.T if stored.transposed else tensor.data
        rows = data.shape[0] // stored.pieces
        data = np.ascontiguousarray(data[stored.piece * rows : (stored.piece + 1) * rows])
        if self._is_shifted(part):
            is_bf16 = tensor.type == "BF16"  # bit patterns: the upper halves of float32
            values = (data.astype(np.uint32) << 16).view(np.float32) if is_bf16 else data.astype(np.float32)
            return Tensor(stored.name, "F32", values.shape, values + np.float32(1))
        return Tensor(stored.name, tensor.type, data.shape, data)

    def type_of(self, part: str) -> str:
        """Its stored type name, without reading it."""
        return "F32" if self._is_shifted(part) else self._entry(part).dtype

    def _is_shifted(self, part: str) -> bool:
        return self._has_shifted_norms and part.endswith("norm.weight")

    def _stored(self, part: str) -> Stored:
        """Where a canonical tensor lies, root included; only the output head lies outside the root."""
        if part == "lm_head":
            prefix = self._root.removesuffix("model.") if self._root.endswith(".model.") else ""
            return Stored(f"{prefix}lm_head.weight")
        stored = self._row.stored(part)
        return Stored(f"{self._root}{stored.name}", stored.transposed, stored.piece, stored.pieces)

    def _entry(self, part: str) -> StoredTensor:
        name = self._stored(part).name
        if name not in self._files:
            raise ModelFileError(f"tensor {name} ({part}) is missing from the safetensors files in {self._folder}")
        return self._files[name].entries[name]

    def _check(self, part: str, expected: tuple[int, ...]) -> None:
        stored, shape = self._stored(part), self._entry(part).shape
        whole = (expected[0] * stored.pieces, *expected[1:])
        whole = whole[::-1] if stored.transposed else whole
        if shape != whole:
            raise ModelFileError(
                f"tensor {stored.name} in {self._files[stored.name].path} has shape {list(shape)}, "
                f"but config.json makes it {list(whole)}"
            )


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Every tensor's file."""
    if (folder / INDEX).exists():
        return _open_shards(folder)
    if (folder / SINGLE).exists():
        file = SafetensorsFile(folder / SINGLE)
        return dict.fromkeys(file.entries, file)
    raise ModelFileError(
        f"{folder} has neither {SINGLE} nor {INDEX}; other weight formats are not read: convert with save_pretrained()"
    )


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    path = folder / INDEX
    index = Fields(read_json(path), path)
    if not index.has("weight_map"):
        raise index.wrong("weight_map", "an object that maps tensors to files")
    weight_map = index.child("weight_map")
    opened: dict[str, SafetensorsFile] = {}
    files: dict[str, SafetensorsFile] = {}
    for name in weight_map.names():
        shard = weight_map.text(name)
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise weight_map.wrong(name, "the name of a .safetensors file in the same folder")
        if shard not in opened:
            if not (folder / shard).exists():
                raise ModelFileError(f"{folder / shard} is missing, but {INDEX} names it: fetch the model again")
            opened[shard] = SafetensorsFile(folder / shard)
        if name not in opened[shard].entries:
            raise ModelFileError(f"{INDEX} places tensor {name} in {shard}, which does not hold it")
        files[name] = opened[shard]
    return files
