"""`octavo simulate`: what a trace of requests would see, without running the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, get_args

import typer
from typer import Option

from octavo.cli.files import write_json
from octavo.cli.flags import engine_flags, flag_name
from octavo.cli.terminal import progress, say, say_table
from octavo.config import EngineConfig, SchedulingPolicy
from octavo.errors import ConfigError
from octavo.simulate.trace import Arrival, Workload, clipped, read_trace

if TYPE_CHECKING:
    from octavo.simulate.costs import Costs
    from octavo.simulate.outcome import Outcome
    from octavo.simulate.simulator import Machine
    from octavo.simulate.validate import Comparison

CALIBRATION_SECONDS = 45.0
NUM_RUNS = 3
EXIT_OFF = 1  # a simulation further off than it may be
EXAMPLES = (
    "octavo simulate --calibrate smollm2                  time steps of the model here, into octavo-costs.json\n\n"
    "octavo simulate --load 1.2 --compare                 every policy at 120 % of what the machine can do\n\n"
    "octavo simulate --trace mooncake.jsonl --limit 500   somebody else's traffic on this machine\n\n"
    "octavo simulate --num-gpu-blocks-override 200        the same with a smaller KV cache\n\n"
    "octavo simulate --validate smollm2 --rate 3          is the simulation right? run both"
)


@dataclass(frozen=True, slots=True)
class TraceFlags:
    """Which requests."""

    panel: ClassVar[str] = "Trace"
    trace: Annotated[
        Path | None,
        Option(help="File instead of generated requests: .jsonl of Mooncake, .csv of BurstGPT.", metavar="FILE"),
    ] = None
    limit: Annotated[int, Option(help="Requests to take from the file.", metavar="N", min=1)] = 1000
    num_requests: Annotated[int, Option(help="Requests to generate.", metavar="N")] = 200
    rate: Annotated[float, Option(help="Requests a second.", metavar="X")] = 1.0
    load: Annotated[
        float | None, Option(help="Instead of --rate: a share of what the machine can do, such as 1.2.", metavar="X")
    ] = None
    burstiness: Annotated[float, Option(help="1: Poisson; below 1 requests come in clumps.", metavar="X")] = 1.0
    burst_size: Annotated[int, Option(help="Requests that arrive together.", metavar="N")] = 1
    prompt_median: Annotated[int, Option(help="Tokens; lengths are log-normal.", metavar="N")] = 128
    output_median: Annotated[int, Option(help="Tokens.", metavar="N")] = 64
    sigma: Annotated[float, Option(help="Spread of the lengths; 0: all equal.", metavar="X")] = 0.8
    shared_prefix: Annotated[int, Option(help="Tokens that all prompts begin with.", metavar="N")] = 0
    turns: Annotated[int, Option(help="Turns of a conversation; each repeats the ones before.", metavar="N")] = 1
    think_time: Annotated[float, Option(help="Mean seconds between turns.", metavar="X")] = 5.0
    num_tenants: Annotated[int, Option(help="Users that send.", metavar="N")] = 1
    tenant_skew: Annotated[float, Option(help="How uneven: user k sends (k + 1) ** -X as much.", metavar="X")] = 0.0
    num_priorities: Annotated[int, Option(help="Priorities, drawn evenly.", metavar="N")] = 1
    trace_seed: Annotated[int, Option(help="Another one gives other requests.", metavar="N")] = 0

    def workload(self) -> Workload:
        """The generated trace's description. Raises ConfigError for what cannot be."""
        shared = {f.name for f in fields(Workload)} & {f.name for f in fields(self)}
        return Workload(**{name: getattr(self, name) for name in shared}, seed=self.trace_seed)


