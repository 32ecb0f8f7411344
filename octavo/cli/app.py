"""The `octavo` command: its verbs, and the one place where errors become a line and an exit status."""

import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from octavo import __version__
from octavo.cli.help import Verbs, add_verbs
from octavo.cli.terminal import say, say_error
from octavo.errors import ConfigError, ModelError, OctavoError

EXIT_FAILED = 1
EXIT_CONFIG = 2  # a setting, a flag or a model that cannot be
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # an unknown flag, a value of the wrong type, ...

VERBS = ("serve", "top", "chat", "complete", "run-batch", "simulate", "replay", "program", "pull", "doctor", "bench")


def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """Only `--version` lives here; everything else is a verb."""
    if version:
        typer.echo(f"octavo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def make_app(verbs: Sequence[str] = VERBS) -> typer.Typer:
    """The command with some of its verbs: what only the others need is not imported."""
    app = typer.Typer(
        cls=Verbs,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Octavo serves language models: an OpenAI-compatible server, a chat in the terminal, benchmarks.",
        epilog=(
            "octavo serve     serve the default model on http://127.0.0.1:8000/v1\n\n"
            "octavo chat      talk to it here, without a server\n\n"
            "octavo doctor    what this machine lacks, and the command that fixes it"
        ),
    )
    app.callback(invoke_without_command=True)(root)
    for verb in verbs:
        module = import_module(f"octavo.cli.{verb.replace('-', '_')}")
        if verb == "bench":
            app.add_typer(module.app, name=verb)
        else:
            add_verbs(app, module)
    return app


def run(args: Sequence[str]) -> int:
    """Runs a command line and returns its exit status. Errors are one line; `--log-level debug` adds the traceback."""
    try:
        app = make_app(args[:1] if args and args[0] in VERBS else VERBS)
        status = app(args=list(args), prog_name="octavo", standalone_mode=False)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        say_error(f"{_one_line(error)}  ({context.command_path if context else 'octavo'} --help lists the flags)")
        return EXIT_CONFIG
    except OctavoError as error:
        if logging.getLogger("octavo").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        say_error(str(error))
        return EXIT_CONFIG if isinstance(error, ConfigError | ModelError) else EXIT_FAILED
    except typer.Abort:
        status = EXIT_INTERRUPTED
    except BrokenPipeError:  # who read our stdout has left; nothing more can be said there
        sys.stderr.close()
        return EXIT_FAILED
    if status == EXIT_INTERRUPTED:  # what typer makes of a Ctrl-C
        say("Interrupted.")
    return status if isinstance(status, int) else 0


def _one_line(error: BaseException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(str(message).replace("Value error, ", "").split())
