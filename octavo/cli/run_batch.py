"""`octavo run-batch`: answers a file of requests, one a line, without a server."""

import asyncio
from pathlib import Path
from typing import Annotated

from typer import Option

from octavo.cli.flags import engine_flags
from octavo.cli.serve import find_model
from octavo.cli.terminal import say
from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError

EXAMPLES = (
    "octavo run-batch -i in.jsonl -o out.jsonl    every line; again: goes on\n\n"
    "octavo run-batch -i in.jsonl -o out.jsonl --model gemma3-270m --at-once 32"
)


@engine_flags(model_as="option")
def run_batch(
    config: EngineConfig,
    input_file: Annotated[Path, Option("-i", "--input-file", help="Requests, OpenAI's batch format.", metavar="FILE")],
    output_file: Annotated[Path, Option("-o", "--output-file", help="Where answers are added.", metavar="FILE")],
    at_once: Annotated[int, Option(help="Requests given to the engine together.", min=1, max=1024, metavar="N")] = 128,
) -> None:
    """Answer a file of requests, one a line. What the output file answers already is skipped.

    A line is one of OpenAI's batches: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
    "body": {"messages": [...]}}.
    """
    if not input_file.is_file():
        raise ConfigError(f"-i {input_file}: there is no such file")
    try:
        output_file.open("ab").close()
    except OSError as error:
        raise ConfigError(f"-o {output_file}: {error.strerror}") from error
    find_model(config)
    went, failed = asyncio.run(_run(config, input_file, output_file, at_once))
    say(f"{went:,} requests answered now, {failed:,} failed: {output_file}", style="bold")
    if failed:
        raise OctavoError(f"{failed:,} requests failed; their lines in {output_file} say why")


async def _run(config: EngineConfig, source: Path, target: Path, at_once: int) -> tuple[int, int]:
    from tqdm.auto import tqdm

    from octavo.cli.batch_file import answer_all, answered, read_lines
    from octavo.engine.async_engine import AsyncEngine
    from octavo.server.app import create_app

    _, size = answered(target)  # what is wrong with it is said now
    if target.exists() and target.stat().st_size > size:
        say(f"{target}: the last line was not finished when a run was killed; it is cut off and answered again")
    total = sum(1 for _ in read_lines(source))
    engine = await AsyncEngine.start(config)
    try:
        app = create_app(engine, served_model_names=[engine.model_name])
        with tqdm(total=total, desc="Requests", unit="req", dynamic_ncols=True) as bar:
            return await answer_all(app, source, target, at_once=at_once, done=lambda _: bar.update())
    except OSError as error:
        raise OctavoError(f"-o {target}: {error.strerror}; what is answered stays: the same command goes on") from error
    finally:
        await engine.shutdown()
