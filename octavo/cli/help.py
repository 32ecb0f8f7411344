"""The look of `--help`: names are never cut, flags stand in groups, defaults are said, examples end the page."""

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

MAX_WIDTH = 100
FLAG_WIDTH = 34  # the column of names; a longer name gets a line of its own
GENERAL = "General"
PANELS = (GENERAL, "Model", "Memory", "Scheduler", "Execution")  # these first, then a verb's own


class Verb(TyperCommand):
    """A command with our help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page to stdout."""
        typer.echo(page(self, ctx))


class Verbs(TyperGroup):
    """A group of commands with our help page."""

    format_help = Verb.format_help


def add_verbs(app: typer.Typer, *modules: ModuleType) -> None:
    """Adds the verb of each module: the function of the module's name, with its EXAMPLES at the end of the help."""
    for module in modules:
        verb = getattr(module, module.__name__.rpartition(".")[2])
        app.command(cls=Verb, epilog=getattr(module, "EXAMPLES", None))(verb)


def page(command: Any, ctx: Any) -> str:
    """The help of a command or a group."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    blocks = [f"{_title('Usage:')} {' '.join([ctx.command_path, *_usage(command)])}"]
    blocks += [textwrap.fill(paragraph, width) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]
    if commands := getattr(command, "commands", None):
        rows = [(name, _first_sentence(verb.help)) for name, verb in commands.items()]
        blocks.append(_block("Verbs", rows, width, _column(rows)))
    panels = _panels(command.params)
    column = _column([row for rows in panels.values() for row in rows])
    blocks += [_block(name, rows, width, column) for name, rows in panels.items()]
    if command.epilog:
        examples = (_example(line.strip(), width) for line in command.epilog.split("\n\n"))
        blocks.append("\n".join([_title("Examples"), *examples]))
    return "\n\n".join(blocks)


def _example(line: str, width: int) -> str:
    """A command and what it does, which stands below it where both are too long for a line."""
    command, _, note = line.partition("  ")
    return f"  {line}" if len(line) + 2 <= width else f"  {command}\n      {note.strip()}"


def _usage(command: Any) -> Iterator[str]:
    if getattr(command, "commands", None):
        yield "VERB"
    yield from (_argument_name(p) for p in command.params if p.param_type_name == "argument")
    yield "[flags]"


def _panels(params: Iterable[Any]) -> dict[str, list[tuple[str, str]]]:
    """(names, help) of the parameters by panel."""
    panels: dict[str, list[tuple[str, str]]] = {name: [] for name in PANELS}
    for param in params:
        if param.param_type_name == "argument":
            panels[GENERAL].append((_argument_name(param), _help(param)))
        else:
            panels.setdefault(getattr(param, "rich_help_panel", None) or GENERAL, []).append(
                (_option_names(param), _help(param))
            )
    panels[GENERAL].append(("--help, -h", "Show this page."))
    return {name: rows for name, rows in panels.items() if rows}


def _argument_name(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[]")
    return name if param.required else f"[{name}]"


def _option_names(param: Any) -> str:
    """`--seed N`; a switch that is on by default shows both its names, each on a line."""
    if _is_switch(param):
        both = [*param.opts, *param.secondary_opts] if param.default is True else param.opts
        return "\n".join(both)
    return f"{', '.join(param.opts)} {param.metavar or 'VALUE'}"


def _help(param: Any) -> str:
    shown = {True: "on", False: None}.get(param.default, param.default) if _is_switch(param) else param.default
    text = param.help or ""
    return text if shown is None else f"{text} [{shown}]"


def _is_switch(param: Any) -> bool:
    return bool(getattr(param, "is_flag", False))


def _first_sentence(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def _column(rows: list[tuple[str, str]]) -> int:
    lengths = (len(line) for names, _ in rows for line in names.split("\n"))
    return max(length for length in lengths if length <= FLAG_WIDTH) + 2


def _block(title: str, rows: list[tuple[str, str]], width: int, column: int) -> str:
    lines = [_title(title)]
    for names, text in rows:
        left = names.split("\n")
        right = textwrap.wrap(text, max(width - column - 2, 20)) or [""]
        if len(left[0]) > column - 2:
            right.insert(0, "")
        for index in range(max(len(left), len(right))):
            name = left[index] if index < len(left) else ""
            explanation = right[index] if index < len(right) else ""
            lines.append(f"  {name:<{column}}{explanation}".rstrip())
    return "\n".join(lines)


def _title(text: str) -> str:
    return typer.style(text, bold=True)
