"""Which runtime and which number type run a model: decided once at load, before packing, with the reason."""

from __future__ import annotations

from octavo.errors import ConfigError, UnsupportedError
from octavo.runtime.base import Choice, Runtime
from octavo.runtime.cuda import missing

DTYPES = ("float32", "bfloat16")


def choose(runtime: str, dtype: str, stored_dtype: str) -> tuple[Choice, str]:
    """Resolves `--runtime` and `--dtype` ("auto" included) against what the checkpoint stores.

    The runtime `auto` is cuda where it can run, else native. The dtype `auto` is the checkpoint's own where the runtime
    computes in it; else float32 on a CPU and bfloat16 on a GPU, whose float32 is slow.

    Raises:
        UnsupportedError: a type that the runtime cannot compute in.
        ConfigError: `--runtime cuda` where it cannot run; says why.
    """
    choice = _choose_runtime(runtime)
    if dtype == "auto":
        fallback = "bfloat16" if choice.runtime == "cuda" else "float32"
        return choice, stored_dtype if stored_dtype in DTYPES else fallback
    if dtype not in DTYPES:
        raise UnsupportedError(f"--dtype {dtype}: the {choice.runtime} runtime computes in {' or '.join(DTYPES)}")
    return choice, dtype


def _choose_runtime(runtime: str) -> Choice:
    if runtime == "auto":
        return Choice("native", "a CPU") if missing() else Choice("cuda", "a GPU")
    if runtime == "cuda" and (problem := missing()):
        raise ConfigError(f"--runtime cuda: {problem}")
    return Choice(runtime, "asked for")


def create(choice: Choice, num_threads: int, dtype: str, *, enforce_eager: bool = False) -> Runtime:
    """Makes the chosen runtime; compiled code is loaded here and nowhere earlier."""
    if choice.runtime == "reference":
        from octavo.runtime.reference import ReferenceRuntime

        return ReferenceRuntime()
    if choice.runtime == "cuda":
        from octavo.runtime.cuda import CudaRuntime

        return CudaRuntime(dtype, use_graphs=not enforce_eager)
    from octavo.runtime.native import NativeRuntime

    return NativeRuntime(num_threads)