@engine_flags(
    only=(
        *("revision", "download_dir", "load_format", "dtype", "runtime", "num_threads"),
        *("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size", "kv_cache_dtype"),
        *("swap_space", "disable_hybrid_kv_cache_manager"),
        *("enable_prefix_caching", "prefix_eviction_policy", "max_num_seqs", "max_num_batched_tokens"),
        *("admission_headroom", "long_prefill_token_threshold"),
        *("scheduling_policy", "priority_ageing", "slo_ttft_ms", "slo_itl_ms"),
        *("max_num_queued_reqs", "max_num_queued_tokens"),
    )
)
def simulate(
    config: EngineConfig,
    trace: TraceFlags,
    costs: Annotated[Path, Option(help="Step costs, made by --calibrate.", metavar="FILE")] = Path("octavo-costs.json"),
    calibrate: Annotated[bool, Option("--calibrate", help="Time steps of MODEL here and write --costs.")] = False,
    validate: Annotated[
        bool, Option("--validate", help="Run the trace on MODEL as well, and say how far the simulation is off.")
    ] = False,
    repeat: Annotated[
        int, Option(help="Times to run it: how far the machine differs from itself.", metavar="N", min=1, max=20)
    ] = NUM_RUNS,
    compare: Annotated[bool, Option("--compare", help="All scheduling policies side by side.")] = False,
    output: Annotated[Path | None, Option(help="Write the figures as JSON too.", metavar="FILE")] = None,
) -> int:
    """Run the real scheduler on a trace of requests, in virtual time: throughput, latencies, fairness, waste.

    Only the model is missing: a step takes what a linear model of its work says, fitted to steps timed on this machine
    (under a minute, once). Flags of the scheduler and the KV cache mean what they mean to octavo serve.
    """
    extra = {"compare": compare, "output": output is not None, "repeat": repeat != NUM_RUNS}
    _refuse_idle(config, trace, {name for name, value in extra.items() if value}, calibrate, validate)
    if calibrate or validate:
        return _with_engine(config, trace, costs, repeat if validate else 0, output)
    from octavo.simulate.costs import Costs
    from octavo.simulate.simulator import simulate as run

    measured = Costs.read(costs)
    machine = measured.machine(config)
    arrivals = _arrivals(trace, machine, config)
    policies = get_args(SchedulingPolicy) if compare else (config.scheduling_policy,)
    outcomes = {}
    with progress("Simulating", len(arrivals) * len(policies)) as tell:
        for place, policy in enumerate(policies):
            outcomes[policy] = run(
                arrivals,
                machine,
                replace(config, scheduling_policy=policy),
                tell=lambda done, place=place: tell(done + place * len(arrivals)),  # type: ignore[misc]
            )
    _say_outcomes(measured, arrivals, outcomes, config, output)
    return 0


def _refuse_idle(config: EngineConfig, trace: TraceFlags, extra: set[str], calibrate: bool, validate: bool) -> None:
    """Raises ConfigError for flags that would change nothing."""
    given = {f.name for part in (config, trace) for f in fields(part) if getattr(part, f.name) != f.default}
    given |= extra
    generated = {f.name for f in fields(trace)} - {"trace", "limit"}
    with_model = {"model", "revision", "download_dir", "load_format", "dtype", "runtime", "num_threads"}
    with_model |= {"kv_cache_dtype", "kv_cache_memory_bytes", "disable_hybrid_kv_cache_manager"}
    runs_model, only_calibrates = calibrate or validate, calibrate and not validate
    has_priorities = "compare" in given or config.scheduling_policy == "priority"
    for names, is_idle, why in (
        (with_model, not runs_model, "--calibrate and --validate run a model; else --costs names the machine"),
        ({*generated, "trace", "limit", "compare", "output"}, only_calibrates, "--calibrate runs no trace"),
        ({"repeat"}, not validate, "it is of --validate"),
        ({"compare"}, validate, "--validate is of one --scheduling-policy"),
        ({"turns"}, validate, "a later turn repeats answers that only a simulated model gives"),
        (generated, trace.trace is not None, "a trace file has its own requests and times"),
        ({"limit"}, trace.trace is None, "it is of --trace; generated are --num-requests"),
        ({"rate"}, trace.load is not None, "--load sets the rate"),
        ({"think_time"}, trace.turns == 1, "it is between --turns"),
        ({"tenant_skew"}, trace.num_tenants == 1, "it is between --num-tenants"),
        ({"priority_ageing"}, not has_priorities, "it is of policy priority"),
    ):
        if is_idle and (idle := given & names):
            flags = ", ".join(name.upper() if name == "model" else flag_name(name) for name in sorted(idle))
            raise ConfigError(f"{flags} would change nothing here: {why}; leave out what is not meant")


def _arrivals(trace: TraceFlags, machine: Machine, config: EngineConfig) -> list[Arrival]:
    """The requests that fit, at the rate or the load that was asked for."""
    from octavo.simulate.simulator import capacity

    given = read_trace(trace.trace, limit=trace.limit) if trace.trace else trace.workload().generate()
    longest = machine.longest(config)
    arrivals, num_left_out = clipped(given, longest)
    if not arrivals:
        raise ConfigError(f"none of the {len(given)} requests fits {longest} tokens: raise --max-model-len")
    if num_left_out:
        say(f"{num_left_out} requests longer than {longest} tokens were left out", style="yellow")
    if trace.load is not None:
        slower = trace.rate / (trace.load * capacity(arrivals, machine, config))
        arrivals = [replace(arrival, time=arrival.time * slower) for arrival in arrivals]
    return arrivals


