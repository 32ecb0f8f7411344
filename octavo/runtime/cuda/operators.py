"""The CUDA C++ operators as torch custom ops (`torch.ops.octavo.*`), and where they take the place of Triton kernels.

`--attention-backend` selects decode attention (head sizes 64, 128, 256, up to 8 query heads a KV head, blocks of 16,
bfloat16 or fp8 KV) and, on Hopper, prefill attention (head sizes 64 and 128, bfloat16 KV, no window or soft-cap);
`--cuda-ops cuda` LayerNorm with residual, and bias + GELU. LayerNorm + GELU in one pass is here for the study: no
decoder computes GELU(LN(x)). On Hopper, wherever the library is there, products of many rows do what follows them
(`Product`, unless `--no-fuse-ops`), and those of some rows stream their weights.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from octavo.errors import StepError
from octavo.program.ops import Attention, Linear, RopeKVWrite
from octavo.runtime.cuda import build
from octavo.runtime.cuda.kernels.attention import MIN_CHUNK, AttentionInputs, Partials, num_splits
from octavo.runtime.cuda.kernels.rows import ACTIVATION_CODES

_POINTERS = (
    *("q", "keys", "values", "out", "mixed", "sums", "arrived", "rows", "query_start_loc", "seq_lens", "tables"),
    "table_stride",
)
_TURN_POINTERS = ("positions", "slots", "cosines", "sines", "q_norm", "k_norm")
_PREFILL_POINTERS = (
    *("q", "keys", "values", "out", "tile_rows", "tile_starts", "query_start_loc", "seq_lens", "tables"),
    *("table_stride", "progress"),
)
_INTS = ("num_heads", "num_kv_heads", "num_splits")
_FLOATS = ("scale", "v_scale", "softcap", "eps")


class _Decode(ctypes.Structure):
    """struct Decode of cpp/attention.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_TURN_POINTERS)),
        *((name, ctypes.c_int) for name in _INTS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_int) for name in ("window", "min_chunk", "first_table")),
    ]


class _Prefill(ctypes.Structure):
    """struct Prefill of cpp/prefill.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _PREFILL_POINTERS),
        ("num_blocks", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("num_tokens", "num_tiles", "num_heads", "num_kv_heads", "first_table")),
        ("scale", ctypes.c_float),
    ]


class _Product(ctypes.Structure):
    """struct Product of cpp/product.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "q_norm", "k_norm", "keys", "values")),
        *((name, ctypes.c_int) for name in ("rows", "depth", "width", "activation")),
        *((name, ctypes.c_int) for name in ("num_heads", "num_kv_heads", "kv_bytes")),
        ("eps", ctypes.c_float),
    ]


_OPERATORS = torch.library.Library("octavo", "DEF")  # type: ignore[no-untyped-call]
_Function = TypeVar("_Function", bound=Callable[..., None])
_LOADING = threading.Lock()  # two threads may ask for it at start


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.begin().result()))
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    library.octavo_decode_attention.argtypes = [ctypes.POINTER(_Decode), *[integer] * 5, pointer]
    library.octavo_prefill_attention.argtypes = [ctypes.POINTER(_Prefill), integer, pointer]
    library.octavo_product.argtypes = [ctypes.POINTER(_Product), integer, integer, pointer]
    library.octavo_streamed_product.argtypes = [ctypes.POINTER(_Product), *[integer] * 3, pointer]
    library.octavo_multiply.argtypes = [*[pointer] * 3, *[integer] * 4, pointer]
    library.octavo_layer_norm.argtypes = [*[pointer] * 6, real, *[integer] * 3, pointer]
    library.octavo_bias_gelu.argtypes = [*[pointer] * 3, *[integer] * 3, pointer]
    return library


def load() -> None:
    """Loads the library, and builds it first if need be. Raises ConfigError where that cannot be done."""
    with _LOADING:
        _library()


