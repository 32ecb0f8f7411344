"""`octavo program`: the model as the list of nodes that a runtime runs, with shapes, bytes and operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from octavo.cli.flags import engine_flags
from octavo.cli.sizes import parse_size
from octavo.cli.terminal import say
from octavo.config import EngineConfig

if TYPE_CHECKING:
    from octavo.program.ops import Weight

EXAMPLES = (
    "octavo program                                 one decode step of the default model\n\n"
    "octavo program gemma3-270m --num-tokens 512    a prefill of 512 tokens\n\n"
    "octavo program ./folder --context 8k           attention over 8000 positions"
)


@engine_flags(
    only=(
        *("dtype", "quantization", "kv_cache_dtype", "runtime", "max_model_len"),
        *("load_format", "revision", "download_dir"),
    )
)
def program(
    config: EngineConfig,
    num_tokens: Annotated[int, Option(help="Tokens of the step.", min=1, metavar="N")] = 1,
    context: Annotated[int, Option(help="Positions that a token attends to.", parser=parse_size, metavar="SIZE")] = 512,
) -> None:
    """Print the model's program: every node with its shapes, bytes and operations in one step.

    The weights are not read: a bare config.json with --load-format dummy is enough. What fits in memory is not looked
    at either.
    """
    from octavo.models.decoder import record
    from octavo.models.hub import resolve_model_of
    from octavo.models.reader import read_spec
    from octavo.models.weights import open_weights
    from octavo.program.ops import Sizes
    from octavo.program.printer import describe
    from octavo.runtime.choose import choose, choose_kv, choose_weights
    from octavo.runtime.native.library import load_library
    from octavo.runtime.native.packing import Packer

    files = resolve_model_of(config)
    spec = read_spec(files, max_model_len=config.max_model_len)
    runtime, dtype = choose(config.runtime, config.dtype, spec.stored_dtype, config.quantization)
    computed = choose_weights(config.dtype, dtype, config.quantization)[0]
    recorded = record(spec)
    kv_dtype = choose_kv(config.kv_cache_dtype, dtype)
    kv_bytes = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / spec.head_dim, "fp8": 1.0}[kv_dtype]
    kept: dict[tuple[str, ...], int] = {}  # the reference keeps float32 whatever it rounds to
    if runtime == "reference":
        kv_bytes = 4.0
    if runtime == "native":
        weights = open_weights(files, spec, load_format=config.load_format)
        kept = Packer(load_library(), recorded, weights, computed).bytes()

    def resident_bytes(weight: Weight) -> int:
        return kept.get(weight.parts, 4 * math.prod(weight.shape))

    say(f"{config.model}: {spec.architecture}, {runtime} runtime, {computed} weights, {kv_dtype} KV", style="bold")
    typer.echo(describe(recorded, Sizes(num_tokens, 1, context), resident_bytes, kv_bytes=kv_bytes), nl=False)
