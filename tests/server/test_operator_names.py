"""What operators of vLLM know, name by name: its flags, and the metrics that its dashboards read."""

from __future__ import annotations

import re

import pytest
from fake_engine import FakeEngine
from inside import Inside
from typer.main import get_command

from octavo.cli.app import make_app

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
FLAGS = (
    "--served-model-name --tokenizer --revision --download-dir --load-format --dtype --max-model-len --quantization "
    "-q --trust-remote-code --seed --max-logprobs --block-size --gpu-memory-utilization --kv-cache-memory-bytes "
    "--kv-cache-dtype --num-gpu-blocks-override --enable-prefix-caching --no-enable-prefix-caching --max-num-seqs "
    "--max-num-batched-tokens --enable-chunked-prefill --long-prefill-token-threshold --scheduling-policy "
    "--max-num-queued-reqs --max-num-queued-tokens --async-scheduling --no-async-scheduling --enforce-eager "
    "--tensor-parallel-size --pipeline-parallel-size --attention-backend --reasoning-parser --tool-call-parser --host "
    "--port --api-key --ssl-keyfile --ssl-certfile --allowed-origins --chat-template --shutdown-timeout"
)
NO_FLAGS = (
    "--tokenizer-mode --hf-overrides --generation-config --override-generation-config --logprobs-mode "
    "--prefix-caching-hash-algo --cpu-offload-gb --kv-cache-metrics --kv-cache-metrics-sample --stream-interval "
    "--compilation-config -O --data-parallel-size --enable-expert-parallel --distributed-executor-backend "
    "--speculative-config --structured-outputs-config --enable-auto-tool-choice --enable-lora --lora-modules "
    "--max-loras --max-lora-rank --max-cpu-loras --limit-mm-per-prompt --allowed-media-domains "
    "--allowed-local-media-path --mm-processor-kwargs --uds --ssl-ca-certs --ssl-cert-reqs --root-path "
    "--chat-template-content-format --enable-request-id-headers --enable-per-request-metrics "
    "--enable-prompt-tokens-details --enable-force-include-usage --enable-server-load-tracking --enable-offline-docs "
    "--config --disable-log-stats --enable-log-requests --enable-log-outputs --max-log-len --log-config-file "
    "--disable-uvicorn-access-log --otlp-traces-endpoint --collect-detailed-traces --show-hidden-metrics-for-version "
    "--enable-mfu-metrics --cudagraph-metrics"
)


def test_flags_of_vllm() -> None:
    """Those that are here have its names; of the others the command line says which it does not know."""
    serve = get_command(make_app()).commands["serve"]
    flags = {flag for option in serve.params for flag in (*option.opts, *option.secondary_opts)}
    assert set(FLAGS.split()) <= flags
    assert not set(NO_FLAGS.split()) & flags, "move it to FLAGS"
    for flag in NO_FLAGS.split():
        with pytest.raises(Exception, match=f"No such option: {flag}"):
            serve.make_context("serve", [flag, "1"])


METRICS = (
    "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info prompt_tokens generation_tokens "
    "request_success num_preemptions prefix_cache_queries prefix_cache_hits external_prefix_cache_queries "
    "external_prefix_cache_hits prompt_tokens_cached prompt_tokens_recomputed admission_rejections "
    "time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_inference_time_seconds request_prompt_tokens request_generation_tokens request_params_n "
    "request_params_max_tokens iteration_tokens_total request_max_num_generation_tokens "
    "request_prefill_kv_computed_tokens"
)


def test_metrics_of_vllm() -> None:
    ask = Inside(FakeEngine(compat="vllm"))
    ask("POST", "/v1/chat/completions", json=CHAT)
    told = set(re.findall(r"# TYPE (\S+) ", ask("GET", "/metrics").text))
    for name in METRICS.split():
        for prefix in ("vllm:", "octavo:"):
            assert {prefix + name, f"{prefix}{name}_total"} & told, name
    assert {"http_requests_total", "http_request_duration_seconds"} <= told
