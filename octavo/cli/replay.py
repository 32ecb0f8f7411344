"""`octavo replay`: a recording of a scheduler's decisions, run again without a model."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from octavo.cli.simulate import say_figures
from octavo.cli.sizes import parse_size
from octavo.cli.terminal import progress, say, say_error, say_table
from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.simulate.replay import Divergence, Replay

EXIT_DIVERGED = 1
EXAMPLES = (
    "octavo replay FILE                                            does the scheduler decide the same again?\n\n"
    "octavo replay FILE --until 812                                what was going on at step 812?\n\n"
    "octavo replay FILE --what-if max_num_seqs=64                  the same requests under another setting\n\n"
    "octavo replay FILE --what-if scheduling_policy=slo,num_blocks=500"
)


def replay(
    file: Annotated[
        Path, Argument(help="engine-TIME-PID.jsonl of the folder that --record names, or that an engine's death told.")
    ],
    until: Annotated[
        int | None,
        Option(help="Stop after this step and show who runs, waits and holds blocks.", metavar="STEP", min=0),
    ] = None,
    what_if: Annotated[str | None, Option(help="Settings to change: name=value,name=value.", metavar="LIST")] = None,
) -> int:
    """Run the real scheduler again on a recording: no model, the same decisions bit for bit, or the first that differs.

    A recording holds lengths, times and digests under a key that it does not hold; no text and no token ids. With
    --what-if its requests are simulated under other settings, steps priced by a model fitted to the recorded ones.
    """
    from octavo.simulate.replay import Replay

    run = Replay(file)
    with progress("Replaying") as tell:
        divergence = run.run(until=until, tell=tell)
    if divergence is not None:
        _say_divergence(divergence)
        return EXIT_DIVERGED
    seconds = sum(taken for _, taken in run.steps)
    say(f"{len(run.steps)} steps, {len(run.requests)} requests, {seconds:.1f} s of steps: every decision is the same")
    if until is not None:
        _say_state(run)
    if what_if is not None:
        _say_what_if(run, what_if)
    return 0


def _say_divergence(found: Divergence) -> None:
    say_error(f"step {found.step} (line {found.line}) came out differently: {found.what}")
    say_table("", [("recorded", f"{found.recorded!r:.300}"), ("replayed", f"{found.replayed!r:.300}")])


def _say_state(run: Replay) -> None:
    """The Requests that are alive, and the pool."""
    scheduler = run.scheduler
    pool = scheduler.kv.pool
    say_table(
        f"Before step {scheduler.next_step}",
        [
            ("running", str(scheduler.num_running)),
            ("waiting", str(scheduler.num_waiting)),
            ("blocks used", f"{pool.num_used} of {pool.num_blocks}"),
            ("blocks cached", str(pool.num_cached)),
        ],
    )
    names = f"{'prompt':>8}{'output':>8}{'computed':>10}{'blocks':>8}{'preempted':>11}"
    header = f"{'request':32}{'status':>11}{'row':>5}{names}"
    typer.echo(typer.style(header, bold=True))
    alive: Iterable[Any] = (r for r in run.requests.values() if scheduler.find(r.request_id) is r)
    for request in alive:
        row = str(request.row) if request.row >= 0 else "-"
        typer.echo(
            f"{request.request_id[:31]:32}{request.status:>11}{row:>5}{request.num_prompt_tokens:8}"
            f"{request.num_output_tokens:8}{request.num_computed_tokens:10}"
            f"{request.num_slots // scheduler.kv.block_size:8}{request.num_preemptions:11}"
        )


def _say_what_if(run: Replay, changes: str) -> None:
    from octavo.simulate.simulator import simulate
    from octavo.simulate.trace import clipped

    if not run.steps:
        raise ConfigError("the recording holds no whole step: nothing to price other ones with")
    known = run.settings
    asked = _changes(changes, set(known) - {"kv_windows"})
    _refuse_unknowable(known, asked)
    scale = asked.get("block_size", known["block_size"]) / known["block_size"]
    for name in ("num_blocks", "num_host_blocks"):  # the same memory, unless that is changed too
        asked.setdefault(name, int(known[name] / scale) or min(known[name], 1))
    machine, config = run.setting({})
    other, changed = run.setting(asked)
    trace, num_left_out = clipped(run.trace(), min(machine.longest(config), other.longest(changed)))
    num_left_out += sum(request.params.use_beam_search for request in run.requests.values())
    if num_left_out:
        say(f"{num_left_out} requests that do not fit, or are beam searches, were left out", style="yellow")
    if not trace:
        raise ConfigError("no request of the recording fits")
    outcomes = {"as it was": simulate(trace, machine, config), "what if": simulate(trace, other, changed)}
    say(f"{len(trace)} requests, simulated twice; what if: {changes}")
    say_figures(outcomes, config)


def _refuse_unknowable(known: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises ConfigError for what a recording cannot tell, because it tells equal prompts by their blocks' digests."""
    size, new_size = known["block_size"], asked.get("block_size", known["block_size"])
    if new_size % size:
        raise ConfigError(
            f"--what-if block_size={new_size}: the recording tells what prompts share by blocks of {size} tokens, and "
            f"nothing finer: give a multiple of {size}"
        )
    if asked.get("num_host_blocks") and not (known["host_copy_seconds"] or "host_copy_seconds" in asked):
        raise ConfigError(
            "--what-if num_host_blocks: the engine ran without host memory, so the recording does not tell what a copy "
            "takes: give host_copy_seconds as well, of one block"
        )
    if asked.get("enable_prefix_caching") and not known["enable_prefix_caching"]:
        raise ConfigError(
            "--what-if enable_prefix_caching=true: the engine ran without a prefix cache, so the recording does not "
            "tell what prompts share"
        )


def _changes(text: str, known: set[str]) -> dict[str, Any]:
    """name=value,... as values of the settings' own types."""
    hints = typing.get_type_hints(EngineConfig) | {"num_blocks": int, "max_model_len": int, "num_host_blocks": int}
    hints["host_copy_seconds"] = float
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in known or not equals:
            raise ConfigError(f"--what-if {part.strip()!r:.60}: give name=value of {', '.join(sorted(known))}")
        try:
            if hints[name] is bool:
                values[name] = {"true": True, "false": False}[value.lower()]
            elif hints[name] is float:
                values[name] = float(value)
            else:
                values[name] = parse_size(value) if hints[name] is int else value
        except (ValueError, KeyError):
            raise ConfigError(f"--what-if {name}: {value!r:.60} is no {hints[name].__name__}") from None
    return values
