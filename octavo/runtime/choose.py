"""Which runtime and which number type run a model: decided once at load, before packing, with the reason."""

from collections.abc import Collection

from octavo.config import FUSIONS
from octavo.errors import ConfigError, UnsupportedError
from octavo.runtime.base import Runtime
from octavo.runtime.cuda import missing

# What each runtime computes in; what it has fast kernels for; what `--dtype auto` takes for everything else.
DTYPES = {
    "native": ("float32", "bfloat16", "float16", "quantized"),
    "reference": ("float32", "bfloat16", "float16", "quantized"),
    "cuda": ("float32", "bfloat16"),
}
FAST = {
    "native": ("float32", "bfloat16", "quantized"),
    "reference": ("float32", "bfloat16"),
    "cuda": ("float32", "bfloat16"),
}
QUANTIZATIONS = {"native": ("int8",), "reference": ("int8",), "cuda": ()}  # what weights are rounded to at load
FALLBACK = {"native": "float32", "reference": "float32", "cuda": "bfloat16"}


def choose(
    runtime: str, dtype: str, stored_dtype: str, quantization: str | None = None, *, builds: bool = False
) -> tuple[str, str]:
    """Resolves `--runtime` and `--dtype` ("auto" included) against what the checkpoint stores.

    The runtime `auto` is cuda where it can run, else native. The dtype `auto` is the checkpoint's own where the runtime
    has kernels for it; else float32 on a CPU and bfloat16 on a GPU, whose float32 is slow. `builds`: C++ kernels for a
    card begin to be built, if there is one.

    Raises:
        UnsupportedError: a type that the runtime cannot compute in, or a quantisation that it does not have.
        ConfigError: `--runtime cuda` where it cannot run; says why.
    """
    name = _choose_runtime(runtime, builds)
    if quantization is not None and quantization not in QUANTIZATIONS[name]:
        raise UnsupportedError(
            f"--quantization {quantization}: the {name} runtime computes in {', '.join(DTYPES[name])} and does not "
            "quantise at load; leave it out, or take --runtime native"
        )
    if dtype == "auto":
        return name, stored_dtype if stored_dtype in FAST[name] else FALLBACK[name]
    if dtype not in DTYPES[name]:
        raise UnsupportedError(f"--dtype {dtype}: the {name} runtime computes in {', '.join(DTYPES[name])}; take one")
    return name, dtype


def choose_weights(asked: str, dtype: str, quantization: str | None) -> tuple[str, ...]:
    """How matrices may be kept and computed, the best first: the first that fits in memory is taken.

    `asked` is `--dtype`, `dtype` what choose() made of it. Where nobody asks for anything, the blocks of a GGUF file
    are rounded to int8 on a CPU: faster on every machine measured, within 1 % of the perplexity (docs/numerics.md).
    """
    if quantization is not None:
        return (quantization,)
    if asked == "auto" and dtype == "quantized":
        return "int8", dtype
    return ("float32" if dtype == "float16" else dtype,)  # no runtime here has float16 kernels


def choose_kv(kv_cache_dtype: str, dtype: str) -> str:
    """Resolves `--kv-cache-dtype`: "auto" keeps what the weights are computed in."""
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    return "float32" if dtype in ("float32", "float16") else "bfloat16"


def _choose_runtime(runtime: str, builds: bool) -> str:
    if runtime == "auto":
        return "native" if missing(builds=builds) else "cuda"
    if runtime == "cuda" and (problem := missing(builds=builds)):
        raise ConfigError(f"--runtime cuda: {problem}")
    return runtime


def create(
    name: str,
    num_threads: int,
    dtype: str,
    *,
    enforce_eager: bool = False,
    fusions: Collection[str] = FUSIONS,
    attention_backend: str = "auto",
    cuda_ops: str = "triton",
) -> Runtime:
    """Makes the chosen runtime; compiled code is loaded here and nowhere earlier."""
    if name == "reference":
        from octavo.runtime.reference import ReferenceRuntime

        return ReferenceRuntime()
    if name == "cuda":
        from octavo.runtime.cuda.runtime import CudaRuntime

        return CudaRuntime(
            dtype, use_graphs=not enforce_eager, fusions=fusions, attention_backend=attention_backend, cuda_ops=cuda_ops
        )
    from octavo.runtime.native import NativeRuntime

    return NativeRuntime(num_threads)
