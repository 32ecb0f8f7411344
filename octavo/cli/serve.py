"""`octavo serve`: the OpenAI-compatible server, and what it tells whoever starts it."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shlex
import signal
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Option

from octavo import __version__
from octavo.cli.files import read_text
from octavo.cli.flags import engine_flags
from octavo.cli.terminal import console, process_age, say, say_table
from octavo.config import EngineConfig, one_of
from octavo.errors import ConfigError
from octavo.server.address import bind
from octavo.server.tools import REASONING_PARSERS, TOOL_PARSERS

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine
    from octavo.engine.child import EngineProcess
    from octavo.models.spec import ModelFiles
    from octavo.server.keys import Keyring
    from octavo.server.loop import Tls

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXAMPLE_TEMPERATURE = 0.3  # the default model is small: at 1 it rambles
EXAMPLES = (
    "octavo serve                                        the default model\n\n"
    "octavo serve ./Qwen3-0.6B --port 9000               a Hugging Face folder\n\n"
    "octavo serve model.gguf --max-model-len 4k          a GGUF file, a shorter context\n\n"
    "octavo serve gemma3-270m --kv-cache-memory-bytes 400MiB --max-num-seqs 16"
)


@dataclass(slots=True)
class Startup:
    """Seconds by phase since the process began; the phases add up to the whole."""

    phases: dict[str, float] = field(default_factory=dict)

    def close_phase(self, name: str) -> None:
        """Books everything not booked yet under `name`."""
        self.phases[name] = max(0.0, process_age() - self.total)

    def add_engine(self, timings: dict[str, float]) -> None:
        """Books what the engine reported: its process first, then its phases in their order."""
        phases = dict(timings)
        self.phases["find model"] += phases.pop("find model", 0.0)
        self.phases["engine process"] = phases.pop("process start, imports", 0.0)
        self.phases |= phases

    @property
    def total(self) -> float:
        """Seconds booked so far."""
        return sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class HttpFlags:
    """How the server listens and speaks."""

    panel: ClassVar[str] = "HTTP"
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0: every network.", metavar="ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Option(help="Port to listen on; 0 takes a free one.", metavar="N", min=0, max=65535)] = 8000
    chat_template: Annotated[
        Path | None, Option(help="File with a Jinja chat template, instead of the model's own.", metavar="FILE")
    ] = None
    shutdown_timeout: Annotated[
        int, Option(help="Seconds that running requests get to end; 0: ended at once.", metavar="N", min=0)
    ] = 30
    sse_ping_interval: Annotated[
        int, Option(help="Seconds of silence in a stream after which a comment is sent; 0: never.", metavar="N", min=0)
    ] = 15
    tool_call_parser: Annotated[
        str | None, Option(help="How the model writes tool calls.", metavar="hermes|qwen|llama3_json|mistral|pythonic")
    ] = None
    reasoning_parser: Annotated[
        str | None, Option(help="How the model writes what it thinks.", metavar="qwen3|deepseek_r1")
    ] = None
    metrics_compat: Annotated[str, Option(help="vllm: every metric as vllm:, too.", metavar="octavo|vllm")] = "octavo"

    def __post_init__(self) -> None:
        one_of("--metrics-compat", self.metrics_compat, ("octavo", "vllm"))
        one_of("--tool-call-parser", self.tool_call_parser, (None, *TOOL_PARSERS))
        one_of("--reasoning-parser", self.reasoning_parser, (None, *REASONING_PARSERS))


@dataclass(frozen=True)
class AccessFlags:
    """Who may ask, and over what."""

    panel: ClassVar[str] = "Access"
    api_key: Annotated[
        list[str] | None,
        Option(help="A key that clients send; may be repeated.", metavar="KEY", envvar="OCTAVO_API_KEY"),
    ] = None
    admin_api_key: Annotated[
        list[str] | None,
        Option(
            help="A key that may read /metrics, /memory and /server_info, too; may be repeated.",
            metavar="KEY",
            envvar="OCTAVO_ADMIN_API_KEY",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, Option(help="Keys with tenants, weights and limits, as .toml or .json.", metavar="FILE")
    ] = None
    public_health: Annotated[
        bool, Option("--public-health", help="/health, /health/live and /health/ready answer without a key.")
    ] = False
    allowed_origins: Annotated[
        list[str] | None,
        Option(help="A web page whose scripts may ask (CORS), or *; may be repeated.", metavar="ORIGIN"),
    ] = None
    ssl_certfile: Annotated[Path | None, Option(help="TLS: the certificate chain, PEM.", metavar="FILE")] = None
    ssl_keyfile: Annotated[Path | None, Option(help="TLS: its private key, PEM.", metavar="FILE")] = None

    def __post_init__(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together: give both")

    @cached_property
    def tls(self) -> Tls | None:
        """The certificate, checked; None where it is plain HTTP."""
        if self.ssl_certfile is None or self.ssl_keyfile is None:
            return None
        from octavo.server.loop import Tls

        return Tls(self.ssl_certfile, self.ssl_keyfile)

    @cached_property
    def keyring(self) -> Keyring | None:
        """The keys of the flags, the environment and the file; None where everybody may ask."""
        if not (self.api_key or self.admin_api_key or self.api_key_file):
            return None
        from octavo.server.keys import read_keys

        keys, admins = self.api_key or (), self.admin_api_key or ()
        return read_keys(keys, admins, self.api_key_file, public_probes=self.public_health)


@engine_flags()
def serve(config: EngineConfig, http: HttpFlags, access: AccessFlags) -> None:
    """Serve a model over HTTP, the way OpenAI's API does.

    It listens on this machine only unless --host says otherwise; give --api-key then. Ctrl-C or SIGTERM stops it:
    new requests are refused, running ones get --shutdown-timeout seconds to end; a second one ends them at once.
    """
    startup = Startup()
    startup.close_phase("command line")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a supervisor's stop is a Ctrl-C
    template = read_template(http.chat_template)
    bind(http.host, http.port).close()  # what is wrong with it is said now, not after loading a model
    access.keyring, access.tls  # noqa: B018  # and so is what is wrong with them
    say(f"Octavo {__version__}", style="bold")
    if access.keyring is None and http.host not in LOOPBACK:
        say("Anybody who reaches this address may ask: give --api-key.", style="yellow")
    # with a timeout of 0 uvicorn complains that it cancels, which is what was asked for
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.getMessage().startswith("Cancel "))
    from octavo.engine.child import EngineProcess

    with closing(EngineProcess()) as process:  # imports what it needs while this one does
        process.load(config, find_model(config))
        startup.close_phase("find model")
        asyncio.run(_serve(config, http, access, template, startup, process))
    say("Stopped.")


def find_model(config: EngineConfig) -> ModelFiles:
    """Fetches the model if it is not there yet, with a progress bar. Done outside the event loop, so that Ctrl-C ends
    a download at once."""
    from octavo.models.hub import resolve_model_of

    files = resolve_model_of(config)
    say(f"Model    {files.path}")
    return files


def read_template(path: Path | None) -> str | None:
    """The source of a chat template. Raises ConfigError when the file cannot be read."""
    return None if path is None else read_text("--chat-template", path)


def curl_lines(engine: AsyncEngine, url: str, *, with_key: bool = False) -> str:
    """A request that works with this model, ready to paste into a shell."""
    prompts: dict[str, object] = {"prompt": [1, 2, 3]}
    if engine.chat_template is not None:
        prompts = {"messages": [{"role": "user", "content": "Name three uses of paper."}]}
    elif engine.tokenizer is not None:
        prompts = {"prompt": "Paper is made of"}
    path = "chat/completions" if "messages" in prompts else "completions"
    settings = {"model": engine.model_name, "stream": True, "max_tokens": 64, "temperature": EXAMPLE_TEMPERATURE}
    body = f"{json.dumps(settings)[:-1]},\n         {json.dumps(prompts)[1:]}"
    key = "-H 'Authorization: Bearer KEY' " if with_key else ""
    return f"curl -N {url}/{path} \\\n    {key}-H 'Content-Type: application/json' \\\n    -d {shlex.quote(body)}"


async def _serve(
    config: EngineConfig,
    http: HttpFlags,
    access: AccessFlags,
    template: str | None,
    startup: Startup,
    process: EngineProcess,
) -> None:
    from octavo.engine.async_engine import AsyncEngine

    with console().status(f"Loading {config.model} ..."):
        engine, app_module, loop_module = await asyncio.gather(
            AsyncEngine.start(config, chat_template=template, metrics_compat=http.metrics_compat, process=process),
            asyncio.to_thread(import_module, "octavo.server.app"),  # while the engine process loads the model
            asyncio.to_thread(import_module, "octavo.server.loop"),
        )
    gc.freeze()  # what was imported stays
    gc.enable()
    startup.add_engine(engine.timings)

    def ready(real_port: int) -> None:
        startup.close_phase("server")
        shown = f"[{http.host}]" if ":" in http.host else http.host
        url = f"http{'s' if access.tls else ''}://{shown}:{real_port}/v1"
        print_ready(engine, startup, url, with_key=access.keyring is not None)

    try:
        app = app_module.create_app(
            engine,
            served_model_names=[engine.model_name],
            keyring=access.keyring,
            allowed_origins=access.allowed_origins or (),
            ping_seconds=http.sse_ping_interval,
            tool_form=TOOL_PARSERS[http.tool_call_parser] if http.tool_call_parser else None,
            reasoning_parser=http.reasoning_parser,
        )
        await loop_module.run_server(
            app, host=http.host, port=http.port, ready=ready, drain_seconds=http.shutdown_timeout, tls=access.tls
        )
    finally:
        await engine.shutdown()


def print_ready(engine: AsyncEngine, startup: Startup, url: str, *, with_key: bool) -> None:
    """What whoever started the server wants to know: what runs, where memory and time went, where to send requests."""
    ready = engine.ready
    say(f"Runtime  {ready.runtime}")
    say()
    say("Memory", style="bold")
    say(ready.plan)
    say()
    rows = [(name, f"{seconds:7.3f} s") for name, seconds in startup.phases.items() if seconds >= 0.001]
    say_table("Start-up", [*rows, ("total", f"{startup.total:7.3f} s")])
    say()
    say(f"Ready in {startup.total:.2f} s: {url}", style="bold green")
    say()
    say(f"  {curl_lines(engine, url, with_key=with_key)}")
    say()
    if console().is_terminal:
        say("Ctrl-C stops it.", style="dim")
