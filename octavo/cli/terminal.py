"""What the terminal sees: one console on stderr, errors as one line, numbers for people. stdout is for answers."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_IMPORTED_AT = time.monotonic()


@functools.cache
def console() -> Console:
    """The console on stderr: colours on a terminal, plain text elsewhere; long lines are never cut."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(text: str = "", *, style: str | None = None) -> None:
    """Prints a line on stderr; square brackets in it are text, not markup. A full disk behind it ends nothing."""
    with contextlib.suppress(OSError):
        console().print(text, style=style, markup=False)


def say_error(message: str) -> None:
    """The one line an error gets."""
    from rich.text import Text

    console().print(Text.assemble(("error: ", "bold red"), (message, "red")))


def say_table(title: str, rows: list[tuple[str, str]]) -> None:
    """A titled list of names and values, lined up."""
    from rich.text import Text

    width = max((len(name) for name, _ in rows), default=0)
    console().print(Text(title, "bold"))
    for name, value in rows:
        console().print(Text.assemble("  ", (f"{name:<{width}}", "dim"), "  ", value))


@contextlib.contextmanager
def progress(title: str, total: float = 1.0) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, which is told how much is done; nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def size_text(num_bytes: float) -> str:
    """Bytes for people: "98.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def process_age() -> float:
    """Seconds since this process was started; where the system does not say, since the command line was imported."""
    since_import = time.monotonic() - _IMPORTED_AT
    try:
        after_name = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): ticks after boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):
        return since_import
    return age if since_import <= age < since_import + 60 else since_import
