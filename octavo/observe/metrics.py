"""Prometheus metrics of one engine, under vLLM's names with our prefix.

Fed by the front: StepRecords (counts of the engine), token arrivals and finished requests (times of the front's clock;
clocks of two processes are never subtracted). `compat="vllm"` repeats the engine's metrics under `vllm:`, so that
dashboards and autoscalers made for vLLM work unchanged. prometheus_client is imported when a page is rendered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from octavo.errors import ConfigError
from octavo.messages import StepRecord
from octavo.observe.instruments import Counter, Gauge, Histogram
from octavo.outputs import RequestMetrics
from octavo.request import FinishReason

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

# Bounds in seconds. The first three of PER_TOKEN are ours: a small model on a CPU needs 5 ms a token.
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
HTTP = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_ANSWERS = (1, 2, 5, 10, 20, 50, 100)
MAX_MODEL_LEN = 1 << 17
STEPS_AT_ONCE = 64


class Metrics:
    """Every number this engine can tell truthfully.

    Args:
        model_name: value of the label `model_name`.
        cache_config: labels of `cache_config_info`.
        compat: "vllm" repeats the engine's metrics under `vllm:`.
        max_model_len: where the token buckets end.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(
        self,
        model_name: str,
        *,
        cache_config: dict[str, str],
        compat: str = "octavo",
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        if compat not in ("octavo", "vllm"):
            raise ConfigError(f"metrics compat must be octavo or vllm, not {compat!r}")
        self._labels = {"model_name": model_name, "engine": "0"}
        self._prefixes = ("octavo:", "vllm:") if compat == "vllm" else ("octavo:",)
        self._registry: CollectorRegistry | None = None
        self._step = _StepMetrics(cache_config)
        self._records: list[StepRecord] = []  # not yet looked at
        self._request = _RequestMetrics(max_model_len)
        self._http_requests = Counter("http_requests", "HTTP requests by outcome.", ("handler", "method", "status"))
        self._http_seconds = Histogram(
            "http_request_duration_seconds", "Whole HTTP exchange, streams included.", HTTP, ("handler", "method")
        )

    def on_steps(self, records: Iterable[StepRecord]) -> None:
        """Takes what the engine counted in its latest steps. They are looked at many at a time, or when asked for: one
        by one, what that needs would never be in the caches."""
        self._records += records
        if len(self._records) >= STEPS_AT_ONCE:
            self._look()

    def on_idle(self) -> None:
        """Nothing runs and nothing waits: the last record's gauges no longer hold."""
        self._look()
        self._step.clear()

    def now(self) -> dict[str, float]:
        """The numbers of the page that a line about the engine tells, by name."""
        self._look()
        step = self._step
        counters = (step.preemptions, step.prefix_queries, step.prefix_hits, self._request.generation_tokens)
        gauges = (step.running, step.waiting, step.kv_usage, step.host_usage)
        return {g.name: g.value for g in gauges} | {f"{c.name}_total": c.values[()] for c in counters}

    def on_restart(self) -> None:
        """Another engine process took over."""
        self._step.restarts.add()

    def on_refused(self) -> None:
        """A request found the queue full."""
        self._request.rejections.add()

    def on_tokens(self, now: float, previous: float | None, arrival: float, count: int, times: int = 1) -> None:
        """Takes `count` tokens of each of `times` requests that arrived together; `previous` is when their last did."""
        request = self._request
        request.generation_tokens.add(count * times)
        if previous is None:
            request.first_token.observe(now - arrival, times)
        else:
            request.inter_token.observe((now - previous) / count, count * times)

    def on_answers(self, n: int, longest: int) -> None:
        """Takes a finished request: how many answers it asked for, and the tokens of the longest."""
        self._request.num_answers.observe(n)
        self._request.longest.observe(longest)

    def on_finished(
        self,
        reason: str,
        times: RequestMetrics,
        *,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int,
        max_tokens: int | None,
    ) -> None:
        """Takes one finished answer, and when it got how far."""
        request, arrival, queue_seconds = self._request, times.arrival_time, times.queue_seconds
        first_token, last_token = times.first_token_time, times.last_token_time
        request.success.add(1, (str(reason),))
        if max_tokens is not None:
            request.max_tokens.observe(max_tokens)
        request.end_to_end.observe((times.finished_time or time.monotonic()) - arrival)
        request.output_length.observe(output_tokens)
        if first_token is None or last_token is None:
            return
        request.prompt_tokens.add(prompt_tokens)
        request.cached_tokens.add(cached_tokens)
        request.prompt_length.observe(prompt_tokens)
        request.computed.observe(prompt_tokens - cached_tokens)
        request.queue.observe(queue_seconds)
        request.prefill.observe(max(0.0, first_token - arrival - queue_seconds))
        request.decode.observe(last_token - first_token)
        request.inference.observe(max(0.0, last_token - arrival - queue_seconds))
        if output_tokens > 1:
            request.per_token.observe((last_token - first_token) / (output_tokens - 1))

    def on_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Takes one HTTP exchange; `handler` is the route's template, so that labels stay few."""
        self._http_requests.add(1, (handler, method, f"{status // 100}xx"))
        self._http_seconds.observe(seconds, 1, (handler, method))

    def render(self) -> bytes:
        """The page that Prometheus scrapes (text format)."""
        from prometheus_client import generate_latest

        if self._registry is None:
            self._registry = self._make_registry()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at each scrape."""
        self._look()
        for prefix in self._prefixes:
            for metric in (*self._step.all(), *self._request.all()):
                yield metric.family(prefix, self._labels)
        yield self._http_requests.family("", {})
        yield self._http_seconds.family("", {})

    def _look(self) -> None:
        for record in self._records:
            self._step.add(record)
        self._records.clear()

    def _make_registry(self) -> CollectorRegistry:
        from prometheus_client import GCCollector, PlatformCollector, ProcessCollector
        from prometheus_client.registry import CollectorRegistry

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        return registry


class _Group:
    """Instruments that are filled together."""

    def all(self) -> Iterator[Counter | Gauge | Histogram]:
        """Every instrument, in the order of definition."""
        yield from (value for name, value in vars(self).items() if not name.startswith("_"))


class _StepMetrics(_Group):
    """What StepRecords tell."""

    def __init__(self, cache_config: dict[str, str]) -> None:
        self.running = Gauge("num_requests_running", "Requests that the last step left running.")
        self.waiting = Gauge("num_requests_waiting", "Requests waiting to be scheduled.")
        self.kv_usage = Gauge("kv_cache_usage_perc", "Share of KV blocks held by requests, 0 to 1.")
        self.info = Gauge("cache_config_info", "How the KV cache is set up; always 1.", cache_config)
        self.info.value = 1.0
        block_size, num_groups = (int(cache_config.get(name, "1")) for name in ("block_size", "num_kv_groups"))
        self._block_tokens = block_size / num_groups  # the KV of a token is in a block of each group: a share in each
        self.fragmentation = Gauge(
            "kv_cache_fragmentation_perc", "Share of the slots held by requests that hold no token yet, 0 to 1."
        )
        self.idle = Gauge("kv_cache_idle_tokens", "Tokens that the slots held by requests have room for, still empty.")
        self.restarts = Counter("engine_restarts", "Engine processes started after the first.")
        self.preemptions = Counter("num_preemptions", "Requests preempted to free blocks.")
        self.prefix_queries = Counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = Counter("prefix_cache_hits", "Prompt tokens found there.")
        self.prefix_misses = Counter("prefix_cache_misses", "Prompt tokens not found there.")
        self.evicted = Counter("prefix_cache_evicted_tokens", "Tokens of cached prefixes given up for others.")
        self.preempted = Counter("preempted_tokens", "Computed tokens thrown away by preemptions.")
        self.forked = Counter("forked_requests", "Answers and beams that began with another one's KV.")
        self.copied = Counter("kv_cache_copied_tokens", "Tokens of shared blocks copied on write.")
        self.host_queries = Counter("external_prefix_cache_queries", "Prompt tokens looked up in host memory.")
        self.host_hits = Counter("external_prefix_cache_hits", "Prompt tokens found there.")
        self.host_usage = Gauge("cpu_cache_usage_perc", "Share of the KV blocks in host memory in use, 0 to 1.")
        self.saved = Counter("kv_cache_swapped_out_tokens", "Tokens of evicted blocks copied to host memory.")
        self.loaded = Counter("kv_cache_swapped_in_tokens", "Tokens of blocks copied back.")
        self.recomputed = Counter("prompt_tokens_recomputed", "Tokens computed again after a preemption.")
        self.step_tokens = Histogram("iteration_tokens_total", "Tokens computed per engine step.", STEP_TOKENS)

    def add(self, record: StepRecord) -> None:
        """Adds one step."""
        self.running.value = max(0, record.num_running - record.num_finished)
        self.waiting.value = record.num_waiting
        num_blocks = record.num_used_blocks + record.num_free_blocks + record.num_cached_blocks
        self.kv_usage.value = record.num_used_blocks / num_blocks if num_blocks else 0.0
        self.preemptions.add(record.num_preempted)
        self.prefix_queries.add(record.prefix_queries)
        self.prefix_hits.add(record.prefix_hits)
        self.prefix_misses.add(record.prefix_queries - record.prefix_hits)
        held = record.num_used_blocks * self._block_tokens
        self.fragmentation.value = record.num_idle_slots / held if held else 0.0
        self.idle.value = record.num_idle_slots
        self.evicted.add(record.num_evicted_blocks * self._block_tokens)
        self.preempted.add(record.num_preempted_tokens)
        self.forked.add(record.num_forked)
        self.copied.add(record.num_copied_blocks * self._block_tokens)
        self.host_queries.add(record.host_queries)
        self.host_hits.add(record.host_hits)
        self.host_usage.value = record.host_usage
        self.saved.add(record.num_saved_blocks * self._block_tokens)
        self.loaded.add(record.num_loaded_blocks * self._block_tokens)
        self.recomputed.add(record.num_recomputed_tokens)
        self.step_tokens.observe(record.num_tokens)

    def clear(self) -> None:
        """Sets the gauges to those of an idle engine."""
        for gauge in (self.running, self.waiting, self.kv_usage, self.fragmentation, self.idle):
            gauge.value = 0.0


class _RequestMetrics(_Group):
    """What arrivals and endings of requests tell."""

    def __init__(self, max_model_len: int) -> None:
        tokens = _one_two_five(max_model_len)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of requests that reached a first token.")
        self.generation_tokens = Counter("generation_tokens", "Generated tokens.")
        self.cached_tokens = Counter("prompt_tokens_cached", "Prompt tokens whose KV was already there.")
        self.success = Counter("request_success", "Answers that ended, by reason.", ("finished_reason",))
        for reason in FinishReason:
            self.success.add(0, (str(reason),))  # a rate needs a first sample
        self.rejections = Counter("admission_rejections", "Requests refused because the queue was full.")
        self.first_token = Histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN)
        self.inter_token = Histogram("inter_token_latency_seconds", "Gap between tokens, pooled.", PER_TOKEN)
        self.per_token = Histogram(
            "request_time_per_output_token_seconds", "Mean gap between tokens of a request.", PER_TOKEN
        )
        self.end_to_end = Histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST)
        self.queue = Histogram("request_queue_time_seconds", "Arrival to first scheduling.", REQUEST)
        self.prefill = Histogram("request_prefill_time_seconds", "First scheduling to first token.", REQUEST)
        self.decode = Histogram("request_decode_time_seconds", "First to last token.", REQUEST)
        self.inference = Histogram("request_inference_time_seconds", "First scheduling to last token.", REQUEST)
        self.prompt_length = Histogram("request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.computed = Histogram("request_prefill_kv_computed_tokens", "Those whose KV was not there yet.", tokens)
        self.output_length = Histogram("request_generation_tokens", "Generated tokens per answer.", tokens)
        self.longest = Histogram("request_max_num_generation_tokens", "Tokens of a request's longest answer.", tokens)
        self.num_answers = Histogram("request_params_n", "The parameter n.", NUM_ANSWERS)
        self.max_tokens = Histogram("request_params_max_tokens", "The parameter max_tokens.", tokens)


def _one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to the first bound that holds `limit`."""
    bounds: list[int] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            bounds.append(digit * scale)
            if bounds[-1] >= limit:
                return bounds
        scale *= 10
