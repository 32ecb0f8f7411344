"""What is not honoured is refused by name, with 400; neutral values of it pass. Wrong values name their field."""

from __future__ import annotations

import pytest
from live_server import Server

from octavo.server import generation
from octavo.server.protocol import UNBUILT_CHAT, UNBUILT_SAMPLING, ChatRequest, CompletionRequest, Message

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"prompt": "ab", "max_tokens": 2}
PATHS = {"/v1/chat/completions": (CHAT, ChatRequest), "/v1/completions": (COMPLETION, CompletionRequest)}

REFUSED = {
    "spaces_between_special_tokens": False,
    "logits_processors": ["x"],
    "kv_transfer_params": {},
    "vllm_xargs": {"a": 1},
    "service_tier": "flex",
    "store": True,
    "metadata": {"a": "b"},
}
REFUSED_CHAT = {
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "best_of": 2,
    "echo": True,
    "modalities": ["text", "audio"],
    "reasoning_effort": "low",
    "verbosity": "low",
    "documents": [{"text": "x"}],
    "chat_template": "{{ x }}",
    "mm_processor_kwargs": {"a": 1},
}


def refused(server: Server, path: str, body: dict) -> dict:
    before = len(server.engine.seen)
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert len(server.engine.seen) == before
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_every_unbuilt_parameter_is_in_the_tables() -> None:
    assert set(REFUSED) == set(UNBUILT_SAMPLING)
    assert set(REFUSED_CHAT) == set(UNBUILT_CHAT)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_unbuilt_sampling_parameter(shared: Server, path: str, name: str, value: object) -> None:
    error = refused(shared, path, {**PATHS[path][0], name: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


@pytest.mark.parametrize(("name", "value"), REFUSED_CHAT.items())
def test_unbuilt_chat_parameter(shared: Server, name: str, value: object) -> None:
    error = refused(shared, "/v1/chat/completions", {**CHAT, name: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


@pytest.mark.parametrize(("name", "value"), [("suffix", "end"), ("tools", [])])
def test_unbuilt_completion_parameter(shared: Server, name: str, value: object) -> None:
    error = refused(shared, "/v1/completions", {**COMPLETION, name: value})
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)


@pytest.mark.parametrize("path", PATHS)
def test_neutral_values_pass(shared: Server, path: str) -> None:
    body, model = PATHS[path]
    for name, neutral in model.refused.items():
        for value in (None, *neutral):
            answer = shared.http.post(path, json={**body, name: value})
            assert answer.status_code == 200, (name, value, answer.text)
    assert shared.http.post(path, json={**body, "length_penalty": 1.0, "n": 1}).status_code == 200
    nothing = {**CHAT, "logprobs": False, "top_logprobs": 0}
    assert shared.http.post("/v1/chat/completions", json=nothing).status_code == 200


@pytest.mark.parametrize(("name", "value"), [("priority", False), ("length_penalty", True), ("use_beam_search", 0)])
def test_true_is_not_one(shared: Server, name: str, value: object) -> None:
    assert refused(shared, "/v1/completions", {**COMPLETION, name: value})["param"] == name


@pytest.mark.parametrize("name", ["function_call", "audio", "refusal", "annotations"])
def test_unbuilt_message_field(shared: Server, name: str) -> None:
    assert name in Message.refused
    error = refused(shared, "/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a", name: "x"}]})
    assert (error["code"], error["param"]) == ("unsupported_parameter", f"messages[0].{name}")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_other_content_parts(shared: Server, kind: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    error = refused(shared, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages[0].content[1].type")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"unknown": 1}, "unknown", "unsupported_parameter"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5.0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**40}, "max_tokens", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**6}, "n", "invalid_value"),
        ({"n": 128, "prompt": ["a"] * 9}, "n", "invalid_value"),
        ({"seed": 1 << 63}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_value"),
        ({"stop": "x" * 300}, "stop", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias.05.[key]", "invalid_value"),  # another spelling of 5
        ({"stop_token_ids": [5, 99999], "min_tokens": 1}, "stop_token_ids", "invalid_value"),
        ({"min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": 11}, "logprobs", "invalid_value"),  # above this server's max_logprobs
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
        ({"prompt_logprobs": 11}, "prompt_logprobs", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt[0]", "invalid_value"),
        ({"prompt": [5, "a"]}, "prompt[1]", "invalid_value"),
        ({"prompt": [300]}, "prompt", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": "", "add_special_tokens": False}, "prompt", "invalid_value"),
        ({"prompt": "a" * 128}, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * 100_000}, "prompt", "context_length_exceeded"),  # told from its length
        ({"max_tokens": 126}, "prompt", "context_length_exceeded"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unsupported_parameter"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "invalid_value",
        ),
        ({"request_id": "a b"}, "request_id", "invalid_value"),
        ({"user": "x" * 600}, "user", "invalid_value"),
    ],
)
def test_wrong_completion_value(shared: Server, change: dict, param: str, code: str) -> None:
    error = refused(shared, "/v1/completions", {**COMPLETION, **change})
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "raise"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 128}]}, "messages", "context_length_exceeded"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 11}, "top_logprobs", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_value"),
        ({"max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs.x", "invalid_value"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs", "invalid_value"),
    ],
)
def test_wrong_chat_value(shared: Server, change: dict, param: str, code: str) -> None:
    error = refused(shared, "/v1/chat/completions", {**CHAT, **change})
    assert (error["param"], error["code"]) == (param, code)


def test_a_missing_field_is_named(shared: Server) -> None:
    error = refused(shared, "/v1/completions", {"max_tokens": 1})
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")


def test_a_misspelt_field_is_told_what_it_may_have_meant(shared: Server) -> None:
    error = refused(shared, "/v1/chat/completions", {**CHAT, "temprature": 1})
    assert (error["param"], error["code"]) == ("temprature", "unsupported_parameter")
    assert error["message"].endswith("did you mean temperature?")
    nested = refused(shared, "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usages": 1}})
    assert nested["param"] == "stream_options.include_usages"
    assert nested["message"].endswith("did you mean include_usage?")
    for far in ("nonsense", "temperature" * 9, "x" * 100_000):
        assert refused(shared, "/v1/chat/completions", {**CHAT, far: 1})["message"].endswith("leave it out")


def test_an_answer_in_one_piece_has_a_bound_of_log_probabilities(shared: Server, monkeypatch) -> None:
    monkeypatch.setattr(generation, "MAX_LOGPROBS", 2 * 3 * 7 * (5 + 1))
    body = {"prompt": ["ab", "c"], "n": 3, "max_tokens": 7, "logprobs": 5}
    assert shared.http.post("/v1/completions", json=body).status_code == 200
    assert shared.http.post("/v1/completions", json={**body, "max_tokens": 8, "stream": True}).status_code == 200
    error = refused(shared, "/v1/completions", {**body, "max_tokens": 8})
    assert (error["param"], error["code"]) == ("logprobs", "invalid_value")
    assert "may have 288 log probabilities" in error["message"]
