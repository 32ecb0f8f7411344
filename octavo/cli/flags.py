"""The engine's flags, derived from `EngineConfig`: one row of help per field, so flags and fields cannot drift.

    @engine_flags()
    def serve(config: EngineConfig, port: int = 8000) -> None: ...

gives `serve` the argument MODEL and a flag for every other field. Flags have vLLM's names.
"""

import functools
import inspect
import logging
import re
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import typer

from octavo.cli.sizes import parse_size
from octavo.config import DEFAULT_MODEL, DEFAULT_QUEUE, FUSIONS, EngineConfig, one_of
from octavo.errors import OctavoError

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Flag:
    """What the type of a field does not say."""

    panel: Literal["Model", "Memory", "Scheduler", "Execution"]
    help: str
    metavar: str | None = None
    short: str | None = None
    is_size: bool = False  # accepts 400MiB, 8k


_LATER = "Not built: refused unless left at its default."

_MODEL_HELP = "Alias (see `octavo pull`), folder, .gguf file or Hub repository."

FLAGS: dict[str, Flag] = {
    "tokenizer": Flag("Model", "Folder, tokenizer.json or .gguf to take the tokenizer from.", "PATH"),
    "skip_tokenizer_init": Flag("Model", "No tokenizer: token ids in and out."),
    "served_model_name": Flag("Model", "The name clients use for the model.", "NAME"),
    "revision": Flag("Model", "Branch, tag or commit of a Hub repository.", "NAME"),
    "download_dir": Flag("Model", "Folder for fetched models, instead of the cache folder.", "FOLDER"),
    "load_format": Flag("Model", "dummy: seeded random weights from a bare config.json."),
    "dtype": Flag(
        "Model",
        "auto: int8 for GGUF blocks on a CPU (while that takes at most half of the free memory), else as stored where "
        "the runtime has kernels for it; quantized: GGUF blocks as stored, closer to the file, fewer bits, slower.",
    ),
    "quantization": Flag("Model", "Round matrices, and activations they meet: int8, on a CPU.", "METHOD", short="-q"),
    "seed": Flag("Model", "Seed of sampling, and of dummy weights."),
    "trust_remote_code": Flag("Model", "Run code found in a repository: never. Refused when given."),
    "max_model_len": Flag("Memory", "Tokens of a request; default: the model's own, cut to what fits.", is_size=True),
    "kv_cache_memory_bytes": Flag("Memory", "Memory of the KV cache, such as 400MiB; default: planned.", is_size=True),
    "num_gpu_blocks_override": Flag("Memory", "Blocks of the KV cache, any device, instead of planning.", is_size=True),
    "block_size": Flag("Memory", "Tokens of one KV block."),
    "kv_cache_dtype": Flag(
        "Memory",
        "Number type of the KV cache; auto: float32 beside float32 weights, else bfloat16; int8 on a CPU, fp8 on "
        "a GPU.",
    ),
    "enable_prefix_caching": Flag("Memory", "Keep the KV of finished prefixes and share it."),
    "enable_copy_on_write": Flag("Memory", "Compute the prompt of n answers once; they share its KV, copy on write."),
    "swap_space": Flag(
        "Memory",
        "GiB of host memory that keep the KV of evicted prefixes and preempted requests, where copying it back is "
        "cheaper than computing it again (measured at start). On a CPU, give --kv-cache-memory-bytes more instead.",
        "GIB",
    ),
    "prefix_eviction_policy": Flag(
        "Memory", "Which cached prefix goes first: the least recently used, or the least often used, with ageing."
    ),
    "disable_hybrid_kv_cache_manager": Flag(
        "Memory", "Keep one block table for all layers: sliding windows keep the KV that they no longer see."
    ),
    "prefix_caching_hash_key": Flag("Memory", "Key of the prefix hash; default: random for each engine.", "TEXT"),
    "gpu_memory_utilization": Flag("Memory", "Share of a GPU's memory to use; read on a GPU only."),
    "max_num_seqs": Flag("Scheduler", "Requests that run at once; 0: 64, on a GPU 256.", is_size=True),
    "max_num_batched_tokens": Flag("Scheduler", "Tokens of a step, all together; 0: 512, on a GPU 8192.", is_size=True),
    "enable_chunked_prefill": Flag("Scheduler", "Cut long prompts to the step's budget; cannot be switched off."),
    "long_prefill_token_threshold": Flag("Scheduler", "Most tokens of one prompt in a step; 0: no cap.", is_size=True),
    "async_scheduling": Flag(
        "Scheduler", "Launch a step while the one before it runs, tokens staying on the device; read on a GPU only."
    ),
    "admission_headroom": Flag(
        "Scheduler", "Blocks per running request that an admission leaves free; 0: none, and more preemptions.", "X"
    ),
    "scheduling_policy": Flag(
        "Scheduler",
        "Who is admitted first. fcfs: first come, first served; priority: the lowest `priority` of a request, with "
        "ageing; fair: shares by the weights of API keys, or equal ones per `user` where there are no keys; slo: "
        "whoever can still meet the targets, shortest first.",
    ),
    "priority_ageing": Flag("Scheduler", "Policy priority: seconds of waiting that count as one step.", "SECONDS"),
    "slo_ttft_ms": Flag("Scheduler", "Policy slo: milliseconds to a first token.", "MS"),
    "slo_itl_ms": Flag("Scheduler", "Policy slo: milliseconds between later tokens; sizes prefill chunks.", "MS"),
    "max_num_queued_reqs": Flag(
        "Scheduler",
        "Requests that may wait; more are refused with 429 and a predicted wait. 0: no bound. Default: "
        f"{DEFAULT_QUEUE} behind a server, no bound offline.",
        is_size=True,
    ),
    "max_num_queued_tokens": Flag("Scheduler", "Prompt tokens that may wait; 0: no bound.", is_size=True),
    "record": Flag(
        "Scheduler",
        "Folder for a recording of every decision of the scheduler, without text; see octavo replay. auto: behind a "
        "server, in the cache folder, kept only if the engine dies.",
        "auto|off|FOLDER",
    ),
    "record_bytes": Flag("Scheduler", "Size of that recording; the oldest goes first.", is_size=True),
    "max_logprobs": Flag("Scheduler", "Most alternatives a request may ask for per token."),
    "runtime": Flag("Execution", "native: compiled for the CPU; cuda: a GPU; reference: numpy, defines every op."),
    "num_threads": Flag(
        "Execution", "Threads of the native runtime; default: the cores, or the cgroup's quota of them."
    ),
    "enforce_eager": Flag("Execution", "No CUDA graphs; read on a GPU only."),
    "fuse_ops": Flag("Execution", "Kernels that do their neighbours' work, or overlap them; read on a GPU only."),
    "disable_fusions": Flag(
        "Execution", f"Some of these off, with commas between: {', '.join(FUSIONS)}. Read on a GPU only.", "NAME,..."
    ),
    "attention_backend": Flag(
        "Execution",
        "triton; cuda: C++ kernels where there is one, built with nvcc; auto: those where they are faster and nvcc is "
        "found. Read on a GPU only.",
    ),
    "cuda_ops": Flag("Execution", "Norms and activations: triton, or cuda: C++, built with nvcc; read on a GPU only."),
    "tensor_parallel_size": Flag("Execution", f"Devices that share each layer. {_LATER}", short="-tp"),
    "pipeline_parallel_size": Flag("Execution", f"Devices that share the layers. {_LATER}", short="-pp"),
}


