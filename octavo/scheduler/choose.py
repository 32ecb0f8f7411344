"""The policy that a config names."""

from octavo.config import EngineConfig
from octavo.scheduler.cost import CostModel
from octavo.scheduler.fair import FairPolicy
from octavo.scheduler.policies import FcfsPolicy, Policy, PriorityPolicy
from octavo.scheduler.slo import SloPolicy


def make_policy(config: EngineConfig, cost: CostModel | None = None) -> Policy:
    """The policy `config.scheduling_policy`; `cost` is what `slo` predicts steps with (until then, all are free)."""
    if config.scheduling_policy == "priority":
        return PriorityPolicy(config.priority_ageing)
    if config.scheduling_policy == "fair":
        return FairPolicy()
    if config.scheduling_policy == "slo":
        return SloPolicy(config.slo_ttft_ms / 1000, config.slo_itl_ms / 1000, cost or CostModel())
    return FcfsPolicy()