def _operator(*written: str, tensors: tuple[str, ...] = (), others: str = "") -> Callable[[_Function], _Function]:
    """Makes a function torch.ops.octavo.NAME that writes the arguments of these names; they are its own, or as said.

    torch.library.custom_op() would do so, too, but imports a compiler at the first call, which takes seconds.
    """

    def register(function: _Function) -> _Function:
        name = function.__name__.lstrip("_")
        plain = "Tensor"
        kinds = {tensor: f"Tensor({chr(97 + i)}!)" for i, tensor in enumerate(written)}
        kinds |= dict.fromkeys(_TURN_POINTERS, "Tensor?")
        schema = f"({', '.join(f'{kinds.get(t, plain)} {t}' for t in tensors)}, {others}) -> ()"
        if not tensors:
            schema = torch.library.infer_schema(function, mutates_args=written)
        _OPERATORS.define(name + schema)  # type: ignore[no-untyped-call]
        _OPERATORS.impl(name, function, "CUDA")  # type: ignore[no-untyped-call]
        return function

    return register


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


FEW_PROGRAMS = 512  # of decode attention: up to here this one is faster than Triton's, above with 8-bit KV alone


def can_decode(node: Attention, block_size: int, kv_bytes: int) -> bool:
    """Whether decode attention of this shape has a kernel here."""
    sizes = (64, 128, 256) if kv_bytes == 2 else (128, 256)
    return (
        kv_bytes <= 2
        and block_size == 16
        and node.head_dim in sizes
        and node.num_heads <= 8 * node.num_kv_heads
    )  # fmt: skip


def decode_warps(num_programs: int) -> int:
    """Warps of a program of decode_attention(): the fewer programs share the card, the more."""
    return 16 if num_programs <= 256 else 8 if num_programs <= FEW_PROGRAMS else 4


@dataclass(frozen=True, slots=True)
class Turn:
    """What decode_attention() does to the heads of a step's only token: norms and rotates them, writes k and v.

    `q` is then the product of q, k and v, bfloat16 [1, (H + 2 G) * D], as rope.rope_kv_write() would take it.
    """

    positions: torch.Tensor  # int32 [1]
    slots: torch.Tensor  # int32 [1]
    table: tuple[torch.Tensor, torch.Tensor]  # cos and sin, float32 [max positions, D / 2]
    norms: tuple[torch.Tensor, torch.Tensor] | None  # of q and k, float32 [D]
    eps: float


def decode_attention(
    inputs: AttentionInputs,
    node: Attention,
    group: int,
    q: torch.Tensor,  # bfloat16 [T, H * D]
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,  # bfloat16 [T, H * D]
    partials: Partials, *,
    kv_scales: tuple[float, float] = (1.0, 1.0), chained: bool = False, splits: int = 0, min_chunk: int = MIN_CHUNK,
    turn: Turn | None = None,
) -> None:  # fmt: skip
    """kernels.attention.decode_attention in CUDA C++; no head size above 128 with a `turn`."""
    splits = splits or num_splits(inputs.num_decodes, node.num_kv_heads)
    turned: tuple[torch.Tensor | None, ...] = (None,) * len(_TURN_POINTERS)
    if turn is not None:
        turned = (turn.positions, turn.slots, *turn.table, *(turn.norms or (None, None)))
    torch.ops.octavo.decode_attention(
        q, keys, values, out, partials.mixed, partials.sums, partials.arrived, inputs.decode_rows,
        inputs.query_start_loc, inputs.seq_lens, inputs.tables, inputs.table_stride, *turned, inputs.num_decodes,
        group * inputs.num_requests, [node.num_heads, node.num_kv_heads, node.head_dim, splits, node.window, min_chunk],
        [node.scale * kv_scales[0] * math.log2(math.e), kv_scales[1], node.softcap, turn.eps if turn else 0.0], chained,
    )  # fmt: skip


