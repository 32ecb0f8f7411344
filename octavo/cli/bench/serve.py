"""`octavo bench serve`: a server under load, any server that speaks OpenAI's API. Flags and block as in vLLM."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import typer
from typer import Option

from octavo.cli.bench.arithmetic import METRICS, Outcome, Report, printed_block, report
from octavo.cli.bench.arrivals import Ramp, send_times
from octavo.cli.bench.datasets import NAMES, Dataset, Prompt
from octavo.cli.bench.load import Job, Kind, Target, check, run_load
from octavo.cli.bench.results import save
from octavo.cli.client import Server
from octavo.cli.flags import grouped_flags
from octavo.cli.talk import served_model
from octavo.cli.terminal import progress, say
from octavo.config import one_of
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

ENDPOINTS: dict[str, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
EXAMPLES = (
    "octavo bench serve --request-rate 4 --num-prompts 100 --ignore-eos\n\n"
    "octavo bench serve --max-concurrency 8 --random-input-len 512\n\n"
    "octavo bench serve --dataset-name sharegpt --dataset-path talks.json\n\n"
    "octavo bench serve --goodput ttft:200 --goodput tpot:50 --save-result"
)


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """Which server, and how to speak to it."""

    panel: ClassVar[str] = "Server"
    backend: Annotated[str, Option(help="API to speak.", metavar="|".join(ENDPOINTS))] = "openai"
    base_url: Annotated[str | None, Option(help="Address, instead of host and port.", metavar="URL")] = None
    host: Annotated[str, Option(help="Host of the server.", metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Option(help="Port of the server.", min=1, max=65535, metavar="N")] = 8000
    endpoint: Annotated[str | None, Option(help="Path; default: the backend's.", metavar="PATH")] = None
    api_key: Annotated[str | None, Option(help="Key to send.", metavar="KEY", envvar="OPENAI_API_KEY")] = None
    model: Annotated[str | None, Option(help="Default: the first that the server lists.", metavar="NAME")] = None
    tokenizer: Annotated[
        str | None, Option(help="Model whose tokenizer cuts the prompts; default: the model's name.", metavar="MODEL")
    ] = None
    temperature: Annotated[float, Option(help="0 is greedy.", min=0.0, metavar="X")] = 0.0
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Every answer has its full length.")] = False

    def __post_init__(self) -> None:
        one_of("--backend", self.backend, ENDPOINTS)

    async def target(self) -> Target:
        """Where and how to make requests; asks the server for its model where none was named."""
        server = Server.parse(self.base_url or f"http://{self.host}:{self.port}", api_key=self.api_key)
        extra = {"temperature": self.temperature} | ({"ignore_eos": True} if self.ignore_eos else {})
        return Target(
            server=server,
            endpoint=self.endpoint or ENDPOINTS[self.backend],
            kind=cast(Kind, self.backend),
            model=self.model or await served_model(server),
            extra=extra,
        )


@dataclass(frozen=True, slots=True)
class PromptFlags:
    """What is asked."""

    panel: ClassVar[str] = "Prompts"
    dataset_name: Annotated[str, Option(help="Where prompts come from.", metavar="|".join(NAMES))] = "random"
    dataset_path: Annotated[Path | None, Option(help="File: JSON of sharegpt, or custom lines.", metavar="FILE")] = None
    num_prompts: Annotated[int, Option(help="Requests.", min=1, metavar="N")] = 32
    seed: Annotated[int, Option(help="Of prompts and of arrival times.", metavar="N")] = 0
    random_input_len: Annotated[int, Option(help="Tokens of each prompt.", min=1, metavar="N")] = 128
    random_output_len: Annotated[int, Option(help="Tokens of each answer.", min=1, metavar="N")] = 128
    random_range_ratio: Annotated[float, Option(help="Lengths vary by this share, up and down.", metavar="X")] = 0.0
    random_prefix_len: Annotated[int, Option(help="Tokens that all prompts begin with.", min=0, metavar="N")] = 0
    prefix_repetition_prefix_len: Annotated[int, Option(help="Tokens of each shared prefix.", min=1, metavar="N")] = 256
    prefix_repetition_suffix_len: Annotated[int, Option(help="Tokens after it.", min=1, metavar="N")] = 256
    prefix_repetition_num_prefixes: Annotated[int, Option(help="Different prefixes.", min=1, metavar="N")] = 10
    prefix_repetition_output_len: Annotated[int, Option(help="Tokens of each answer.", min=1, metavar="N")] = 128
    sharegpt_output_len: Annotated[int | None, Option(help="Instead of the file's answers.", min=1, metavar="N")] = None
    custom_output_len: Annotated[int | None, Option(help="Instead of the file's tokens.", min=1, metavar="N")] = None

    def dataset(self) -> Dataset:
        """The dataset that these flags describe."""
        repeats = self.dataset_name == "prefix_repetition"
        fixed = {"sharegpt": self.sharegpt_output_len, "custom": self.custom_output_len}
        return Dataset(
            name=self.dataset_name,
            path=self.dataset_path,
            num_prompts=self.num_prompts,
            seed=self.seed,
            input_len=self.prefix_repetition_suffix_len if repeats else self.random_input_len,
            output_len=self.prefix_repetition_output_len if repeats else self.random_output_len,
            range_ratio=self.random_range_ratio,
            prefix_len=self.prefix_repetition_prefix_len if repeats else self.random_prefix_len,
            num_prefixes=self.prefix_repetition_num_prefixes,
            fixed_output_len=fixed.get(self.dataset_name),
        )


@dataclass(frozen=True, slots=True)
class LoadFlags:
    """When it is asked."""

    panel: ClassVar[str] = "Load"
    request_rate: Annotated[float, Option(help="Requests sent per second; inf: all at once.", metavar="X")] = math.inf
    burstiness: Annotated[float, Option(help="1: Poisson; below: burstier; above: steadier.", metavar="X")] = 1.0
    max_concurrency: Annotated[int | None, Option(help="Most requests under way at once.", min=1, metavar="N")] = None
    ramp_up_strategy: Annotated[str | None, Option(help="Raise the rate.", metavar="linear|exponential")] = None
    ramp_up_start_rps: Annotated[float, Option(help="Rate at the first request.", metavar="X")] = 0.0
    ramp_up_end_rps: Annotated[float, Option(help="Rate at the last request.", metavar="X")] = 0.0

    def __post_init__(self) -> None:
        if not self.request_rate > 0 or not self.burstiness > 0:
            raise ConfigError("--request-rate and --burstiness must be above 0")
        if self.ramp_up_strategy is None:
            return
        one_of("--ramp-up-strategy", self.ramp_up_strategy, ("linear", "exponential"))
        if self.request_rate != math.inf:
            raise ConfigError("--ramp-up-strategy sets the rate itself: leave --request-rate out")
        if self.ramp_up_start_rps <= 0 or self.ramp_up_end_rps <= 0:
            raise ConfigError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps above 0")

    def times(self, num_requests: int, seed: int) -> list[float]:
        """When each request is sent, in seconds after the start."""
        asked = self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps
        ramp = cast(Ramp, asked) if self.ramp_up_strategy else None
        rate, burstiness = self.request_rate, self.burstiness
        return send_times(num_requests, request_rate=rate, burstiness=burstiness, seed=seed, ramp=ramp)


@dataclass(frozen=True, slots=True)
class ResultFlags:
    """What is made of it."""

    panel: ClassVar[str] = "Result"
    percentile_metrics: Annotated[str, Option(help="Metrics to print.", metavar="NAMES")] = "ttft,tpot,itl"
    metric_percentiles: Annotated[str, Option(help="Percentiles to compute, such as 50,99.", metavar="LIST")] = "99"
    goodput: Annotated[
        list[str] | None, Option(help="Objective in ms, repeatable: ttft:200, tpot:50, e2el:5000.", metavar="NAME:MS")
    ] = None
    save_result: Annotated[bool, Option("--save-result", help="Write a JSON file.")] = False
    save_detailed: Annotated[bool, Option("--save-detailed", help="With every request's times and text.")] = False
    result_dir: Annotated[Path, Option(help="Folder of the file.", metavar="FOLDER")] = Path()
    result_filename: Annotated[str | None, Option(help="Default: backend, rate, model, date.", metavar="NAME")] = None

    def __post_init__(self) -> None:
        for name in self.metrics():
            if name not in METRICS:
                raise ConfigError(f"--percentile-metrics knows {', '.join(METRICS)}, not {name!r}")
        self.percentiles()
        self.objectives()

    def metrics(self) -> list[str]:
        """Metrics to print."""
        return [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]

    def percentiles(self) -> list[float]:
        """Percentiles to compute. Raises ConfigError for what is none."""
        try:
            ranks = [float(text) for text in self.metric_percentiles.split(",")]
        except ValueError:
            ranks = [-1.0]
        if not all(0 <= rank <= 100 for rank in ranks):
            raise ConfigError(f"--metric-percentiles takes numbers from 0 to 100, not {self.metric_percentiles!r}")
        return ranks

    def objectives(self) -> dict[str, float]:
        """Milliseconds by metric. Raises ConfigError for what is no objective."""
        found = {}
        for text in " ".join(self.goodput or []).replace(",", " ").split():
            name, _, limit = text.partition(":")
            try:
                found[name] = float(limit)
            except ValueError:
                found[name] = -1.0
            if name not in ("ttft", "tpot", "e2el") or not found[name] > 0:
                raise ConfigError(f"--goodput {text!r}: write ttft:200, tpot:50 or e2el:5000 (milliseconds)")
        return found


@grouped_flags
def serve(server: ServerFlags, prompts: PromptFlags, load: LoadFlags, result: ResultFlags) -> None:
    """Measure a running server under load: TTFT, TPOT, ITL, end-to-end latency, throughput, goodput."""
    target, outcomes, run = asyncio.run(_measure(server, prompts, load, result))
    block = printed_block(run, result.metrics(), max_concurrency=load.max_concurrency, request_rate=load.request_rate)
    typer.echo(block)
    for error in sorted({o.error for o in outcomes if o.error})[:3]:
        say(f"failed: {error}", style="red")
    if result.save_result or result.save_detailed:
        settings = {
            "backend": server.backend,
            "model_id": target.model,
            "tokenizer_id": server.tokenizer or target.model,
            "num_prompts": prompts.num_prompts,
            "request_rate": load.request_rate if load.request_rate != math.inf else "inf",
            "burstiness": load.burstiness,
            "max_concurrency": load.max_concurrency,
        }
        path = save(result.result_dir, result.result_filename, settings, run, outcomes, detailed=result.save_detailed)
        say(f"Saved {path}")
    if not run.completed:
        raise typer.Exit(1)


async def _measure(
    server: ServerFlags, prompts: PromptFlags, load: LoadFlags, result: ResultFlags
) -> tuple[Target, list[Outcome], Report]:
    target = await server.target()
    tokenizer = load_tokenizer_of(server.tokenizer or target.model)
    made = prompts.dataset().prompts(tokenizer, tokenizer.vocab_size)
    times = load.times(len(made), prompts.seed)
    jobs = [to_job(p, target.kind, tokenizer, at) for p, at in zip(made, times, strict=True)]
    say(f"{len(jobs)} requests to {target.server.url}{target.endpoint} ({target.model})")
    await check(target, Job(jobs[0].prompt, jobs[0].prompt_tokens, jobs[0].output_len, 0.0))
    num_done = itertools.count(1)
    with progress("Requests", len(jobs)) as tell:
        outcomes, duration = await run_load(
            target, jobs, max_concurrency=load.max_concurrency, on_done=lambda _: tell(next(num_done))
        )
    run = report(outcomes, duration, percentiles=result.percentiles(), goodput=result.objectives())
    return target, outcomes, run


def load_tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a model. Raises ConfigError, with the way out, when the name is no model here."""
    from octavo.errors import ModelError
    from octavo.models.hub import resolve_model
    from octavo.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(resolve_model(name))
    except ModelError as error:
        raise ConfigError(f"no tokenizer for {name!r}: name one with --tokenizer ({error})") from error


def to_job(prompt: Prompt, kind: Kind, tokenizer: Tokenizer, send_at: float) -> Job:
    """A prompt in the form its API takes: completions get exact token ids, a chat gets text."""
    text = prompt.text
    if kind == "openai-chat" and text is None:
        text = tokenizer.decode(prompt.token_ids)
    return Job(text if text is not None else prompt.token_ids, len(prompt.token_ids), prompt.output_len, send_at)
