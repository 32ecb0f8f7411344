"""The CUDA C++ operators as torch custom ops (`torch.ops.octavo.*`), and where they take the place of Triton kernels.

`--cuda-ops cuda` selects them for what they can: decode attention (head sizes 64, 128, 256, up to 8 query heads a KV
head, blocks of 16, bfloat16 or fp8 KV), LayerNorm with residual, and bias + GELU. LayerNorm + GELU in one pass is here
for the study: no decoder computes GELU(LN(x)).
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from octavo.errors import StepError
from octavo.program.ops import Attention
from octavo.runtime.cuda.build import built_library
from octavo.runtime.cuda.kernels.attention import MIN_CHUNK, AttentionInputs, Partials, num_splits

_POINTERS = (
    *("q", "keys", "values", "out", "mixed", "sums", "arrived", "rows", "query_start_loc", "seq_lens", "tables"),
    "table_stride",
)
_INTS = ("num_heads", "num_kv_heads", "num_splits")
_FLOATS = ("scale", "v_scale", "softcap")


class _Decode(ctypes.Structure):
    """struct Decode of cpp/attention.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _INTS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_int) for name in ("window", "min_chunk", "first_table")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(built_library()))
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    library.octavo_decode_attention.argtypes = [ctypes.POINTER(_Decode), *[integer] * 5, pointer]
    library.octavo_layer_norm.argtypes = [*[pointer] * 6, real, *[integer] * 3, pointer]
    library.octavo_bias_gelu.argtypes = [*[pointer] * 3, *[integer] * 3, pointer]
    return library


def load() -> None:
    """Loads the library, and builds it first if need be. Raises ConfigError where that cannot be done."""
    _library()


def can_norm(width: int) -> bool:
    """Whether layer_norm() takes rows of this width: whole vectors, a row in shared memory."""
    return width % 8 == 0 and width <= 12288


def _check(name: str, code: int) -> None:
    if code:
        raise StepError(f"CUDA operator {name}: error {code}")


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def can_decode(node: Attention, block_size: int, kv_bytes: int) -> bool:
    """Whether decode attention of this shape has a kernel here."""
    sizes = (64, 128, 256) if kv_bytes == 2 else (128, 256)
    return (
        kv_bytes <= 2
        and block_size == 16
        and node.head_dim in sizes
        and node.num_heads <= 8 * node.num_kv_heads
    )  # fmt: skip


def decode_attention(
    inputs: AttentionInputs,
    node: Attention,
    group: int,
    q: torch.Tensor,  # bfloat16 [T, H * D]
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,  # bfloat16 [T, H * D]
    partials: Partials,
    *,
    kv_scales: tuple[float, float] = (1.0, 1.0),
    chained: bool = False,
    splits: int = 0,
    min_chunk: int = MIN_CHUNK,
) -> None:
    """kernels.attention.decode_attention in CUDA C++."""
    splits = splits or num_splits(inputs.num_decodes, node.num_kv_heads)
    torch.ops.octavo.decode_attention(
        q, keys, values, out, partials.mixed, partials.sums, partials.arrived, inputs.decode_rows,
        inputs.query_start_loc, inputs.seq_lens, inputs.tables, inputs.table_stride, inputs.num_decodes,
        group * inputs.num_requests, [node.num_heads, node.num_kv_heads, node.head_dim, splits, node.window, min_chunk],
        [node.scale * kv_scales[0] * math.log2(math.e), kv_scales[1], node.softcap], chained,
    )  # fmt: skip


@torch.library.custom_op("octavo::decode_attention", mutates_args=("out", "mixed", "sums", "arrived"))
def _decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    mixed: torch.Tensor,
    sums: torch.Tensor,
    arrived: torch.Tensor,
    rows: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tables: torch.Tensor,
    table_stride: torch.Tensor,
    num_decodes: int,
    first_table: int,
    shape: list[int],
    numbers: list[float],
    chained: bool,
) -> None:
    """`shape`: heads, KV heads, head size, splits, window, least positions of a part; `numbers`: see _FLOATS."""
    num_heads, num_kv_heads, head_dim, splits, window, min_chunk = shape
    tensors = (q, keys, values, out, mixed, sums, arrived, rows, query_start_loc, seq_lens, tables, table_stride)
    pointers = [t.data_ptr() for t in tensors]
    decode = _Decode(*pointers, num_heads, num_kv_heads, splits, *numbers, window, min_chunk, first_table)
    warps = 16 if splits > 1 else 4
    code = _library().octavo_decode_attention(
        ctypes.byref(decode), num_decodes, head_dim, keys.element_size(), warps, int(chained), _stream()
    )
    _check("decode_attention", code)


@torch.library.custom_op("octavo::layer_norm", mutates_args=("out", "residual_out"))
def layer_norm(
    x: torch.Tensor,  # bfloat16 [rows, width], width a multiple of 8
    residual: torch.Tensor | None,
    weight: torch.Tensor,  # float32 [width]
    bias: torch.Tensor | None,
    out: torch.Tensor,
    residual_out: torch.Tensor | None,
    eps: float,
    num_rows: int,
    with_gelu: bool,
) -> None:
    """out = LayerNorm(x + residual) * weight + bias, GELU of it if asked for; the sum is kept in `residual_out`."""
    optional = (_address(t) for t in (x, residual, weight, bias, out, residual_out))
    code = _library().octavo_layer_norm(*optional, eps, num_rows, x.shape[1], int(with_gelu), _stream())
    _check("layer_norm", code)


@torch.library.custom_op("octavo::bias_gelu", mutates_args=("out",))
def bias_gelu(
    product: torch.Tensor,  # bfloat16 [rows, width], width a multiple of 8
    bias: torch.Tensor,  # float32 [width]
    out: torch.Tensor,
    num_rows: int,
    by_tanh: bool,
) -> None:
    """out = GELU(product + bias), exact or by tanh."""
    pointers = (product.data_ptr(), bias.data_ptr(), out.data_ptr())
    code = _library().octavo_bias_gelu(*pointers, num_rows, product.shape[1], int(by_tanh), _stream())
    _check("bias_gelu", code)
