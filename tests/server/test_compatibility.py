"""What clients of OpenAI, Anthropic and vLLM know, name by name: it works, or it is refused by its name.

The tables are the walk. What works is a 200, and what it then does is in test_parameters.py. What is refused is a 400
with its name, and reaches no engine. A route that is not here is told as such. docs/api.md says the same.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from inside import Inside

from octavo.errors import EngineDeadError, QueueFullError, TimeLimitError
from octavo.server.keys import KeyEntry, Keyring
from octavo.server.tools import TOOL_PARSERS

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "time"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "description": "b", "schema": {}, "strict": True}}
STREAM = {"stream": True}
UNFINISHED = {"add_generation_prompt": False}

# name, value, what else the body has then
SHARED_WORKS = [
    ("model", "fake", {}),
    ("frequency_penalty", 0.5, {}),
    ("logit_bias", {"97": 1}, {}),
    ("max_tokens", 2, {}),
    ("n", 2, {}),
    ("presence_penalty", 0.5, {}),
    ("response_format", {"type": "text"}, {}),
    ("response_format", {"type": "json_object"}, {}),
    ("response_format", SCHEMA, {}),
    ("seed", 1, {}),
    ("stop", "z", {}),
    ("stop", ["y", "z"], {}),
    ("stream", True, {}),
    ("stream_options", {"include_usage": True, "continuous_usage_stats": True}, STREAM),
    ("temperature", 0.5, {}),
    ("top_p", 0.5, {}),
    ("user", "me", {}),
    ("use_beam_search", True, {}),
    ("top_k", 5, {}),
    ("min_p", 0.1, {}),
    ("repetition_penalty", 1.1, {}),
    ("length_penalty", 1.1, {"use_beam_search": True}),
    ("early_stopping", True, {"use_beam_search": True}),
    ("stop_token_ids", [5], {}),
    ("include_stop_str_in_output", True, {}),
    ("ignore_eos", True, {}),
    ("min_tokens", 1, {}),
    ("skip_special_tokens", False, {}),
    ("spaces_between_special_tokens", True, {}),
    ("truncate_prompt_tokens", 5, {}),
    ("prompt_logprobs", 1, {}),
    ("allowed_token_ids", [97], {}),
    ("bad_words", ["no"], {}),
    ("add_special_tokens", True, {}),
    *(("structured_outputs", {kind: spec}, {}) for kind, spec in (("json", {}), ("regex", "a"), ("choice", ["a"]))),
    *(("structured_outputs", {kind: spec}, {}) for kind, spec in (("grammar", 'start: "a"'), ("json_object", True))),
    ("request_id", "mine", {}),
    ("return_tokens_as_token_ids", True, {"logprobs": 1}),
    ("return_token_ids", True, {}),
    ("cache_salt", "s", {}),
    ("timeout", 5.0, {}),
    ("priority", -1, {}),  # under --scheduling-policy priority; refused under others
]
SHARED_REFUSED = [
    ("response_format", {"type": "structural_tag"}),
    ("structured_outputs", {"structural_tag": "a"}),
    ("spaces_between_special_tokens", False),
    ("kv_transfer_params", {}),
    ("vllm_xargs", {"a": 1}),
    ("logits_processors", ["a"]),
    ("service_tier", "flex"),
    ("store", True),
    ("metadata", {"a": "b"}),
    ("prompt_cache_key", "a"),
    ("safety_identifier", "a"),
    ("prediction", {"type": "content", "content": "a"}),
    *(
        (f"guided_{kind}", "a") for kind in ("json", "regex", "choice", "grammar", "decoding_backend")
    ),  # vLLM's old ones
    ("return_progress", True),  # llama.cpp
    ("watermark", True),  # TGI
    ("lora_path", "a"),  # SGLang
]
CHAT_WORKS = [
    ("messages", [{"role": "user", "content": [{"type": "text", "text": "a"}]}], {}),
    ("logprobs", True, {}),
    ("top_logprobs", 2, {"logprobs": True}),
    ("max_completion_tokens", 2, {}),
    ("tools", [TOOL], {}),
    ("tool_choice", "none", {"tools": [TOOL]}),
    ("tool_choice", "auto", {"tools": [TOOL]}),
    ("tool_choice", "required", {"tools": [TOOL]}),
    ("tool_choice", NAMED, {"tools": [TOOL]}),
    ("parallel_tool_calls", False, {"tools": [TOOL]}),
    ("include_reasoning", False, {}),
    ("max_thinking_tokens", 5, {}),
    ("add_generation_prompt", False, {}),
    ("continue_final_message", True, UNFINISHED),
    ("chat_template_kwargs", {"shout": True}, {}),
]
CHAT_REFUSED = [
    ("reasoning_effort", "low"),
    ("verbosity", "low"),
    ("modalities", ["audio"]),
    ("audio", {"voice": "a", "format": "wav"}),
    ("web_search_options", {}),
    ("functions", [{"name": "a"}]),
    ("function_call", {"name": "a"}),
    ("echo", True),
    ("best_of", 2),
    ("documents", [{"text": "a"}]),
    ("chat_template", "{{ a }}"),
    ("mm_processor_kwargs", {"a": 1}),
]
COMPLETION_WORKS = [
    *(("prompt", prompt, {}) for prompt in ("a", ["a", "b"], [97], [[97], [98]])),
    ("best_of", 2, {}),
    ("echo", True, {}),
    ("logprobs", 2, {}),
]
COMPLETION_REFUSED = [("suffix", "a"), ("tools", [TOOL]), ("messages", [])]
EMBEDDING_WORKS = [
    *(("input", text, {}) for text in ("a", ["a", "b"], [97], [[97], [98]])),
    *(("encoding_format", kind, {}) for kind in ("float", "base64")),
    *(("pooling", kind, {}) for kind in ("last", "mean")),
    ("normalize", False, {}),
    ("truncate_prompt_tokens", 1, {}),
    ("user", "me", {}),
]
EMBEDDING_REFUSED = [("dimensions", 2), ("encoding_format", "int8")]
RESPONSE_WORKS = [
    ("input", [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], {}),
    ("instructions", "a", {}),
    ("max_output_tokens", 2, {}),
    ("metadata", {"a": "b"}, {}),
    ("store", False, {}),
    ("stream", True, {}),
    ("temperature", 0.5, {}),
    ("top_p", 0.5, {}),
    ("tools", [{"type": "function", "name": "time", "parameters": {}, "strict": True}], {}),
    ("tool_choice", "none", {}),
    ("parallel_tool_calls", True, {}),
    ("text", {"format": {"type": "json_object"}}, {}),
    ("truncation", "disabled", {}),
    ("user", "me", {}),
]
RESPONSE_REFUSED = [
    ("background", True),
    ("conversation", "a"),
    ("include", ["reasoning.encrypted_content"]),
    ("max_tool_calls", 1),
    ("prompt", {"id": "a"}),
    ("prompt_cache_key", "a"),
    ("reasoning", {"effort": "low"}),
    ("safety_identifier", "a"),
    ("service_tier", "flex"),
    ("stream_options", {"include_obfuscation": True}),
    ("tools", [{"type": "web_search"}]),
    ("top_logprobs", 2),
    ("truncation", "auto"),
]
USES = {"name": "time", "input_schema": {"type": "object"}}
MESSAGE_WORKS = [
    ("system", "be", {}),
    ("system", [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}], {}),
    ("stop_sequences", ["z"], {}),
    ("stream", True, {}),
    ("temperature", 0.5, {}),
    ("top_k", 5, {}),
    ("top_p", 0.5, {}),
    ("tools", [{**USES, "strict": True, "eager_input_streaming": True}], {}),
    *(("tool_choice", {"type": kind}, {"tools": [USES]}) for kind in ("auto", "any", "none")),
    ("tool_choice", {"type": "tool", "name": "time", "disable_parallel_tool_use": True}, {"tools": [USES]}),
    ("metadata", {"user_id": "me"}, {}),
    ("thinking", {"type": "enabled", "budget_tokens": 5}, {}),
    ("thinking", {"type": "disabled"}, {}),
    ("thinking", {"type": "adaptive"}, {}),
    ("output_config", {"format": {"type": "json_schema", "schema": {"type": "object"}}}, {}),
    ("cache_control", {"type": "ephemeral"}, {}),
    ("service_tier", "auto", {}),
]
MESSAGE_REFUSED = [
    ("container", "a"),
    ("mcp_servers", [{"type": "url"}]),
    ("output_config", {"effort": "low"}),
    ("thread", {"type": "create"}),
    ("service_tier", "priority"),
    ("tools", [{"type": "web_search_20250305", "name": "web_search"}]),
]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
BODIES: dict[str, tuple[dict, list, list]] = {
    "/v1/chat/completions": (CHAT, SHARED_WORKS + CHAT_WORKS, SHARED_REFUSED + CHAT_REFUSED),
    "/v1/completions": (
        {"prompt": "a", "max_tokens": 3},
        SHARED_WORKS + COMPLETION_WORKS,
        SHARED_REFUSED + COMPLETION_REFUSED,
    ),
    "/v1/embeddings": ({"input": "a"}, EMBEDDING_WORKS, EMBEDDING_REFUSED),
    "/v1/responses": ({"input": "a", "max_output_tokens": 3}, RESPONSE_WORKS, RESPONSE_REFUSED),
    "/v1/messages": ({**CHAT, "model": "fake"}, MESSAGE_WORKS, MESSAGE_REFUSED),
}


@pytest.fixture(scope="module")
def ask() -> Inside:
    """A server that has everything a request may need."""
    return Inside(FakeEngine(policy="priority"), tool_form=TOOL_PARSERS["hermes"], reasoning_parser="qwen3")


@pytest.mark.parametrize("path", BODIES)
def test_what_works(ask: Inside, path: str) -> None:
    body, works, _ = BODIES[path]
    for name, value, more in works:
        if name == "return_tokens_as_token_ids" and "chat" in path:
            more = {"logprobs": True}
        changed = {key: one for key, one in body.items() if (key, name) != ("max_tokens", "max_completion_tokens")}
        answer = ask("POST", path, json={**changed, **more, name: value})
        assert answer.status_code == 200, (name, value, answer.text)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_refused_is_named(ask: Inside, path: str) -> None:
    body, _, refused = BODIES[path]
    for name, value in refused:
        num_seen = len(ask.engine.seen)
        answer = ask("POST", path, json={**body, name: value})
        assert answer.status_code == 400, (name, answer.text)
        error = answer.json()["error"]
        named = error["message"] if path == "/v1/messages" else error["param"]  # Anthropic's shape has no param
        assert named.startswith(name) or (path == "/v1/messages" and name in named), (name, error)
        assert len(ask.engine.seen) == num_seen


def known_to_clients() -> dict[str, set[str]]:
    """Every parameter in the types of the official clients."""
    import anthropic.types.message_create_params as messages
    import openai.types.chat.completion_create_params as chat
    import openai.types.completion_create_params as completions
    import openai.types.embedding_create_params as embeddings
    import openai.types.responses.response_create_params as responses

    return {
        "/v1/chat/completions": set(chat.CompletionCreateParamsBase.__annotations__),
        "/v1/completions": set(completions.CompletionCreateParamsBase.__annotations__),
        "/v1/embeddings": set(embeddings.EmbeddingCreateParams.__annotations__),
        "/v1/responses": set(responses.ResponseCreateParamsBase.__annotations__),
        "/v1/messages": set(messages.MessageCreateParamsBase.__annotations__),
    }


@pytest.mark.parametrize("path", BODIES)
def test_nothing_that_the_clients_know_is_swallowed(ask: Inside, path: str) -> None:
    """A value that no parameter takes: whoever reads the parameter refuses it by name; none may pass."""
    names = known_to_clients()[path]
    assert len(names) > 4
    for name in sorted(names):
        answer = ask("POST", path, json={**BODIES[path][0], name: [{"no": [5]}]})
        assert answer.status_code == 400, (name, answer.text)
        assert name in answer.text


def test_the_page_tells_the_same() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z_0-9]+", page))
    for _, works, refused in BODIES.values():
        assert {row[0] for row in (*works, *refused)} - words == set()
    assert [path for path in ABSENT.split() if f"`{path}`" not in page] == []


ROUTES = {
    "POST": "/v1/completions /v1/chat/completions /v1/responses /v1/responses/{id}/cancel /v1/embeddings /v1/score "
    "/score /v1/messages /v1/messages/count_tokens /tokenize /detokenize",
    "DELETE": "/v1/responses/{id}",
    "GET": "/v1/models /v1/models/{model:path} /v1/responses/{id} /health /health/live /health/ready /health/progress "
    "/metrics /load /server_info /memory /version",
}
ABSENT = (
    "/v1/chat/completions/batch /v1/audio/transcriptions /v1/audio/translations /v1/realtime /v2/embed /rerank "
    "/v1/rerank /v2/rerank /classify /pooling /generative_scoring /ping /invocations /tokenizer_info "
    "/v1/load_lora_adapter /v1/unload_lora_adapter /inference/v1/generate /abort_requests /v1/completions/render "
    "/start_profile /stop_profile /scale_elastic_ep /reset_prefix_cache /pause /resume /is_paused /sleep /wake_up "
    "/is_sleeping /collective_rpc /update_weights /health_generate /generate /info /props /slots"
)


def test_routes(ask: Inside) -> None:
    there = {(method, re.sub(r"{\w+_id}", "{id}", route.path)) for route in ask.app.routes for method in route.methods}
    for method, paths in ROUTES.items():
        assert {(method, path) for path in paths.split()} <= there
    for path in ABSENT.split():
        answer = ask("POST", path, json={})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (404, "not_found_error", "route_not_found")
        assert path in error["message"]


ANSWERS = {  # what an answer carries: "a.b" is b in a, "a[]" the first of a list
    "/v1/chat/completions": "id object created model choices[].index choices[].message.role choices[].message.content "
    "choices[].finish_reason choices[].stop_reason choices[].logprobs usage.prompt_tokens usage.completion_tokens "
    "usage.total_tokens usage.prompt_tokens_details.cached_tokens metrics.time_to_first_token_ms "
    "metrics.generation_time_ms metrics.queue_time_ms metrics.mean_itl_ms metrics.tokens_per_second",
    "/v1/completions": "id object created model choices[].index choices[].text choices[].finish_reason usage metrics",
    "/v1/embeddings": "object data[].object data[].index data[].embedding model usage.prompt_tokens",
    "/v1/responses": "id object created_at status model output[].type output[].id output[].content[].text "
    "usage.input_tokens usage.input_tokens_details.cached_tokens usage.output_tokens_details.reasoning_tokens "
    "usage.total_tokens error "
    "incomplete_details instructions metadata parallel_tool_calls previous_response_id temperature tool_choice tools "
    "top_p",
    "/v1/messages": "id type role model content[].type content[].text stop_reason stop_sequence usage.input_tokens "
    "usage.output_tokens usage.cache_read_input_tokens usage.cache_creation_input_tokens",
}


@pytest.mark.parametrize("path", BODIES)
def test_answers_carry_every_field(ask: Inside, path: str) -> None:
    answer = ask("POST", path, json=BODIES[path][0], headers={"X-Request-Id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    for field in ANSWERS[path].split():
        value = answer.json()
        for part in field.split("."):
            value = value[part.removesuffix("[]")]
            value = value[0] if part.endswith("[]") else value


KEY = "key-0123456789ab"
# what is wrong with the body, what the engine raises, status, type and code, Anthropic's status and type
ERRORS = [
    ({"temperature": -1}, None, 400, "invalid_request_error", "invalid_value", 400, "invalid_request_error"),
    ({"temprature": 1}, None, 400, "invalid_request_error", "unsupported_parameter", 400, "invalid_request_error"),
    ({"max_tokens": 999}, None, 400, "invalid_request_error", "context_length_exceeded", 400, "invalid_request_error"),
    ({"model": "x"}, None, 404, "not_found_error", "model_not_found", 404, "not_found_error"),
    ({}, TimeLimitError("late"), 408, "timeout", "timeout", 408, "timeout_error"),
    ({}, QueueFullError("full", retry_after=2), 429, "rate_limit_error", "queue_full", 429, "rate_limit_error"),
    ({}, RuntimeError("ours"), 500, "server_error", None, 500, "api_error"),
    ({}, EngineDeadError("gone"), 503, "service_unavailable", "engine_dead", 529, "overloaded_error"),
]


@pytest.mark.parametrize(("change", "raised", "status", "kind", "code", "their_status", "their_kind"), ERRORS)
def test_errors(
    change: dict, raised: Exception | None, status: int, kind: str, code: str | None, their_status: int, their_kind: str
) -> None:
    ask = Inside(FakeEngine() if raised is None else FakeEngine(fail_after=0, failure=raised))
    answer = ask("POST", "/v1/chat/completions", json={**CHAT, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (status, kind, code)
    assert error.keys() == {"message", "type", "param", "code"}
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    theirs = ask("POST", "/v1/messages", json={**CHAT, "model": "fake", **change})
    body = theirs.json()
    assert (theirs.status_code, body["type"], body["error"]["type"]) == (their_status, "error", their_kind)
    assert body["request_id"] == theirs.headers["x-request-id"]


def test_errors_before_a_body_is_read() -> None:
    keyed, small = Inside(keyring=Keyring([KeyEntry(KEY)])), Inside(max_body_bytes=50)
    for path, other in (("/v1/chat/completions", 0), ("/v1/messages", 1)):
        for ask, headers, status, kind in (
            (keyed, {}, 401, "authentication_error"),
            (keyed, {"Authorization": "Bearer wrong-0123456789"}, 401, "authentication_error"),
            (small, {}, 413, "request_too_large"),
        ):
            answer = ask("POST", path, json=CHAT, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind), other
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
        assert keyed("POST", "/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
        answer = keyed("GET", "/metrics", headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


PROOFS = {  # a class of vulnerabilities of other servers: the test that shows that this one does not have it
    "pickle, dill, torch.load, eval": "unit/test_import_rules.py::test_nothing_unpickles_or_evaluates",
    "a template that runs code": "engine/test_template.py::test_what_a_template_may_not_do_ends_its_request_alone",
    "a template that takes for ever": "engine/test_template.py::test_one_call_that_takes_for_ever_is_killed",
    "a template of the request": "server/test_compatibility.py::test_what_is_refused_is_named",
    "a number, string or list without bound": "server/test_openapi_bounds.py::test_everything_is_bounded",
    "a head without end": "server/test_http_errors.py::test_an_endless_head_is_not_read",
    "a body without end": "server/test_http_errors.py::test_large_bodies_are_refused_announced_or_not",
    "a grammar that takes for ever": "engine/test_grammar.py::test_what_takes_too_long_is_killed",
    "a schema that nests without end": "engine/test_grammar.py::test_limits_are_checked_before_anything_is_built",
    "media fetched from an address": "server/test_refusals.py::test_other_content_parts",
    "a cache that tells of other tenants": "server/test_keys.py::test_tenants_share_no_prefixes",
    "a route without a key": "server/test_keys.py::test_every_route_asks_for_a_key",
    "an id that is an address": "server/test_http_errors.py::test_unfit_request_ids_are_replaced",
    "a file whose header lies": "model/test_gguf_file.py::test_lying_headers_are_refused_without_large_allocations",
    "one request that ends all": "e2e/test_faults.py::test_an_exception_in_one_requests_sampling_ends_it_alone",
    "a client that does not read": "e2e/test_faults.py::test_slow_and_half_open_clients_harm_nobody",
}


def test_every_class_of_vulnerabilities_has_its_test() -> None:
    for test in PROOFS.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test
