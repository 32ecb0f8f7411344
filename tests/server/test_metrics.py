"""The metrics page: parses, tells what it was told, and under vLLM's names too when asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from octavo.errors import ConfigError
from octavo.messages import StepRecord
from octavo.observe.metrics import Metrics
from octavo.outputs import RequestMetrics

NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prefix_cache_misses",
    "prefix_cache_evicted_tokens",
    "preempted_tokens",
    "forked_requests",
    "kv_cache_copied_tokens",
    "kv_cache_fragmentation_perc",
    "kv_cache_idle_tokens",
    "prompt_tokens_cached",
    "prompt_tokens_recomputed",
    "iteration_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "admission_rejections",
)
FINISHED = {"prompt_tokens": 30, "output_tokens": 5, "cached_tokens": 16, "max_tokens": 64}
TIMES = RequestMetrics(10.0, 11.0, 13.0, 13.25, 0.5)


def samples(metrics: Metrics) -> dict[str, float]:
    """Sample name and its own labels -> value."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            key = sample.name + "".join(f"|{v}" for v in labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def make(compat: str = "octavo") -> Metrics:
    return Metrics("m", cache_config={"block_size": "16"}, compat=compat)


def finish(metrics: Metrics, reason: str, **changes: object) -> None:
    times = replace(TIMES, **{name: changes.pop(name) for name in [*changes] if name.endswith("_time")})
    metrics.on_finished(reason, times, **{**FINISHED, **changes})


@pytest.mark.parametrize(("compat", "prefixes"), [("octavo", ["octavo:"]), ("vllm", ["octavo:", "vllm:"])])
def test_names(compat: str, prefixes: list[str]) -> None:
    families = {family.name for family in text_string_to_metric_families(make(compat).render().decode())}
    assert {prefix + name for prefix in ("octavo:", "vllm:") for name in NAMES} & families == {
        prefix + name for prefix in prefixes for name in NAMES
    }
    assert {
        "http_requests",
        "http_request_duration_seconds",
        "process_resident_memory_bytes",
        "python_info",
    } <= families


def test_unknown_compat_is_refused() -> None:
    with pytest.raises(ConfigError, match="tgi"):
        make("tgi")


def test_steps() -> None:
    metrics = make("vllm")
    record = StepRecord(1, 0.0, num_running=5, num_finished=2, num_waiting=4, num_tokens=100, num_preempted=1)
    record.num_used_blocks, record.num_cached_blocks, record.num_free_blocks = 3, 1, 6
    record.prefix_queries, record.prefix_hits = 20, 16
    metrics.on_steps([record, record])
    for prefix in ("octavo:", "vllm:"):
        found = {k.removeprefix(prefix): v for k, v in samples(metrics).items()}
        assert found["num_requests_running"] == 3
        assert found["num_requests_waiting"] == 4
        assert found["kv_cache_usage_perc"] == 0.3
        assert found["num_preemptions_total"] == 2
        assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (40, 32)
        assert (found["iteration_tokens_total_count"], found["iteration_tokens_total_sum"]) == (2, 200)
        assert found["iteration_tokens_total_bucket|64.0"] == 0
        assert found["iteration_tokens_total_bucket|128.0"] == 2
        assert found["cache_config_info|16"] == 1
    metrics.on_idle()
    assert samples(metrics)["octavo:num_requests_running"] == samples(metrics)["octavo:kv_cache_usage_perc"] == 0


def test_a_token_is_a_position_however_many_groups_its_kv_lies_in() -> None:
    """Of a request of 30 tokens in three groups all is copied out, evicted and copied back, and half of that copied."""
    metrics = Metrics("m", cache_config={"block_size": "16", "num_kv_groups": "3"})
    record = StepRecord(1, 0.0, num_running=1, num_used_blocks=6, num_idle_slots=2, num_evicted_blocks=6)
    record.num_saved_blocks, record.num_loaded_blocks, record.num_copied_blocks = 6, 6, 3
    metrics.on_steps([record])
    found = {k.removeprefix("octavo:kv_cache_"): v for k, v in samples(metrics).items()}
    assert found["octavo:prefix_cache_evicted_tokens_total"] == 32
    assert found["swapped_out_tokens_total"] == found["swapped_in_tokens_total"] == 32
    assert (found["copied_tokens_total"], found["idle_tokens"]) == (16, 2)
    assert found["fragmentation_perc"] == 2 / 32


