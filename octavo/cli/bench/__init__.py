"""`octavo bench`: throughput, latency and serve, with vLLM's flags, arithmetic and printed block; scheduler."""

import typer

from octavo.cli.bench import latency, scheduler, serve, throughput
from octavo.cli.help import Verbs, add_verbs

app = typer.Typer(
    cls=Verbs, help="Measure: throughput and latency of an engine, a server under load, the scheduler alone."
)
add_verbs(app, throughput, latency, serve, scheduler)


@app.callback(invoke_without_command=True)
def _help_without_kind(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
