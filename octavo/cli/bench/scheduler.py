"""`octavo bench scheduler`: what deciding a step costs, without a model."""

from dataclasses import replace
from typing import Annotated

import typer
from typer import Option

from octavo.cli.flags import engine_flags
from octavo.config import EngineConfig

EXAMPLES = (
    "octavo bench scheduler                                      256 running, 2000 waiting\n\n"
    "octavo bench scheduler --scheduling-policy slo --record-steps    with the recording of every decision"
)
MAX_REQUESTS = 100_000


@engine_flags(
    model_as="nothing", only=("scheduling_policy", "block_size", "enable_prefix_caching", "max_num_batched_tokens")
)
def scheduler(
    config: EngineConfig,
    running: Annotated[int, Option(help="Requests that decode.", metavar="N", min=1, max=MAX_REQUESTS)] = 256,
    waiting: Annotated[int, Option(help="Requests that wait.", metavar="N", min=0, max=MAX_REQUESTS)] = 2000,
    steps: Annotated[int, Option(help="Steps to time.", metavar="N", min=1, max=1_000_000)] = 1000,
    record_steps: Annotated[bool, Option("--record-steps", help="Record every decision meanwhile.")] = False,
) -> None:
    """Time the scheduler in a steady state: arrivals, admissions, block allocation, hashing, finishes, StepRecords and
    outputs are all in it; only the model is not.
    """
    from octavo.simulate.bench import SchedulerBench
    from octavo.simulate.outcome import percentile

    config = replace(config, max_num_batched_tokens=max(config.max_num_batched_tokens, 2 * running))
    times = SchedulerBench(config, running=running, waiting=waiting, record=record_steps).run(steps)
    typer.echo(typer.style(f"{'ms a step':20}{'p50':>9}{'p99':>9}", bold=True))
    rows = {"arrivals": times.add, "schedule": times.schedule, "update": times.update, "schedule+update": times.step}
    rows["all"] = [add + step for add, step in zip(times.add, times.step, strict=True)]
    for name, seconds in rows.items():
        typer.echo(f"{name:20}{1000 * percentile(seconds, 50):9.3f}{1000 * percentile(seconds, 99):9.3f}")
    typer.echo(
        f"schedule+update p50 {1000 * percentile(times.step, 50):.3f} ms: {running} running, {waiting} waiting, "
        f"{times.num_finished / steps:.1f} finished and arrived a step, {config.scheduling_policy}"
        + (", recorded" if record_steps else "")
    )
