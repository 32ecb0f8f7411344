"""The file between a machine and its simulation: step costs and pool, measured once, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.scheduler.cost import CostModel, StepWork, fit
from octavo.simulate.simulator import Machine

FORMAT = "octavo-costs-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """A calibrated machine, and how well the model fits the steps it was made from."""

    model: str
    runtime: str  # "native (avx512, 2 threads)"
    dtype: str
    num_blocks: int
    block_size: int
    max_model_len: int
    seconds: CostModel
    num_steps: int  # timed
    kv_windows: tuple[int, ...] = (0,)  # per KV group
    block_bytes: int = 0  # 0: not known
    typical_error: float  # median of |predicted / measured - 1| over the steps

    @classmethod
    def of(cls, model: str, core: EngineCore, timed: list[tuple[StepWork, float]]) -> Costs:
        """From steps of `core` that timed_steps() ran. Steps that something else held up count: a run has them, too,
        and who waits in a queue waits for the mean step, not for the typical one."""
        cost = replace(fit(timed), per_copy=core.info.host_copy_seconds)
        errors = sorted(abs(cost.seconds(work) / taken - 1.0) for work, taken in timed)
        ready = core.ready()
        return cls(
            model=model,
            runtime=ready.runtime,
            dtype=ready.dtype,
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            max_model_len=ready.max_model_len,
            seconds=cost,
            kv_windows=core.info.kv_windows,
            block_bytes=ready.kv_bytes // ready.num_blocks,
            num_steps=len(timed),
            typical_error=errors[len(errors) // 2],
        )

    def machine(self, config: EngineConfig) -> Machine:
        """What the simulator needs, with the sizes that the config gives.

        Raises ConfigError: --swap-space, and nobody timed copies to host memory.
        """
        scale = config.block_size / self.block_size
        if config.swap_space and not (self.block_bytes and self.seconds.per_copy):
            raise ConfigError(
                "--swap-space: copies to host memory were not timed; calibrate again, with --swap-space as well"
            )
        return Machine(
            replace(self.seconds, per_copy=self.seconds.per_copy * scale),
            config.num_gpu_blocks_override or int(self.num_blocks / scale),
            config.max_model_len or self.max_model_len,
            self.kv_windows,
            int(config.swap_space * (1 << 30) // (self.block_bytes * scale)) if config.swap_space else 0,
        )

    def write(self, path: Path) -> None:
        """Writes the file. Raises ConfigError where it cannot be written."""
        try:
            path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Reads the file. Raises ConfigError for one that is missing, of another format, or holds no sane numbers."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            cost = CostModel(**{f.name: float(raw["seconds"].get(f.name, f.default)) for f in fields(CostModel)})
            if not all(math.isfinite(value) and value >= 0 for value in asdict(cost).values()):
                raise ValueError("a step cost is negative or no number")
            if not cost.seconds(StepWork(1, 1, 1, 0)):
                raise ValueError("a step takes no time")
            windows = tuple(int(window) for window in raw.get("kv_windows", (0,)))
            costs = cls(**{**raw, "seconds": cost, "kv_windows": windows})
            if min(costs.num_blocks, costs.block_size, costs.max_model_len, len(windows)) < 1:
                raise ValueError("num_blocks, block_size, max_model_len and KV groups must be at least 1")
            if min(costs.block_bytes, *windows) < 0:
                raise ValueError("block_bytes and kv_windows must not be negative")
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: make it with octavo simulate --calibrate MODEL") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} holds no step costs ({error}): octavo simulate --calibrate makes it") from error
        return costs
