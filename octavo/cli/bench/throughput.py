"""`octavo bench throughput`: how many requests and tokens a second the engine does when it is never short of work."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from octavo.cli.bench.datasets import NAMES, Dataset
from octavo.cli.files import write_json
from octavo.cli.flags import engine_flags
from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.engine.llm import LLM
    from octavo.text.tokenizer import Tokenizer

EXAMPLES = (
    "octavo bench throughput                                          the default model, random prompts\n\n"
    "octavo bench throughput --input-len 512 --output-len 64 --num-prompts 100\n\n"
    "octavo bench throughput --dataset-name sharegpt --dataset-path talks.json"
)


@engine_flags(model_as="option", without=("served_model_name",))
def throughput(
    config: EngineConfig,
    dataset_name: Annotated[str, Option(help="Where prompts come from.", metavar="|".join(NAMES))] = "random",
    dataset_path: Annotated[
        Path | None, Option(help="File: JSON of sharegpt, or custom lines.", metavar="FILE")
    ] = None,
    input_len: Annotated[int, Option(help="Tokens of each random prompt.", min=1, metavar="N")] = 128,
    output_len: Annotated[int | None, Option(help="Tokens of each answer; default: 128, or the file's.", min=1)] = None,
    num_prompts: Annotated[int, Option(help="Requests.", min=1, metavar="N")] = 32,
    n: Annotated[int, Option(help="Answers to each prompt.", min=1, metavar="N")] = 1,
    output_json: Annotated[Path | None, Option(help="File for the result.", metavar="FILE")] = None,
) -> None:
    """Measure offline throughput. Every answer has exactly its number of tokens (end-of-sequence is ignored)."""
    from octavo.engine.llm import LLM
    from octavo.sampling_params import SamplingParams

    dataset = Dataset(
        name=dataset_name,
        path=dataset_path,
        num_prompts=num_prompts,
        seed=config.seed,
        input_len=input_len,
        output_len=output_len or 128,
        fixed_output_len=output_len,
    )
    with LLM(**asdict(config)) as llm:
        tokenizer = tokenizer_of(llm)
        prompts = dataset.prompts(tokenizer, llm.core.info.spec.vocab_size)
        params = [
            SamplingParams(n=n, max_tokens=p.output_len, ignore_eos=True, detokenize=tokenizer is not None)
            for p in prompts
        ]
        began = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p.token_ids} for p in prompts], params, use_tqdm=True)
        seconds = time.perf_counter() - began
    prompt_tokens = sum(len(o.prompt_token_ids) for o in outputs)
    output_tokens = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    result = results(seconds, len(prompts), prompt_tokens, output_tokens)
    typer.echo(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    typer.echo(f"Total num prompt tokens:  {prompt_tokens}")
    typer.echo(f"Total num output tokens:  {output_tokens}")
    if output_json is not None:
        write_json(output_json, result)


def tokenizer_of(llm: LLM) -> Tokenizer | None:
    """The engine's tokenizer, or None where it takes token ids only."""
    try:
        return llm.get_tokenizer()
    except ConfigError:
        return None


def results(seconds: float, num_requests: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    """The numbers of a run, under vLLM's keys (and output_tokens_per_second)."""
    return {
        "elapsed_time": seconds,
        "num_requests": num_requests,
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": num_requests / seconds,
        "tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
    }
