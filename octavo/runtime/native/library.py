"""Loads the shared library and mirrors native/abi.h: structs, signatures, error codes."""

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from octavo.errors import ConfigError, EngineError, MemoryPlanError, UnsupportedError

ABI_VERSION = 8
LIBRARY = "liboctavo.dylib" if sys.platform == "darwin" else "liboctavo.so"  # as build.py names it
REBUILD = "rebuild it with `python -m octavo.runtime.native.build`, or reinstall the package"
LEVELS = ("auto", "portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")

_OPS = ("Embedding", "Norm", "Add", "Linear", "RopeKVWrite", "Attention", "GatherRows", "Experts")
OP_CODES = {name: code for code, name in enumerate(_OPS)}
_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu_mul", "gelu_tanh_mul")
WORD_CODES = {word: code for words in (_ACTIVATIONS, ("rms", "layer")) for code, word in enumerate(words)}
DTYPES = ("float32", "bfloat16", "quantized", "int8")
KV_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}

_INVALID, _OUT_OF_MEMORY = 1, 2


class NativeError(EngineError):
    """The library refused what it was given: nothing was touched, and it goes on."""


class Node(ctypes.Structure):
    """OctavoNode."""

    _fields_ = [
        *((name, c_int32) for name in ("op", "x", "y", "out", "residual_out", "weight", "bias", "extra")),
        *((name, c_int32) for name in ("activation", "layer_norm", "kv_layer", "num_heads", "num_kv_heads")),
        *((name, c_int32) for name in ("head_dim", "window", "rope", "position_offset")),
        *((name, c_int32) for name in ("num_experts", "top_k", "renormalize", "shared")),
        *((name, c_float) for name in ("eps", "scale", "softcap")),
    ]


class BufferEntry(ctypes.Structure):
    """OctavoBuffer."""

    _fields_ = [("slot", c_int32), ("logits_rows", c_int32), ("width", c_int64)]


class RopeTable(ctypes.Structure):
    """OctavoRope."""

    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("max_positions", c_int64), ("half", c_int64)]


class KVLayerEntry(ctypes.Structure):
    """OctavoKVLayer."""

    _fields_ = [("num_kv_heads", c_int32), ("head_dim", c_int32), ("group", c_int32), ("place", c_int32)]


class ProgramTable(ctypes.Structure):
    """OctavoProgram."""

    _fields_ = [
        ("nodes", POINTER(Node)),
        ("buffers", POINTER(BufferEntry)),
        ("ropes", POINTER(RopeTable)),
        ("kv_layers", POINTER(KVLayerEntry)),
        *((name, c_int32) for name in ("num_nodes", "num_buffers", "num_ropes", "num_kv_layers", "num_kv_groups")),
        *((name, c_int32) for name in ("logits", "hidden", "max_num_tokens", "max_num_logits", "max_num_requests")),
    ]


STEP_ARRAYS = ("token_ids", "positions", "slots", "query_start_loc", "seq_lens", "block_tables", "logits_indices")
SAMPLING_ARRAYS = (
    *("temperature", "top_k", "top_p", "min_p", "seeds", "sample_positions", "num_logprobs"),
    *("bias_start", "bias_ids", "bias_values", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seen_start", "seen_ids", "seen_counts"),
)
OUTPUT_ARRAYS = ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")


class StepTable(ctypes.Structure):
    """OctavoStep."""

    _fields_ = [
        *((name, c_int64) for name in ("num_tokens", "num_requests", "num_logits", "num_states", "max_blocks")),
        ("max_logprobs", c_int64),
        *((name, c_void_p) for name in STEP_ARRAYS),
        *((name, c_void_p) for name in SAMPLING_ARRAYS),
        ("mask_of", c_void_p),
        ("masks", c_void_p),
        *((name, c_int64) for name in ("num_bias", "num_seen", "num_masks")),
        *((f"out_{name}", c_void_p) for name in OUTPUT_ARRAYS),
        ("out_times", c_void_p),
    ]


_SIGNATURES = {
    "octavo_level": (c_char_p, [c_char_p]),
    "octavo_error": (c_char_p, []),
    "octavo_create": (c_int32, [c_int32, c_char_p, POINTER(c_void_p)]),
    "octavo_destroy": (None, [c_void_p]),
    "octavo_add_weight": (c_int32, [c_void_p, c_int64, c_int64]),
    "octavo_add_packed": (c_int32, [c_void_p, c_int64]),
    "octavo_add_part": (c_int32, [c_void_p, c_int32, c_int64, c_char_p]),
    "octavo_part_bytes": (c_int64, [c_char_p, c_int64, c_int64]),
    "octavo_pack": (c_int32, [c_void_p, c_int32, c_int64, c_int64, c_char_p, c_void_p, c_int64]),
    "octavo_row_bytes": (c_int64, [c_char_p, c_int64]),
    "octavo_set_program": (c_int32, [c_void_p, POINTER(ProgramTable)]),
    "octavo_kv_bytes": (c_int64, [c_int32, c_int64, c_int64]),
    "octavo_allocate_kv": (c_int32, [c_void_p, c_int64, c_int64, c_int32]),
    "octavo_copy_blocks": (c_int32, [c_void_p, c_void_p, c_int64]),
    "octavo_step": (c_int32, [c_void_p, POINTER(StepTable)]),
    "octavo_probe": (c_int32, [c_void_p, POINTER(c_double)]),
    "octavo_logits": (c_void_p, [c_void_p]),
    "octavo_states": (c_void_p, [c_void_p]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions declared.

    Raises:
        ConfigError: it is missing, cannot be loaded, or was built from other sources than this package.
    """
    if not path.exists():
        raise ConfigError(f"the native library {path} is missing: {REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(f"the native library cannot be loaded ({error}): {REBUILD}") from None
    version = library.octavo_abi_version() if hasattr(library, "octavo_abi_version") else None
    if version != ABI_VERSION:
        raise ConfigError(f"the native library {path} has ABI {version}, this package needs {ABI_VERSION}: {REBUILD}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def load_library() -> ctypes.CDLL:
    """The package's own library, loaded once."""
    return open_library(Path(__file__).with_name(LIBRARY))


def resolve_level(level: str) -> str:
    """The instruction level that `level` means on this machine.

    Raises:
        UnsupportedError: an unknown one, or one that this machine lacks.
    """
    if level not in LEVELS:
        raise UnsupportedError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    name: bytes | None = load_library().octavo_level(level.encode())
    if name is None:
        raise UnsupportedError(f"this processor (or this build) has no level {level!r}; use 'auto'")
    return name.decode()


def check(library: ctypes.CDLL, code: int) -> None:
    """Raises what an error code means."""
    if not code:
        return
    message = library.octavo_error().decode(errors="replace")
    if code == _OUT_OF_MEMORY:
        raise MemoryPlanError(f"{message}; lower max_model_len, max_num_seqs or the KV memory")
    if code == _INVALID:
        raise NativeError(message)
    raise EngineError(f"native runtime: {message}")