def engine_flags(
    *,
    model_as: Literal["argument", "option", "nothing"] = "argument",
    only: Collection[str] = FLAGS,
    without: Collection[str] = (),
) -> Callable[..., Callable[..., Any]]:
    """Decorates a verb: its parameter `config: EngineConfig` becomes the model (`model_as`) and one flag per
    field; `--log-level` is added and acted on. `only` and `without` leave out fields that mean nothing to the verb.
    Another parameter that is a dataclass of annotated fields becomes a panel of flags, named by its class's `panel`.

    All are built when the verb is called, so what they refuse is an error of the verb like any other.
    """
    names = [name for name in FLAGS if name in only and name not in without]

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        own, build_groups = _own_parameters(verb)

        @functools.wraps(verb)
        def with_flags(**values: Any) -> Any:
            set_log_level(values.pop("log_level"))
            given = {name: values.pop(name) for name in ("model", *names) if name in values}
            try:
                return verb(config=EngineConfig(**given), **build_groups(values))
            except OctavoError as error:  # it names fields, first of all or in the words of code; flags were typed
                said = re.sub(r"^\w+|\w+_\w+", lambda w: flag_name(w[0]) if w[0] in names else w[0], str(error))
                error.args = (said,)
                raise

        return _declare(with_flags, [*_model_first(model_as), *own, *_field_parameters(names), _log_level_parameter()])

    return decorate