def _with_engine(config: EngineConfig, trace: TraceFlags, path: Path, num_runs: int, output: Path | None) -> int:
    """Calibrates, and holds `num_runs` real runs of the trace against a simulation. The steps that calibrate are timed
    before, between and behind those, because machines drift."""
    from octavo.engine.calibrate import timed_steps
    from octavo.engine.llm import LLM
    from octavo.simulate.costs import Costs
    from octavo.simulate.real import run_real
    from octavo.simulate.simulator import simulate as run
    from octavo.simulate.validate import compare

    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    with LLM(**{**settings, "skip_tokenizer_init": True}) as llm:
        core, timed, measured = llm.core, [], []
        arrivals: list[Arrival] = []
        for number in range(num_runs + 1):
            with progress("Calibrating") as tell:
                timed += timed_steps(core, seconds=CALIBRATION_SECONDS / (num_runs + 1), tell=tell)
            costs = Costs.of(config.model, core, timed)
            if number < num_runs:
                arrivals = arrivals or _arrivals(trace, costs.machine(config), config)
                with progress(f"Running {number + 1}/{num_runs}", len(arrivals)) as tell:
                    measured.append(run_real(arrivals, core, salt=f"run {number}", tell=tell))
    write_json(path, asdict(costs))
    _say_costs(costs, path)
    if not measured:
        return 0
    return _say_comparison(compare(run(arrivals, costs.machine(config), config), *measured), costs, output)


def _say_comparison(rows: list[Comparison], costs: Costs, output: Path | None) -> int:
    """The comparison as a table; the exit status."""
    from octavo.simulate.validate import TOLERANCE

    say()
    say(f"{'':18}{'simulated':>12}{'measured':>12}{'off by':>10}{'runs differ':>13}", style="bold")
    for row in rows:
        figures = f"{row.simulated:12,.1f}{row.measured:12,.1f}{100 * row.error:+9.1f}%{100 * row.spread:11.1f}%"
        say(f"{row.name:18}{figures}", style=None if row.within else "red")
    say(f"within {100 * TOLERANCE:.0f} % is close enough; runs differ: from their mean, at most", style="dim")
    if output is not None:
        figures_of_rows = [{**asdict(r), "measured": r.measured, "error": r.error, "spread": r.spread} for r in rows]
        write_json(output, {"costs": asdict(costs), "figures": figures_of_rows})
    return 0 if all(row.within for row in rows if not row.name.startswith("ITL")) else EXIT_OFF


def _say_costs(costs: Costs, path: Path) -> None:
    names = {
        "fixed": "a step",
        "per_token": "a token",
        "per_row": "a sampled row",
        "per_position": "a KV position read",
        "per_pair": "a query-key pair of a prefill",
        "per_copy": "a block to or from host memory",
    }
    rows = [(names[name], f"{1e6 * seconds:12,.4f} µs") for name, seconds in asdict(costs.seconds).items()]
    say_table(f"{costs.model}, {costs.runtime}, {costs.dtype}", rows)
    say(f"{costs.num_steps} steps timed; half of them are predicted within {100 * costs.typical_error:.1f} %: {path}")


def _say_outcomes(
    costs: Costs, arrivals: list[Arrival], outcomes: dict[str, Outcome], config: EngineConfig, output: Path | None
) -> None:
    figures = figures_of(outcomes, config)
    span = arrivals[-1].time or 1.0
    say(
        f"{costs.model} on {costs.runtime}: {len(arrivals)} requests, {len(arrivals) / span:.2f} a second; "
        f"targets {config.slo_ttft_ms} ms to the first token, {config.slo_itl_ms} ms between tokens"
    )
    say_figures(outcomes, config)
    if output is not None:
        write_json(output, {"costs": asdict(costs), "num_requests": len(arrivals), "figures": figures})


def figures_of(outcomes: dict[str, Outcome], config: EngineConfig) -> dict[str, dict[str, float]]:
    """The figures of each outcome, goodput against the config's targets."""
    ttft, itl = config.slo_ttft_ms / 1000, config.slo_itl_ms / 1000
    return {name: outcome.figures(ttft=ttft, itl=itl) for name, outcome in outcomes.items()}


def say_figures(outcomes: dict[str, Outcome], config: EngineConfig) -> None:
    """A table, one column an outcome."""
    figures = figures_of(outcomes, config)
    typer.echo(typer.style(" " * 24 + "".join(f"{name:>12}" for name in figures), bold=True))
    for name in next(iter(figures.values())):
        digits = 3 if name == "Jain fairness" else 0 if name in ("preemptions", "refused") else 2
        typer.echo(f"{name:24}" + "".join(f"{values[name]:12,.{digits}f}" for values in figures.values()))
