"""`octavo doctor`: what this machine has, and for each thing it lacks one sentence and one command."""

from __future__ import annotations

import typer

from octavo.cli.help import Verb


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command(cls=Verb)(doctor)


def doctor() -> None:
    """Check this machine: Python, compiler, kernels, cores, memory, cache, default model, port."""