def grouped_flags(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a verb that needs no engine of its own: its dataclass parameters become panels of flags."""
    own, build_groups = _own_parameters(verb)

    @functools.wraps(verb)
    def with_flags(**values: Any) -> Any:
        return verb(**build_groups(values))

    return _declare(with_flags, own)


def set_log_level(name: str) -> None:
    """Sets how much is logged; `debug` also shows tracebacks of errors. Raises ConfigError for an unknown name."""
    one_of("--log-level", name, LOG_LEVELS)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("octavo").setLevel(name.upper())


def flag_name(field: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + field.replace("_", "-")


def _own_parameters(
    verb: Callable[..., Any],
) -> tuple[list[inspect.Parameter], Callable[[dict[str, Any]], dict[str, Any]]]:
    """The parameters that a verb declares itself, dataclasses expanded, and what puts those together again."""
    declared = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "config"]
    groups = {p.name: p.annotation for p in declared if hasattr(p.annotation, "panel")}

    def build_groups(values: dict[str, Any]) -> dict[str, Any]:
        taken = {f.name for kind in groups.values() for f in fields(kind)}
        built = {name: kind(**{f.name: values[f.name] for f in fields(kind)}) for name, kind in groups.items()}
        return built | {name: value for name, value in values.items() if name not in taken}

    parameters: list[inspect.Parameter] = []
    for parameter in declared:
        parameters += _group_parameters(groups[parameter.name]) if parameter.name in groups else [parameter]
    return parameters, build_groups


def _group_parameters(kind: Any) -> list[inspect.Parameter]:
    parameters = []
    hints = typing.get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        declared, info = typing.get_args(hints[f.name])
        info.rich_help_panel = kind.panel
        parameters.append(_parameter(f.name, declared, info, f.default))
    return parameters


def _declare(wrapper: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Gives a function the signature that typer reads."""
    ordered = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    wrapper.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in ordered}
    return wrapper


def _model_first(model_as: str) -> list[inspect.Parameter]:
    info: Any = typer.Argument(help=_MODEL_HELP, metavar="[MODEL]")
    if model_as == "option":
        info = typer.Option("--model", help=_MODEL_HELP, metavar="MODEL", rich_help_panel="Model")
    return [] if model_as == "nothing" else [_parameter("model", str, info, DEFAULT_MODEL)]


def _field_parameters(names: list[str]) -> list[inspect.Parameter]:
    types_by_name = typing.get_type_hints(EngineConfig)
    defaults = {f.name: f.default for f in fields(EngineConfig)}
    return [_parameter(name, *_option(name, FLAGS[name], types_by_name[name]), defaults[name]) for name in names]


def _option(name: str, flag: Flag, declared: Any) -> tuple[Any, Any]:
    """The type and the typer option of a field. The values of a Literal are checked by EngineConfig, in its words."""
    names = [flag_name(name), *([flag.short] if flag.short else [])]
    metavar = flag.metavar or ("SIZE" if flag.is_size else "N")
    if typing.get_origin(declared) is Literal:
        declared, metavar = str, "|".join(typing.get_args(declared))
    elif declared is bool:
        names = [f"{flag_name(name)}/--no-{name.replace('_', '-')}"]
    parser = parse_size if flag.is_size else None
    return declared, typer.Option(*names, help=flag.help, rich_help_panel=flag.panel, metavar=metavar, parser=parser)


def _log_level_parameter() -> inspect.Parameter:
    info = typer.Option(
        "--log-level", help="debug shows tracebacks.", metavar="|".join(LOG_LEVELS), rich_help_panel="Execution"
    )
    return _parameter("log_level", str, info, "warning")


def _parameter(name: str, kind: Any, info: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
