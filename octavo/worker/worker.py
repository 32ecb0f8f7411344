"""One worker: loads its share of the model, plans memory, then runs steps. Knows nothing of queues or clients."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from octavo.config import PROMPT_ROWS, EngineConfig
from octavo.models.decoder import record
from octavo.models.reader import hold, read_spec
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.models.weights import open_weights
from octavo.program.program import Program
from octavo.runtime.base import Runtime, WeightSource
from octavo.runtime.choose import choose, choose_kv, choose_weights, create
from octavo.runtime.half import HalfWeights
from octavo.sampling_params import SamplingParams
from octavo.step import NewRow, ScheduledRow, SchedulerOutput
from octavo.worker.memory import Appetite, MemoryPlan, first_that_fits, free_memory, plan_memory
from octavo.worker.model_runner import ModelRunner
from octavo.worker.rows import Rows


@dataclass(slots=True)
class WorkerInfo:
    """What the engine must know of a loaded worker."""

    spec: ModelSpec
    plan: MemoryPlan
    runtime: str
    dtype: str  # "int8", or what --dtype came to
    kv_windows: tuple[int, ...] = (0,)  # per KV group, how far a token sees; 0: everything
    max_depth: int = 1  # steps that may be in flight
    host_copy_seconds: float = 0.0  # to copy a block to host memory, or back; 0 where there is none
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase


class Worker:
    """Loads in `start`; from then on `runner` runs steps."""

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self._config = config
        self._files = files
        self._runtime: Runtime | None = None
        self.runner: ModelRunner

    def start(self) -> WorkerInfo:
        """Reads the model, packs the weights, reserves KV, runs one step.

        Raises ModelError, ConfigError or MemoryPlanError, each with the numbers and the next step.
        """
        config, clock = self._config, _PhaseClock()
        held = hold(self._files)
        spec = read_spec(self._files, max_model_len=config.max_model_len)
        builds = config.attention_backend != "triton"
        name, dtype = choose(config.runtime, config.dtype, spec.stored_dtype, config.quantization, builds=builds)
        runtime = self._runtime = create(
            name, config.threads(), dtype, enforce_eager=config.enforce_eager, fusions=config.fusions,
            attention_backend=config.attention_backend, cuda_ops=config.cuda_ops,
        )  # fmt: skip
        weights = open_weights(self._files, spec, load_format=config.load_format, seed=config.seed)
        del held
        if dtype == "float16":
            weights = HalfWeights(weights)
        program = record(spec)
        appetite = Appetite(config.block_size)
        if not config.disable_hybrid_kv_cache_manager:
            program = program.with_kv_groups()
            appetite = Appetite(config.block_size, program.kv_windows, config.max_step_tokens)
        kv_dtype = choose_kv(config.kv_cache_dtype, dtype)
        ways = choose_weights(config.dtype, dtype, config.quantization)
        computed, plan = first_that_fits(ways, lambda way: self._plan(spec, program, appetite, weights, way, kv_dtype))
        if plan.max_model_len < spec.max_model_len:  # RoPE is fixed for the length that is really served
            spec = read_spec(self._files, max_model_len=plan.max_model_len)
            program = replace(record(spec), kv_layers=program.kv_layers)  # the groups that were planned with
        clock.ends("files")
        shown = runtime.load(
            program,
            weights,
            dtype=computed,
            max_num_tokens=config.max_num_batched_tokens,
            max_num_logits=config.max_num_seqs + PROMPT_ROWS,
            max_num_requests=config.max_num_seqs,
        )
        clock.ends("weights")
        runtime.rehearse(config.block_size, kv_dtype)
        if (left := runtime.free_bytes(config.gpu_memory_utilization)) is not None:
            plan = plan.measured(left)
        clock.ends("rehearsal")
        runtime.allocate_kv(plan.num_blocks, config.block_size, kv_dtype, plan.num_host_blocks)
        rows = Rows(config.max_num_seqs, spec.max_model_len, config.block_size, program.num_kv_groups)
        self.runner = ModelRunner(runtime, rows)
        clock.ends("kv cache")
        self._warm_up(program.num_kv_groups)
        clock.ends("warm-up")
        told = "int8" if computed == "int8" else dtype
        copy_seconds = self._time_host_copies(plan, program.num_kv_groups) if plan.num_host_blocks else 0.0
        clock.ends("host copies")
        return WorkerInfo(spec, plan, shown, told, appetite.windows, runtime.max_depth, copy_seconds, clock.seconds)

    @property
    def runtime(self) -> Runtime:
        """The loaded runtime."""
        assert self._runtime is not None, "start() first"
        return self._runtime

    def close(self) -> None:
        """Frees weights, KV and threads."""
        if self._runtime is not None:
            self._runtime.close()

    def _plan(
        self, spec: ModelSpec, program: Program, appetite: Appetite, weights: WeightSource, dtype: str, kv_dtype: str
    ) -> MemoryPlan:
        config, runtime = self._config, self.runtime
        on_device = runtime.free_bytes(config.gpu_memory_utilization)
        plan = MemoryPlan(
            free_bytes=free_memory() if on_device is None else on_device,
            on_device=on_device is not None,
            weight_bytes=runtime.weight_bytes(program, weights, dtype),
            arena_bytes=runtime.arena_bytes(program, config.max_num_batched_tokens, config.max_num_seqs + PROMPT_ROWS),
            block_bytes=runtime.kv_bytes_per_block(program, config.block_size, kv_dtype),
            kv_dtype=kv_dtype,
            appetite=appetite,
            max_model_len=spec.max_model_len,
        )
        return plan_memory(
            plan,
            max_num_seqs=config.max_num_seqs,
            len_is_fixed=config.max_model_len is not None,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            num_blocks_override=config.num_gpu_blocks_override,
            swap_bytes=int(config.swap_space * (1 << 30)),
            host_free_bytes=free_memory(),
        )

    def _time_host_copies(self, plan: MemoryPlan, num_groups: int) -> float:
        """Seconds of one block, measured on steps with many copies and with none; nothing is in the blocks yet."""
        num = min(16, plan.num_blocks, plan.num_host_blocks)
        out = [(block, plan.num_blocks + block) for block in range(num)]
        best: dict[int, float] = {}
        for copies in ([], [*out, *((host, block) for block, host in out)] * 32) * 3:
            began = time.perf_counter()
            self._warm_up(num_groups, copies)
            took = time.perf_counter() - began
            best[len(copies)] = min(took, best.get(len(copies), took))
        return max(best[64 * num] - best[0], 0.0) / (64 * num)

    def _warm_up(self, num_groups: int, copies: Sequence[tuple[int, int]] = ()) -> None:
        """One token through the real path; block 0 is free again afterwards, and nothing hashes it."""
        tables = tuple([0] for _ in range(num_groups))
        new = NewRow(0, "warm-up", 0, [0], 1, tables, 0, SamplingParams(temperature=0.0), frozenset(), 0)
        step = SchedulerOutput(step=0, new_rows=[new], scheduled=[ScheduledRow(0, "warm-up", 0, 0, 1, True)])
        step.num_tokens, step.copy_blocks = 1, list(copies)
        self.runner.execute(step)
        self.runner.sample()()


class _PhaseClock:
    """Names the time since the last phase ended, so that phases add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def ends(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = now - self._last
        self._last = now
