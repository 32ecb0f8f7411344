"""`octavo pull`: fetch a model into the cache, or list what is there and what can be had."""

from __future__ import annotations

from typing import Annotated

import typer

from octavo.cli.help import Verb

_EXAMPLES = (
    "octavo pull                list aliases, and what is in the cache\n\noctavo pull gemma3-270m    fetch a model"
)


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command(cls=Verb, epilog=_EXAMPLES)(pull)


def pull(
    name: Annotated[str | None, typer.Argument(help="Alias or Hub repository; without it: list.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Folder to fetch into, instead of the cache.")] = None,
) -> None:
    """Fetch a model, or list what there is."""