@_operator(
    *("keys", "values", "out", "mixed", "sums", "arrived"), tensors=(*_POINTERS, *_TURN_POINTERS),
    others="int num_decodes, int first_table, int[] shape, float[] numbers, bool chained",
)  # fmt: skip
def _decode_attention(*arguments: Any) -> None:
    """`shape`: heads, KV heads, head size, splits, window, least positions of a part; `numbers`: see _FLOATS."""
    tensors, (num_decodes, first_table, shape, numbers, chained) = arguments[:-5], arguments[-5:]
    num_heads, num_kv_heads, head_dim, splits, window, min_chunk = shape
    pointers = map(_address, tensors)
    decode = _Decode(*pointers, num_heads, num_kv_heads, splits, *numbers, window, min_chunk, first_table)
    warps = decode_warps(num_decodes * num_kv_heads * splits)
    code = _library().octavo_decode_attention(
        ctypes.byref(decode), num_decodes, head_dim, tensors[1].element_size(), warps, int(chained), _stream()
    )
    _check("decode_attention", code)


PREFILL_ROWS = 128  # queries x query heads of a KV head that a program of prefill_attention takes


def can_prefill(node: Attention, block_size: int, kv_bytes: int) -> bool:
    """Whether prefill attention of this shape has a kernel here: for Hopper, whose instructions it is written in."""
    return (
        kv_bytes == 2
        and block_size == 16
        and node.head_dim in (64, 128)
        and node.num_heads <= PREFILL_ROWS * node.num_kv_heads
        and not node.window
        and not node.softcap
        and torch.cuda.get_device_capability() == (9, 0)
    )


def prefill_attention(
    inputs: AttentionInputs,  # its tiles hold PREFILL_ROWS // query heads of a KV head queries
    node: Attention,
    group: int,
    q: torch.Tensor,  # bfloat16 [T, H * D]
    keys: torch.Tensor,  # bfloat16
    values: torch.Tensor,
    out: torch.Tensor,  # bfloat16 [T, H * D]
) -> None:
    """kernels.attention.prefill_attention in CUDA C++."""
    torch.ops.octavo.prefill_attention(
        q, keys, values, out, inputs.tile_rows, inputs.tile_starts, inputs.query_start_loc, inputs.seq_lens,
        inputs.tables, inputs.table_stride, _progress(q.device), inputs.num_tiles, group * inputs.num_requests,
        [node.num_heads, node.num_kv_heads, node.head_dim], node.scale * math.log2(math.e),
    )  # fmt: skip


@functools.cache
def _progress(device: torch.device) -> torch.Tensor:
    """What programs of prefill_attention share; they leave it zero. One launch at a time."""
    with torch.inference_mode(mode=False):
        return torch.zeros(2, dtype=torch.int32, device=device)


@_operator(
    *("out", "progress"), tensors=_PREFILL_POINTERS, others="int num_tiles, int first_table, int[] shape, float scale"
)
def _prefill_attention(*arguments: Any) -> None:
    """`shape`: heads, KV heads, head size."""
    tensors, (num_tiles, first_table, shape, scale) = arguments[:-4], arguments[-4:]
    sizes = (tensors[1].shape[0], tensors[0].shape[0], num_tiles, *shape[:2], first_table)
    prefill, head_dim = _Prefill(*(t.data_ptr() for t in tensors), *sizes, scale), shape[2]
    code = _library().octavo_prefill_attention(ctypes.byref(prefill), head_dim, _stream())
    _check("prefill_attention", code)


def can_multiply(node: Linear) -> bool:
    """Whether a product has kernels here, of some rows and, if it is gated or heads follow, of many: Hopper's, whole
    vectors."""
    num_out, num_in = node.weight.shape
    return (
        node.activation in ("none", "silu_mul", "gelu_tanh_mul")
        and num_in % 8 == num_out % 16 == 0
        and not node.softcap
        and node.scale == 1.0
        and torch.cuda.get_device_capability() == (9, 0)
    )


