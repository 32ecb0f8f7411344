"""`octavo complete`: continue a text, streaming to stdout; what it cost goes to stderr."""

import asyncio
import sys
from typing import Annotated

from typer import Argument, Option

from octavo.cli.files import read_stdin
from octavo.cli.flags import engine_flags
from octavo.cli.serve import find_model
from octavo.cli.talk import Answer, ApiKeyOption, Sampling, TemperatureOption, TopPOption, UrlOption, open_talker, show
from octavo.cli.terminal import say
from octavo.config import EngineConfig
from octavo.errors import ConfigError

EXAMPLES = (
    'octavo complete "The capital of France is" --max-tokens 16\n\n'
    'octavo complete "Once upon a time" --model stories15m --temperature 0.8\n\n'
    "echo 'def fibonacci(n):' | octavo complete --url http://127.0.0.1:8000"
)


@engine_flags(model_as="option", without=("served_model_name",))
def complete(
    config: EngineConfig,
    text: Annotated[str | None, Argument(help="The text to continue; without it, stdin is read.")] = None,
    max_tokens: Annotated[int, Option(help="Most tokens to generate.", min=1, metavar="N")] = 128,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Continue a text, here or at a server."""
    prompt = text if text is not None else _read_stdin()
    sampling = Sampling(max_tokens, temperature, top_p)
    if url is None:
        find_model(config)
    answer = asyncio.run(_complete(config, prompt, sampling, url, api_key))
    sys.stdout.write("\n")
    say(answer.summary(), style="dim")


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise ConfigError('nothing to complete: octavo complete "Once upon a time", or pipe a text in')
    prompt = read_stdin(sys.stdin.read).removesuffix("\n")
    if not prompt:
        raise ConfigError("nothing to complete: stdin was empty")
    return prompt


async def _complete(
    config: EngineConfig, prompt: str, sampling: Sampling, url: str | None, api_key: str | None
) -> Answer:
    talker = await open_talker(config, url, api_key)
    answer = Answer()
    try:
        await show(talker.complete(prompt, sampling, answer))
    finally:
        await talker.close()
    return answer
