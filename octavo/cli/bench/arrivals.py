"""When requests are sent: a fixed rate with Poisson or Gamma gaps, a ramp, or all at once. Pure numbers, no clock.

Source of the Gamma arrivals and of the meaning of burstiness: Wang et al. 2024, BurstGPT; flags and arithmetic as in
vLLM's `bench serve`.
"""

import random
from math import inf
from typing import Literal

Ramp = tuple[Literal["linear", "exponential"], float, float]  # requests per second at the first one, and at the last


def send_times(
    num_requests: int, *, request_rate: float = inf, burstiness: float = 1.0, seed: int = 0, ramp: Ramp | None = None
) -> list[float]:
    """Seconds after the start at which each request is sent, ascending.

    Gaps are Gamma distributed with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, less is burstier, more
    is steadier, inf is a fixed gap. At a fixed rate the whole is scaled so that the last request is sent after
    num_requests / rate seconds: the offered load is exactly what was asked for.
    """
    draw = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for index in range(num_requests):
        rate = request_rate if ramp is None else ramp_rate(ramp, index / max(num_requests - 1, 1))
        if rate != inf:
            gap = 1 / rate
            now += gap if burstiness == inf else draw.gammavariate(burstiness, gap / burstiness)
        times.append(now)
    if ramp is None and request_rate != inf and now > 0:
        scale = num_requests / request_rate / now
        times = [t * scale for t in times]
    return times


def ramp_rate(ramp: Ramp, progress: float) -> float:
    """Requests per second when `progress` (0 to 1) of the requests were sent."""
    kind, start, end = ramp
    if kind == "linear":
        return start + (end - start) * progress
    return float(start * (end / start) ** progress)