def test_token_arrivals() -> None:
    metrics = make()
    metrics.on_tokens(11.0, None, 10.0, 1)
    metrics.on_tokens(11.4, 11.0, 10.0, 4)  # four tokens in 0.4 s: four gaps of 0.1
    found = samples(metrics)
    assert found["octavo:time_to_first_token_seconds_count"] == 1
    assert found["octavo:time_to_first_token_seconds_sum"] == 1.0
    assert found["octavo:inter_token_latency_seconds_count"] == 4
    assert found["octavo:inter_token_latency_seconds_sum"] == pytest.approx(0.4)
    assert found["octavo:inter_token_latency_seconds_bucket|0.075"] == 0
    assert found["octavo:inter_token_latency_seconds_bucket|0.15"] == 4
    assert found["octavo:generation_tokens_total"] == 5


def test_finished_requests_add_up() -> None:
    metrics = make()
    finish(metrics, "stop")
    metrics.on_answers(2, 7)
    found = {k.removeprefix("octavo:"): v for k, v in samples(metrics).items()}
    assert found["request_success_total|stop"] == 1
    assert found["request_success_total|length"] == 0
    assert found["e2e_request_latency_seconds_sum"] == 3.25
    assert found["request_queue_time_seconds_sum"] == 0.5
    assert found["request_prefill_time_seconds_sum"] == 0.5
    assert found["request_decode_time_seconds_sum"] == 2.0
    assert found["request_inference_time_seconds_sum"] == 2.5
    assert found["request_time_per_output_token_seconds_sum"] == 0.5  # two seconds for four gaps
    assert (found["prompt_tokens_total"], found["prompt_tokens_cached_total"]) == (30, 16)
    assert (found["request_prompt_tokens_sum"], found["request_generation_tokens_sum"]) == (30, 5)
    assert (found["request_params_n_sum"], found["request_params_max_tokens_sum"]) == (2, 64)
    assert found["request_max_num_generation_tokens_sum"] == 7
    assert found["request_prefill_kv_computed_tokens_sum"] == 14


def test_a_request_aborted_in_the_queue_has_no_phases() -> None:
    metrics = make()
    finish(metrics, "abort", output_tokens=0, first_token_time=None, last_token_time=None, max_tokens=None)
    found = samples(metrics)
    assert found["octavo:request_success_total|abort"] == 1
    assert found["octavo:e2e_request_latency_seconds_count"] == 1
    assert found["octavo:request_queue_time_seconds_count"] == found["octavo:prompt_tokens_total"] == 0


def test_token_buckets_hold_the_model_length() -> None:
    metrics = Metrics("m", cache_config={}, max_model_len=2048)
    name = "octavo:request_prompt_tokens_bucket|"
    bounds = [key.removeprefix(name) for key in samples(metrics) if key.startswith(name)]
    assert bounds[:4] == ["1.0", "2.0", "5.0", "10.0"]
    assert bounds[-3:] == ["2000.0", "5000.0", "+Inf"]


def test_the_page_moves_with_requests(serve) -> None:
    server = serve(FakeEngine(compat="vllm"))
    before = samples(server.engine.metrics)
    server.client.completions.create(model="fake", prompt="ab", max_tokens=5)
    server.http.get("/v1/models/nothing")
    page = server.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = samples(server.engine.metrics)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 5
    assert after["http_requests_total|/v1/completions|POST|2xx"] == 1
    assert after["http_requests_total|/v1/models/{model:path}|GET|4xx"] == 1
    assert after["http_request_duration_seconds_count|/v1/completions|POST"] == 1


def test_memory_is_told_in_tokens() -> None:
    metrics = make()
    for _ in range(2):
        record = StepRecord(0, 0.0, num_used_blocks=10, num_idle_slots=40, num_evicted_blocks=3, num_copied_blocks=2)
        record.prefix_queries, record.prefix_hits, record.num_preempted_tokens, record.num_forked = 100, 64, 48, 3
        metrics.on_steps([record])
    found = samples(metrics)
    told = {
        "prefix_cache_queries_total": 200,
        "prefix_cache_hits_total": 128,
        "prefix_cache_misses_total": 72,
        "prefix_cache_evicted_tokens_total": 96,
        "preempted_tokens_total": 96,
        "forked_requests_total": 6,
        "kv_cache_copied_tokens_total": 64,
        "kv_cache_fragmentation_perc": 0.25,
    }
    assert {name: found[f"octavo:{name}"] for name in told} == told
    metrics.on_idle()
    assert samples(metrics)["octavo:kv_cache_fragmentation_perc"] == 0.0
