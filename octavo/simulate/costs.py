"""The file between a machine and its simulation: step costs and pool, measured once, as JSON."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.scheduler.cost import CostModel, StepWork, fit
from octavo.simulate.simulator import Machine

Size = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """A calibrated machine, and how well the model fits the steps it was made from."""

    model: str
    runtime: str  # "native (avx512, 2 threads)"
    dtype: str
    num_blocks: Size
    block_size: Size
    max_model_len: Size
    seconds: CostModel
    num_steps: int  # timed
    kv_windows: Annotated[tuple[Count, ...], Meta(min_length=1)] = (0,)  # per KV group
    block_bytes: Count = 0  # 0: not known
    format: Literal["octavo-costs-1"] = "octavo-costs-1"
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

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Reads the file. Raises ConfigError for one that is missing, of another format, or holds no sane numbers."""
        try:
            costs = msgspec.json.decode(path.read_bytes(), type=cls)
            if min(astuple(costs.seconds)) < 0 or not costs.seconds.seconds(StepWork(1, 1, 1, 0)):
                raise ValueError("a step takes no time, or a part of it less than none")
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: make it with octavo simulate --calibrate MODEL") from None
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise ConfigError(f"{path} holds no step costs ({error}): octavo simulate --calibrate makes it") from error
        return costs
