"""The file between a machine and its simulation: step costs and pool, measured once, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
    typical_error: float  # median of |predicted / measured - 1| over the steps

    @classmethod
    def of(cls, model: str, core: EngineCore, timed: list[tuple[StepWork, float]]) -> Costs:
        """From steps of `core` that timed_steps() ran. Steps that something else held up count: a run has them, too,
        and who waits in a queue waits for the mean step, not for the typical one."""
        cost = fit(timed)
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
            num_steps=len(timed),
            typical_error=errors[len(errors) // 2],
        )

    @property
    def machine(self) -> Machine:
        """What the simulator needs."""
        return Machine(self.seconds, self.num_blocks, self.max_model_len)

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
            cost = CostModel(**{f.name: float(raw["seconds"][f.name]) for f in fields(CostModel)})
            if not all(math.isfinite(value) and value >= 0 for value in asdict(cost).values()):
                raise ValueError("a step cost is negative or no number")
            costs = cls(**{**raw, "seconds": cost})
            if min(costs.num_blocks, costs.block_size, costs.max_model_len) < 1:
                raise ValueError("num_blocks, block_size and max_model_len must be at least 1")
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: make it with octavo simulate --calibrate MODEL") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} holds no step costs ({error}): octavo simulate --calibrate makes it") from error
        return costs