@functools.cache
def streamed_tile(num_out: int, depth: int) -> tuple[int, int]:
    """Weights of a program of a streamed product, and into how many parts its depth is cut: all begin at once."""
    most = _num_multiprocessors()
    if num_out > 128 * most:
        return 128, 2
    tiles, steps, splits = -(-num_out // 64), -(-depth // 64), 1
    while splits < 4 and (tiles * splits < most // 3 or (2 * tiles * splits <= most and steps >= 64 * splits)):
        splits *= 2
    return 64, splits


def fills(num_rows: int, num_out: int) -> bool:
    """Whether the tiles of a product, 256 x 256 for two multiprocessors, leave few of them idle in the last round.

    Where they do, cuBLAS's smaller tiles gain more than a kernel less.
    """
    pairs = _num_multiprocessors() // 2
    rounds = -(-(-(-num_rows // 256) * -(-num_out // 256)) // pairs)
    return rounds * pairs * 256 * 256 < 1.15 * num_rows * num_out


@functools.cache
def _num_multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count


class Product:
    """out = x @ weight.T + bias and what follows, for many rows, in bfloat16. What does not change is laid out once.

    A gated product halves its width. With `heads`, q is normed and rotated into `out` [rows, H * D], k into the cache,
    as v is: what rope.rope_kv_write() does with the product.
    """

    def __init__(
        self,
        node: Linear,
        x: torch.Tensor,  # [>= rows, in]
        weight: torch.Tensor,  # [out or 2 * out, in]
        bias: torch.Tensor | None,  # float32
        out: torch.Tensor,
        *,
        heads: RopeKVWrite | None = None,
        table: tuple[torch.Tensor, torch.Tensor] | None = None,  # cos and sin, float32 [max positions, D / 2]
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,  # of q and k, float32 [D]
        chained: bool = False,
    ) -> None:
        self._tensors = (x, weight, bias, out, *(table or ()), *(norms or ()))  # alive as long as their addresses
        x_at, weight_at, bias_at, out_at = map(_address, self._tensors[:4])
        self._arguments = _Product(
            x=x_at, weight=weight_at, bias=bias_at, out=out_at, depth=weight.shape[1],
            width=weight.shape[0] // (1 if node.activation == "none" else 2),
            activation=ACTIVATION_CODES[node.activation],
        )  # fmt: skip
        self._kind, self._chained = heads.head_dim if heads else 1, int(chained)
        if heads and table:
            self._arguments.cosines, self._arguments.sines = map(_address, table)
            self._arguments.q_norm, self._arguments.k_norm = map(_address, norms or (None, None))
            self._arguments.num_heads, self._arguments.num_kv_heads = heads.num_heads, heads.num_kv_heads
            self._arguments.eps = heads.eps

    def place(self, positions: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Where tokens are: their positions, and slots (int32 [rows]) of a bfloat16 or fp8 cache in blocks of 16."""
        arguments = self._arguments
        arguments.positions, arguments.slots = positions.data_ptr(), slots.data_ptr()
        arguments.keys, arguments.values, arguments.kv_bytes = keys.data_ptr(), values.data_ptr(), keys.element_size()

    def launch(self, num_rows: int) -> None:
        """Of heads after place(). Raises StepError: the card refused it."""
        self._arguments.rows = num_rows
        code = _library().octavo_product(ctypes.byref(self._arguments), self._kind, self._chained, _stream())
        _check("product", code)

    def stream(self, num_rows: int) -> None:
        """The same for up to 128 rows, heads left alone. Raises StepError: the card refused it."""
        arguments = self._arguments
        arguments.rows = num_rows
        tile = streamed_tile(self._tensors[1].shape[0], arguments.depth)
        code = _library().octavo_streamed_product(ctypes.byref(arguments), *tile, self._chained, _stream())
        _check("streamed product", code)


def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, measures: bool = False) -> bool:
    """out = x @ weight.T in bfloat16, by the fastest of cuBLAS's kernels. False where this size was not measured.

    `measures`: does so now, which waits for the device.
    """
    pointers = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    return not _library().octavo_multiply(*pointers, len(x), *weight.shape, int(measures), _stream())


@_operator("out", "residual_out")
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


@_operator("out")
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
