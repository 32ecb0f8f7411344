"""Weights of a GGUF file under canonical names, in their stored blocks: views of the map wherever rows allow it."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.decoder import record
from octavo.models.gguf_file import TENSOR_TYPES, GGUFFile
from octavo.models.gguf_spec import gguf_architecture_of
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.runtime.base import Tensor

_NO_WEIGHT_TYPES = frozenset(("I8", "I16", "I32", "I64", "F64"))
WEIGHT_TYPES = frozenset(name for name, _, _ in TENSOR_TYPES.values()) - _NO_WEIGHT_TYPES

_TENSORS = {
    "embed": "token_embd.weight",
    "position_embed": "position_embd.weight",
    "lm_head": "output.weight",
    "final_norm.weight": "output_norm.weight",
    "final_norm.bias": "output_norm.bias",
}
_LAYER_TENSORS = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
    "router": "ffn_gate_inp",
    "shared_gate": "ffn_gate_inp_shexp",
    "shared.gate": "ffn_gate_shexp",
    "shared.up": "ffn_up_shexp",
    "shared.down": "ffn_down_shexp",
    "experts.gate": "ffn_gate_exps",
    "experts.up": "ffn_up_exps",
    "experts.down": "ffn_down_exps",
}
_FUSED = ("q", "k", "v")  # in this order in attn_qkv


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the file, or one of `pieces` equal parts of its rows; `heads` > 0: rows in half-split order."""

    name: str
    piece: int = 0
    pieces: int = 1  # 3 of attn_qkv; as many as there are experts where one tensor holds all
    heads: int = 0


class GGUFWeights:
    """Implements runtime.base.WeightSource. Opening reads the header only and checks every tensor the program needs.

    Raises:
        ModelFileError: a truncated or corrupt file; a missing tensor or one of the wrong shape.
        UnsupportedModelError: a tensor whose type weights do not have.
    """

    def __init__(self, files: ModelFiles, spec: ModelSpec) -> None:
        self._file = GGUFFile.open(files.path)
        self._permuted_heads = (
            {"q": spec.num_heads, "k": spec.num_kv_heads} if gguf_architecture_of(self._file).permuted else {}
        )
        self._num_experts = spec.num_experts
        self._shapes = record(spec).parts
        for part, shape in self._shapes.items():
            self._check(part, shape)

    def get(self, part: str) -> Tensor:
        """The tensor with this canonical name, [out, in], q and k rows in half-split order."""
        stored = self._stored(part)
        tensor = self._file.tensors[stored.name]
        data = self._file.data(stored.name)
        shape = self._shapes[part]
        rows = shape[0]
        data = data.reshape(stored.pieces * rows, *(-1 for _ in shape[1:]))
        data = data[stored.piece * rows : (stored.piece + 1) * rows]
        if stored.heads:
            data = data[half_split_rows(rows, stored.heads)]
        return Tensor(stored.name, tensor.type, shape, np.require(data, requirements=("C", "A")))

    def type_of(self, part: str) -> str:
        """Its stored type name, without reading it."""
        return self._file.tensors[self._stored(part).name].type

    def _stored(self, part: str) -> _Stored:
        if part in _TENSORS:
            return self._found(part, _Stored(_TENSORS[part]))
        _, index, name = part.split(".", 2)
        name, _, kind = name.rpartition(".")
        fused = f"blk.{index}.attn_qkv.{kind}"
        if name in _FUSED and fused in self._file.tensors:
            return _Stored(fused, _FUSED.index(name), len(_FUSED))
        piece, pieces = 0, 1
        if name.startswith("experts."):
            _, expert, matrix = name.split(".")
            name, piece, pieces = f"experts.{matrix}", int(expert), self._num_experts
        stored = f"blk.{index}.{_LAYER_TENSORS[name]}.{kind}"
        return self._found(part, _Stored(stored, piece, pieces, self._permuted_heads.get(name, 0)))

    def _found(self, part: str, stored: _Stored) -> _Stored:
        if stored.name not in self._file.tensors:
            raise ModelFileError(f"tensor {stored.name} ({part}) is missing from {self._file.path}")
        return stored

    def _check(self, part: str, expected: tuple[int, ...]) -> None:
        stored = self._stored(part)
        tensor = self._file.tensors[stored.name]
        whole = (expected[0] * stored.pieces, *expected[1:])
        found = tensor.shape if len(whole) == 1 else (math.prod(tensor.shape[:-1]), tensor.shape[-1])  # experts: 3-D
        if found != whole:
            raise ModelFileError(
                f"tensor {tensor.name} in {self._file.path} has shape {list(tensor.shape)}, "
                f"but the file's metadata makes it {list(whole)}"
            )
        if tensor.type not in WEIGHT_TYPES:
            raise UnsupportedModelError(
                f"tensor {tensor.name} in {self._file.path} is {tensor.type}, not a weight type"
            )


def half_split_rows(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Which stored row each row of q or k comes from.

    Conversions of Llama store a head's rotated pairs next to each other, (0, d/2), (1, d/2 + 1), ...; the Rope op
    rotates x[i] with x[i + d/2]. A permutation of rows is exact for block types too, because blocks lie within a row.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).ravel()
