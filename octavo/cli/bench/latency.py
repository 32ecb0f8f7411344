"""`octavo bench latency`: how long one batch takes from prompt to last token, again and again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from octavo.cli.files import write_json
from octavo.cli.flags import engine_flags
from octavo.cli.terminal import console
from octavo.config import EngineConfig

if TYPE_CHECKING:
    from octavo.engine.llm import LLM
    from octavo.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)
EXAMPLES = (
    "octavo bench latency                       8 prompts of 32 tokens, 128 tokens each\n\n"
    "octavo bench latency --batch-size 1 --input-len 512 --output-len 1    time to first token\n\n"
    "octavo bench latency --batch-size 32 --profile    what each node of a step takes"
)


@engine_flags(model_as="option", without=("served_model_name",))
def latency(
    config: EngineConfig,
    input_len: Annotated[int, Option(help="Tokens of each prompt.", min=1, metavar="N")] = 32,
    output_len: Annotated[int, Option(help="Tokens of each answer.", min=1, metavar="N")] = 128,
    batch_size: Annotated[int, Option(help="Prompts at once.", min=1, metavar="N")] = 8,
    n: Annotated[int, Option(help="Answers to each prompt.", min=1, metavar="N")] = 1,
    num_iters_warmup: Annotated[int, Option(help="Batches before measuring.", min=0, metavar="N")] = 2,
    num_iters: Annotated[int, Option(help="Batches measured.", min=1, metavar="N")] = 10,
    profile: Annotated[
        bool, Option("--profile", help="Print what each node of the program took, as a share of the limits.")
    ] = False,
    output_json: Annotated[Path | None, Option(help="File for the result.", metavar="FILE")] = None,
) -> None:
    """Measure the latency of a batch. Prompts are fresh for every batch, so that no prefix is found in the cache."""
    from octavo.engine.llm import LLM
    from octavo.sampling_params import SamplingParams
    from octavo.simulate.outcome import percentile

    params = SamplingParams(n=n, temperature=1.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    draw = random.Random(config.seed)
    with LLM(**asdict(config)) as llm:
        for _ in _progress("Warm-up", num_iters_warmup):
            run_batch(llm, params, draw, batch_size, input_len)
        if profile:
            llm.start_profile()
        seconds = [run_batch(llm, params, draw, batch_size, input_len) for _ in _progress("Measuring", num_iters)]
        breakdown = llm.stop_profile() if profile else None
    average = sum(seconds) / len(seconds)
    ranked = {p: percentile(seconds, p) for p in PERCENTILES}
    typer.echo(f"Avg latency: {average} seconds")
    for rank, value in ranked.items():
        typer.echo(f"{rank}% percentile latency: {value} seconds")
    if breakdown is not None:
        typer.echo(f"\n{breakdown}", nl=False)
    if output_json is not None:
        write_json(output_json, {"avg_latency": average, "latencies": seconds, "percentiles": ranked})


def run_batch(llm: LLM, params: SamplingParams, draw: random.Random, batch_size: int, input_len: int) -> float:
    """Seconds that one batch of random prompts takes."""
    vocabulary = range(llm.core.info.spec.vocab_size)
    prompts = [{"prompt_token_ids": draw.choices(vocabulary, k=input_len)} for _ in range(batch_size)]
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began


def _progress(title: str, total: int) -> Iterable[int]:
    from rich.progress import track

    return track(range(total), description=title, console=console(), disable=not console().is_terminal)
