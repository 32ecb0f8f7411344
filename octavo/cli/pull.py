"""`octavo pull`: fetch a model into the cache, or list what is there and what can be had."""

from typing import Annotated

import typer

from octavo.cli.terminal import say, size_text

EXAMPLES = (
    "octavo pull                list aliases, and what is in the cache\n\noctavo pull gemma3-270m    fetch a model"
)


def pull(
    name: Annotated[str | None, typer.Argument(help="Alias or Hub repository; without it: list.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Folder to fetch into, instead of the cache.")] = None,
) -> None:
    """Fetch a model, or list what there is."""
    from octavo.models.hub import resolve_model

    if name is None:
        list_models(download_dir)
    else:
        files = resolve_model(name, revision=revision, download_dir=download_dir)
        typer.echo(files.path)


def list_models(download_dir: str | None) -> None:
    """The aliases: what each is, what fetching it costs, and which are here already."""
    from octavo.models.aliases import ALIASES
    from octavo.models.hub import cache_folder, cached_models
    from octavo.program.printer import line_up

    here = cached_models(download_dir)
    rows = [("alias", "download", "licence", "here", "what it is")]
    for alias in ALIASES.values():
        size = f"{size_text(alias.download_size)} {alias.registry}"
        rows.append((alias.name, size, alias.license, "yes" if alias.name in here else "-", alias.description))
    heading, *lines = line_up(rows, num_text_columns=len(rows[0])).split("\n")
    typer.echo("\n".join([typer.style(heading, bold=True), *lines]))
    say(f"\nCache: {cache_folder(download_dir)}", style="dim")
    say("Also: a Hugging Face folder, a .gguf file, or a Hub repository OWNER/NAME.", style="dim")
