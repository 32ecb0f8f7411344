"""`octavo top`: the KV memory of a server, as it is now: each block, and who holds which."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from octavo.cli.client import Server, fetch_json

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLES = (
    "octavo top                        the server on this machine, until Ctrl-C\n\n"
    "octavo top http://gpu1:8000       another one\n\n"
    "octavo top --once > memory.txt    one frame as plain text"
)
LOOKS = {  # by state: what it is called, its cell and colour
    ".": ("free", "·", "bright_black"),
    "c": ("cached", "░", "yellow"),
    "1": ("held by one", "█", "green"),
    "s": ("shared", "▓", "magenta"),
}
SHARED = str.maketrans(dict.fromkeys("23456789+", "s"))
AGES = {"1 s": 0, "1 min": 6, "17 min": 10, "4.6 h": 14}  # less than 2 ** n seconds
ONCE = (100, 40)  # columns and lines of a frame that no terminal bounds


def top(
    url: Annotated[str, Argument(help="Address of the server.", metavar="[URL]")] = "http://127.0.0.1:8000",
    interval: Annotated[float, Option(help="Seconds between two looks.", min=0.2, max=3600, metavar="SECONDS")] = 1.0,
    once: Annotated[bool, Option("--once", help="Print one frame as plain text; so does a pipe.")] = False,
    api_key: Annotated[
        str | None,
        Option(help="An administrator's, where there are keys.", metavar="KEY", envvar="OCTAVO_ADMIN_API_KEY"),
    ] = None,
) -> None:
    """Watch the KV memory of a server: a map of its blocks, and the requests that hold most.

    A block is 16 tokens of KV (--block-size). Free ones hold nothing; cached ones hold a prefix that the next request
    may begin with; the others are held by one running request, or shared by several whose prompts begin alike.
    """
    server = Server.parse(url, api_key=api_key)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(server, interval, once or not sys.stdout.isatty()))


async def _watch(server: Server, interval: float, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    before = await _look(server)
    if once:
        await asyncio.sleep(interval)
        Console(width=ONCE[0], color_system=None, emoji=False).print(frame(before, await _look(server), *ONCE))
        return
    console = Console(emoji=False)
    with Live(frame(before, before, *console.size), console=console, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(interval)
            now = await _look(server)
            live.update(frame(before, now, *console.size), refresh=True)
            before = now


async def _look(server: Server) -> dict[str, Any]:
    return {**await fetch_json(server, "GET", "/memory"), "at": time.monotonic(), "url": server.url}


def frame(before: dict[str, Any], now: dict[str, Any], width: int, height: int) -> RenderableType:
    """One picture of what GET /memory told, `before` and `now`, in so many columns and lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    kinds = now["states"].translate(SHARED)
    counts, cached = Counter(kinds), [age for age, kind in zip(now["ages"], kinds, strict=True) if kind == "c"]
    in_cell = -(-len(kinds) // (width * max(height // 2, 3)))
    cells = [Counter(kinds[at : at + in_cell]).most_common(1)[0][0] for at in range(0, len(kinds), in_cell)]
    rows = [cells[at : at + width] for at in range(0, len(cells), width)]
    drawn = Text()
    for row in rows:
        for kind, run in groupby(row):
            drawn.append(LOOKS[kind][1] * len(list(run)), LOOKS[kind][2])
        drawn.append("\n")
    legend = Text("   ").join(Text(f"{cell} {name} {counts[kind]:,}", c) for kind, (name, cell, c) in LOOKS.items())
    legend.append(f"   a cell: most of {in_cell} blocks" if in_cell > 1 else "   a cell: 1 block")
    touched = ", ".join(f"{name} {sum(ord(age) - 48 <= n for age in cached):,}" for name, n in AGES.items())
    table = Table("request", "state", box=None, pad_edge=False, width=width, header_style="bold")
    for name in ("blocks", "shared", "prompt", "output", "preempted"):
        table.add_column(name, justify="right")
    for holder in now["holders"][: max(height - len(rows) - 8, 3)]:
        runs = zip(holder["blocks"][::2], holder["blocks"][1::2], strict=True)
        blocks = "".join(kinds[first : first + length] for first, length in runs)
        told = (holder[f"num_{what}"] for what in ("prompt_tokens", "output_tokens", "preemptions"))
        numbers = [f"{number:,}" for number in (len(blocks), blocks.count("s"), *told)]
        table.add_row(Text(holder["request_id"], overflow="ellipsis", no_wrap=True), holder["status"], *numbers)
    return Group(*_lines(before, now, counts), drawn, legend, f"cached blocks touched within {touched}\n", table)


def _lines(before: dict[str, Any], now: dict[str, Any], counts: Counter[str]) -> list[str]:
    """The state of the engine."""
    metrics, last = now["metrics"], before["metrics"]
    told = ("requests_running", "requests_waiting", "preemptions_total")
    running, waiting, preemptions = (metrics[f"num_{name}"] for name in told)
    tokens = metrics["generation_tokens_total"] - last["generation_tokens_total"]
    speed = tokens / max(now["at"] - before["at"], 1e-9)
    hits = metrics["prefix_cache_hits_total"] / max(metrics["prefix_cache_queries_total"], 1)
    num_blocks, held = counts.total(), counts["1"] + counts["s"]
    preempted = sum(holder["status"] == "preempted" for holder in now["holders"])
    return [
        f"octavo top   {now['url']}   {num_blocks:,} blocks of {now['block_size']} tokens",
        f"{speed:,.1f} tok/s   running {running:.0f}   waiting {waiting:.0f}, {preempted} preempted   "
        f"preemptions {preemptions:,.0f}",
        f"KV held {held / num_blocks:.1%}   host memory {metrics['cpu_cache_usage_perc']:.1%}   prefix hits {hits:.1%}",
        "",
    ]
