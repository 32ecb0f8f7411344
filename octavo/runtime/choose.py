"""Which runtime and which number type run a model: decided once at load, before packing, with the reason."""

from __future__ import annotations

from octavo.errors import UnsupportedError
from octavo.runtime.base import Choice, Runtime

NATIVE_DTYPES = ("float32", "bfloat16")


def choose(runtime: str, dtype: str, stored_dtype: str) -> tuple[Choice, str]:
    """Resolves `--runtime` and `--dtype` ("auto" included) against what the checkpoint stores.

    `auto` takes the checkpoint's own type where the runtime has native kernels for it, else float32.
    Raises UnsupportedError for a type that the runtime cannot compute in.
    """
    name, reason = (runtime, "asked for") if runtime != "auto" else ("native", "a CPU")
    allowed = NATIVE_DTYPES if name == "native" else ("float32", "bfloat16")
    if dtype == "auto":
        resolved = stored_dtype if stored_dtype in allowed else "float32"
    elif dtype in allowed:
        resolved = dtype
    else:
        raise UnsupportedError(f"--dtype {dtype}: the {name} runtime computes in {' or '.join(allowed)}; take one")
    return Choice(name, reason), resolved


def create(choice: Choice, num_threads: int) -> Runtime:
    """Makes the chosen runtime; compiled code is loaded here and nowhere earlier."""
    if choice.runtime == "reference":
        from octavo.runtime.reference import ReferenceRuntime

        return ReferenceRuntime()
    from octavo.runtime.native import NativeRuntime

    return NativeRuntime(num_threads)
