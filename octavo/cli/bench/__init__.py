"""`octavo bench`: throughput, latency and serve, with vLLM's flags, arithmetic and printed block; scheduler."""

from __future__ import annotations

import typer

from octavo.cli.bench import latency, scheduler, serve, throughput
from octavo.cli.help import Verbs


def register(app: typer.Typer) -> None:
    """Adds the verb and its kinds."""
    bench = typer.Typer(
        cls=Verbs, help="Measure: throughput and latency of an engine, a server under load, the scheduler alone."
    )
    for module in (throughput, latency, serve, scheduler):
        module.register(bench)
    bench.callback(invoke_without_command=True)(_help_without_kind)
    app.add_typer(bench, name="bench")


def _help_without_kind(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
