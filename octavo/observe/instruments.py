"""Counters, gauges and histograms as plain Python numbers, cheap enough for every token.

prometheus_client's own instruments take a lock and walk their buckets per observation. Here one thread (the front's
event loop) writes, so an observation is a bisect and three additions; the library only renders, when it is scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Counter:
    """A number that only grows, per combination of label values."""

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, labels: tuple[str, ...] = ()) -> None:
        """Adds `amount`; `labels` are values in the order of the names."""
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        """What prometheus_client renders."""
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(prefix + self.name, self.help, labels=[*common, *self.labels])
        for labels, value in [*self.values.items()]:
            family.add_metric([*common.values(), *labels], value)
        return family


class Gauge:
    """A number that goes up and down."""

    def __init__(self, name: str, help: str, labels: dict[str, str] | None = None) -> None:
        self.name, self.help, self.labels = name, help, labels or {}
        self.value = 0.0

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        """What prometheus_client renders."""
        from prometheus_client.core import GaugeMetricFamily

        labels = {**common, **self.labels}
        family = GaugeMetricFamily(prefix + self.name, self.help, labels=list(labels))
        family.add_metric(list(labels.values()), self.value)
        return family


class Histogram:
    """How often a value fell at or below each bound, per combination of label values."""

    def __init__(self, name: str, help: str, bounds: Sequence[float], labels: Sequence[str] = ()) -> None:
        self.name, self.help, self.labels = name, help, tuple(labels)
        self.bounds = tuple(bounds)
        self.series: dict[tuple[str, ...], _Series] = {} if labels else {(): _Series(len(bounds) + 1)}

    def observe(self, value: float, count: int = 1, labels: tuple[str, ...] = ()) -> None:
        """Counts `value` `count` times."""
        series = self.series.get(labels)
        if series is None:
            series = self.series[labels] = _Series(len(self.bounds) + 1)
        series.counts[bisect_left(self.bounds, value)] += count
        series.total += value * count

    def family(self, prefix: str, common: dict[str, str]) -> Metric:
        """What prometheus_client renders: cumulative buckets."""
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(prefix + self.name, self.help, labels=[*common, *self.labels])
        bounds = [f"{float(bound)}" for bound in self.bounds] + ["+Inf"]
        for labels, series in [*self.series.items()]:
            buckets, below = [], 0
            for bound, count in zip(bounds, series.counts, strict=True):
                below += count
                buckets.append((bound, float(below)))
            family.add_metric([*common.values(), *labels], buckets, series.total)
        return family


class _Series:
    """One histogram's counts, bucket by bucket (not cumulative)."""

    __slots__ = ("counts", "total")

    def __init__(self, num_buckets: int) -> None:
        self.counts = [0] * num_buckets
        self.total = 0.0
