"""Which runtime and which number type run a model: decided once at load, before packing, with the reason."""

from __future__ import annotations

from octavo.errors import UnsupportedError
from octavo.runtime.base import Choice, Runtime

DTYPES = ("float32", "bfloat16", "quantized")


def choose(runtime: str, dtype: str, stored_dtype: str) -> tuple[Choice, str]:
    """Resolves `--runtime` and `--dtype` ("auto" included) against what the checkpoint stores.

    `auto` takes the checkpoint's own type where the runtime has kernels for it, else float32.
    Raises UnsupportedError for a type that the runtime cannot compute in.
    """
    name, reason = (runtime, "asked for") if runtime != "auto" else ("native", "a CPU")
    if dtype == "auto":
        fast = DTYPES if name == "native" else ("float32", "bfloat16")
        resolved = stored_dtype if stored_dtype in fast else "float32"
    elif dtype in DTYPES:
        resolved = dtype
    else:
        raise UnsupportedError(f"--dtype {dtype}: the {name} runtime computes in {', '.join(DTYPES)}; take one")
    return Choice(name, reason), resolved


def choose_kv(kv_cache_dtype: str, dtype: str) -> str:
    """Resolves `--kv-cache-dtype`: "auto" keeps what the weights are computed in."""
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    return "float32" if dtype == "float32" else "bfloat16"


def create(choice: Choice, num_threads: int) -> Runtime:
    """Makes the chosen runtime; compiled code is loaded here and nowhere earlier."""
    if choice.runtime == "reference":
        from octavo.runtime.reference import ReferenceRuntime

        return ReferenceRuntime()
    from octavo.runtime.native import NativeRuntime

    return NativeRuntime(num_threads)
