"""The engine's settings: resolved once, then frozen. Flags, fields and defaults follow vLLM's names.

`EngineConfig` is what a caller asks for; nothing here touches a file or a model. What is not built is refused here,
by name.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_origin, get_type_hints

from octavo import cgroup
from octavo.errors import ConfigError, UnsupportedError

DEFAULT_MODEL = "smollm2"
BLOCK_SIZE = 16
DEFAULT_QUEUE = 1024  # requests that may wait behind a server
PROMPT_ROWS = 64  # prompt positions of a step that something is told of
ON_CPU, ON_GPU = (64, 512), (256, 8192)  # max_num_seqs and max_num_batched_tokens where they are not given
FUSIONS = ("norm", "residual", "activation", "rope", "qkv", "attention", "pdl")  # what each is: docs/kernels.md
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # one of them is there where a card is; the second is WSL's

DTypeName = Literal["auto", "float32", "bfloat16", "quantized", "float16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
CudaOps = Literal["triton", "cuda"]
AttentionBackend = Literal["auto", "triton", "cuda"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "int8", "fp8"]
SchedulingPolicy = Literal["fcfs", "priority", "fair", "slo"]
EvictionPolicy = Literal["lru", "lfu"]
RuntimeName = Literal["auto", "native", "cuda", "reference"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine.

    Raises:
        ConfigError: a value of the wrong type or out of its bounds.
        UnsupportedError: a known setting that is not built.
    """

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None  # folder, tokenizer.json or .gguf; default: the model's own
    skip_tokenizer_init: bool = False  # token ids in and out
    served_model_name: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    load_format: LoadFormat = "auto"
    dtype: DTypeName = "auto"  # int8 for GGUF blocks on a CPU (choose_weights), else as stored where there are kernels
    quantization: str | None = None  # "int8": matrices and activations they meet; None: as `dtype` says
    seed: int = 0
    runtime: RuntimeName = "auto"
    num_threads: int | None = None  # of the native runtime; default: the cores this process may use

    max_model_len: int | None = None  # default: the model's own, cut to what fits
    max_num_seqs: int = 0  # 0: as ON_CPU or ON_GPU says
    max_num_batched_tokens: int = 0
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # 0: no cap on one request's share of a step
    enable_prefix_caching: bool = True
    enable_copy_on_write: bool = True  # n answers fork one prefill; off, each is a request that may hit the cache
    prefix_eviction_policy: EvictionPolicy = "lru"  # which cached prefix goes first
    disable_hybrid_kv_cache_manager: bool = False  # windows then keep what they no longer see
    prefix_caching_hash_key: str | None = None  # default: random per engine
    admission_headroom: float = 1.0  # blocks per running request that an admission leaves free
    scheduling_policy: SchedulingPolicy = "fcfs"
    priority_ageing: float = 10.0  # seconds of waiting that count as one step of priority
    slo_ttft_ms: int = 1000  # what policy slo aims at: a first token, and the gaps between later ones
    slo_itl_ms: int = 100
    max_num_queued_reqs: int | None = None  # default: DEFAULT_QUEUE behind a server, 0 (no bound) offline
    max_num_queued_tokens: int = 0  # prompt tokens; 0: no bound
    async_scheduling: bool = True  # read on a GPU only: a step is launched while the one before it runs

    record: str = "auto"  # auto: behind a server, in the cache folder; off; or a folder
    record_bytes: int = 64 << 20

    block_size: int = BLOCK_SIZE
    kv_cache_dtype: KVCacheDType = "auto"  # auto: float32 beside float32 weights, else bfloat16
    kv_cache_memory_bytes: int | None = None
    swap_space: float = 0.0  # GiB of host memory for the KV that the pool gives up
    num_gpu_blocks_override: int | None = None  # blocks of the pool, whatever the device (vLLM's name)
    gpu_memory_utilization: float = 0.9  # read on a GPU only

    max_logprobs: int = 20
    enforce_eager: bool = False  # read on a GPU only: no graphs
    fuse_ops: bool = True  # read on a GPU only, as the next: kernels that do their neighbours' work, or overlap them
    disable_fusions: str = ""  # these of FUSIONS, with commas between
    attention_backend: AttentionBackend = "auto"  # read on a GPU only; auto: the faster one for each shape
    cuda_ops: CudaOps = "triton"  # read on a GPU only: norms and activations
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            if get_origin(_HINTS[f.name]) is Literal:
                one_of(f.name, getattr(self, f.name), get_args(_HINTS[f.name]))
            else:
                _of_type(f.name, getattr(self, f.name), str(f.type))
        num_seqs, num_tokens = ON_GPU if _has_gpu(self.runtime) else ON_CPU
        num_tokens = self.max_num_batched_tokens or num_tokens
        object.__setattr__(self, "max_num_batched_tokens", num_tokens)  # once, before anybody sees it
        object.__setattr__(self, "max_num_seqs", self.max_num_seqs or min(num_seqs, num_tokens))
        _range("max_model_len", self.max_model_len, 1, 1 << 24)
        _range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)
        _range("max_num_seqs", self.max_num_seqs, 1, 4096)
        _range("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, 1 << 20)
        _range("block_size", self.block_size, 1, 256)
        _range("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 1 << 50)
        _range("swap_space", self.swap_space, 0.0, 65536.0, " GiB")
        if self.swap_space and not self.enable_prefix_caching:
            raise ConfigError(
                "swap_space needs enable_prefix_caching: KV in host memory is found by the hash of its prefix"
            )
        _range("num_gpu_blocks_override", self.num_gpu_blocks_override, 1, 1 << 31)
        _range("max_logprobs", self.max_logprobs, 0, 20)
        _range("num_threads", self.num_threads, 1, 1024)
        _range("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        _range("admission_headroom", self.admission_headroom, 0.0, 1000.0, " blocks")
        _range("record_bytes", self.record_bytes, 1 << 16, 1 << 40)
        if not self.record:
            raise ConfigError("record must be auto, off or a folder")
        _range("slo_ttft_ms", self.slo_ttft_ms, 1, 3_600_000)
        _range("slo_itl_ms", self.slo_itl_ms, 1, 3_600_000)
        _range("max_num_queued_reqs", self.max_num_queued_reqs, 0, 1 << 20)
        _range("max_num_queued_tokens", self.max_num_queued_tokens, 0, 1 << 40)
        _range("priority_ageing", self.priority_ageing, 0.001, 1e6, " seconds")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request needs one token a step"
            )
        for name in filter(None, self.disable_fusions.split(",")):
            one_of("disable_fusions", name, FUSIONS)
        self._refuse_unbuilt()

    def _refuse_unbuilt(self) -> None:
        if self.quantization not in (None, "int8"):
            raise UnsupportedError(f"quantization={self.quantization!r} is not built; int8 is, or leave it out")
        only = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "trust_remote_code": False}
        for name, built in {**only, "enable_chunked_prefill": True}.items():
            if (asked := getattr(self, name)) != built:
                raise UnsupportedError(f"{name}={asked!r} is not built; leave it at its default")

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Builds a config from keyword arguments; an unknown one is refused by name."""
        known = {f.name for f in fields(cls)}
        for name in kwargs:
            if name not in known:
                raise UnsupportedError(f"unknown engine argument {name!r}; known: {', '.join(sorted(known))}")
        return cls(**kwargs)

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of one request in a step."""
        return min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)

    @property
    def fusions(self) -> frozenset[str]:
        """Those of FUSIONS that are on."""
        return frozenset(FUSIONS if self.fuse_ops else ()).difference(self.disable_fusions.split(","))

    def threads(self) -> int:
        """Threads for the native runtime: what was asked, else the cores this process may use and its cgroup pays."""
        if self.num_threads:
            return self.num_threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, cgroup.whole_cpus() or cores)


def _has_gpu(runtime: str) -> bool:
    """Whether `runtime` will be a GPU's, told without torch, whose import takes seconds."""
    is_there = runtime == "auto" and any(map(os.path.exists, GPU_FILES)) and not cgroup.hides_gpus()
    return runtime == "cuda" or (is_there and all(map(find_spec, ("torch", "triton"))))


_HINTS = get_type_hints(EngineConfig)
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "True or False"),
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "str": (str, "a string"),
}


def _of_type(name: str, value: object, declared: str) -> None:
    """Holds a value against its field's annotation ("int | None")."""
    kind, _, optional = declared.partition(" | ")
    if kind not in _KINDS or (optional and value is None):
        return
    types, words = _KINDS[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{name} must be {words}, not {value!r:.60}")


def one_of(name: str, value: str | None, allowed: Collection[str | None]) -> None:
    """Raises ConfigError for a value that a setting cannot have."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(filter(None, allowed))}, not {value!r}")


def _range(name: str, value: float | None, low: float, high: float, unit: str = "") -> None:
    if value is not None and not low <= value <= high:
        kind = "an integer" if isinstance(low, int) else "a number"
        raise ConfigError(f"{name} must be {kind} from {low} to {high}{unit}, not {value!r}")
