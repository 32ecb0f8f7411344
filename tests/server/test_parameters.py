"""Each parameter, changed alone, changes the answer or what the engine is asked for, in the stated way.

A new field of the protocol without a row here fails the last test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fake_engine import EOS, FakeEngine
from live_server import Server

from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.server.protocol import ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
COMPLETION = {"prompt": "ab", "max_tokens": 8}

# parameter, value, what SamplingParams must hold then: name -> value
ENGINE_ROWS = [
    ("temperature", 0.5, {"temperature": 0.5}),
    ("temperature", 0, {"temperature": 0, "greedy": True}),
    ("top_p", 0.25, {"top_p": 0.25}),
    ("top_k", 7, {"top_k": 7}),
    ("min_p", 0.125, {"min_p": 0.125}),
    ("n", 3, {"n": 3}),
    ("seed", -5, {"seed": -5}),
    ("prompt_logprobs", 2, {"prompt_logprobs": 2}),
    ("stop", "xyz", {"stops": ["xyz"]}),
    ("stop", ["x", "y"], {"stops": ["x", "y"]}),
    ("stop_token_ids", [5, 6], {"stop_token_ids": [5, 6]}),
    ("include_stop_str_in_output", True, {"include_stop_str_in_output": True}),
    ("ignore_eos", True, {"ignore_eos": True}),
    ("min_tokens", 2, {"min_tokens": 2}),
    ("max_tokens", 3, {"max_tokens": 3}),
    ("presence_penalty", 1.5, {"presence_penalty": 1.5}),
    ("frequency_penalty", -1.5, {"frequency_penalty": -1.5}),
    ("repetition_penalty", 1.25, {"repetition_penalty": 1.25}),
    ("bad_words", ["no"], {"bad_words": ["no"], "has_rules": True}),
    ("allowed_token_ids", [97, 98], {"allowed_token_ids": [97, 98], "has_rules": True}),
    ("response_format", {"type": "json_object"}, {"structure": ("json_object", True)}),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        {"structure": ("json", {})},
    ),
    ("response_format", {"type": "text"}, {"structured_outputs": None}),
    ("structured_outputs", {"json": {"type": "array"}}, {"structure": ("json", {"type": "array"})}),
    ("structured_outputs", {"json": "{}"}, {"structure": ("json", "{}")}),
    ("structured_outputs", {"regex": "a+"}, {"structure": ("regex", "a+")}),
    ("structured_outputs", {"choice": ["a", "b"]}, {"structure": ("choice", ["a", "b"])}),
    ("structured_outputs", {"grammar": "start: A"}, {"structure": ("grammar", "start: A")}),
    ("structured_outputs", {"json_object": True}, {"structure": ("json_object", True)}),
    ("logit_bias", {"97": -100, "98": 5.5}, {"logit_bias": {97: -100, 98: 5.5}}),
    ("skip_special_tokens", False, {"skip_special_tokens": False}),
    ("use_beam_search", True, {"use_beam_search": True}),
    ("length_penalty", 1.0, {"length_penalty": 1.0}),
    ("early_stopping", False, {"early_stopping": False}),
    ("stream", True, {"output_kind": RequestOutputKind.DELTA}),
]
CHAT_ROWS = [
    ("max_completion_tokens", 8, {"max_tokens": 8}),
    ("logprobs", True, {"logprobs": 0}),
    ("n", 1, {"n": 1}),
]
COMPLETION_ROWS = [("logprobs", 4, {"logprobs": 4}), ("best_of", 3, {"n": 1, "best_of": 3})]

# parameter, value, what the first choice's text becomes; "defghijk" without it
TEXT_ROWS = [
    ("prompt", [1, 2], "cdefghij"),
    ("prompt", ["abc"], "efghijkl"),
    ("prompt", [[1]], "bcdefghi"),
    ("max_tokens", 2, "de"),
    ("seed", 1, "efghijkl"),
    ("stop", "fg", "de"),
    ("stop_token_ids", [ord("f")], "def"),
    ("echo", True, "abdefghijk"),
    ("add_special_tokens", False, "cdefghij"),
    ("truncate_prompt_tokens", 2, "cdefghij"),
    ("truncate_prompt_tokens", -1, "defghijk"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(FakeEngine())
    yield server
    server.close()


def told(params: SamplingParams, name: str) -> object:
    if name == "structure":
        return params.structured_outputs.chosen
    return getattr(params, name)


def post(server: Server, path: str, **body: object) -> dict:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return {} if body.get("stream") else answer.json()


@pytest.mark.parametrize(("name", "value", "expected"), [*ENGINE_ROWS, *COMPLETION_ROWS])
def test_completion_parameter_reaches_the_engine(server: Server, name: str, value: object, expected: dict) -> None:
    post(server, "/v1/completions", **{**COMPLETION, name: value})
    assert {key: told(server.engine.seen[-1].params, key) for key in expected} == expected


@pytest.mark.parametrize(("name", "value", "expected"), [*ENGINE_ROWS, *CHAT_ROWS])
def test_chat_parameter_reaches_the_engine(server: Server, name: str, value: object, expected: dict) -> None:
    post(server, "/v1/chat/completions", **{**CHAT, name: value})
    assert {key: told(server.engine.seen[-1].params, key) for key in expected} == expected


@pytest.mark.parametrize(("name", "value", "_"), [row for row in ENGINE_ROWS if row[0] not in ("n", "stream")])
def test_one_parameter_changes_nothing_else(server: Server, name: str, value: object, _: dict) -> None:
    post(server, "/v1/completions", **COMPLETION)
    plain = vars(server.engine.seen[-1].params).copy()
    post(server, "/v1/completions", **{**COMPLETION, name: value})
    changed = vars(server.engine.seen[-1].params)
    assert {key for key in plain if plain[key] != changed[key]} <= {
        "structured_outputs" if name == "response_format" else name,
        "stops",
    }


@pytest.mark.parametrize(("name", "value", "text"), TEXT_ROWS)
def test_completion_parameter_changes_the_text(server: Server, name: str, value: object, text: str) -> None:
    assert post(server, "/v1/completions", **COMPLETION)["choices"][0]["text"] == "defghijk"
    assert post(server, "/v1/completions", **{**COMPLETION, name: value})["choices"][0]["text"] == text


def test_best_of_shows_the_best(server: Server) -> None:
    """The fake's answers begin a letter later each and have better logprobs each."""
    answer = post(server, "/v1/completions", **COMPLETION, best_of=4, n=2)
    assert [(c["index"], c["text"], c["logprobs"]) for c in answer["choices"]] == [
        (0, "ghijklmn", None),
        (1, "fghijklm", None),
    ]
    assert answer["usage"]["completion_tokens"] == 32, "all four were generated"
    for body, word in (({"best_of": 2, "stream": True}, "streamed"), ({"best_of": 2, "n": 3}, "at least n")):
        refused = server.http.post("/v1/completions", json={**COMPLETION, **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")
        assert word in refused.json()["error"]["message"]


def test_truncation_lets_a_long_prompt_in(server: Server) -> None:
    long = {"prompt": "a" * 5000, "max_tokens": 2}
    assert server.http.post("/v1/completions", json=long).status_code == 400
    post(server, "/v1/completions", **long, truncate_prompt_tokens=100)
    assert server.engine.seen[-1].prompt == list(b"a" * 100)
    limit = server.engine.max_model_len
    for max_tokens, kept in ((1, limit - 1), (2, limit - 2), (20, limit - 20), (limit - 1, 1), (None, limit - 16)):
        post(server, "/v1/completions", **{**long, "max_tokens": max_tokens}, truncate_prompt_tokens=-1)
        assert len(server.engine.seen[-1].prompt) == kept
    chat = {"messages": [{"role": "user", "content": "a" * 5000}], "truncate_prompt_tokens": -1}
    for max_tokens, kept in ((20, limit - 20), (None, limit - 1)):
        post(server, "/v1/chat/completions", **chat, max_tokens=max_tokens)
        assert len(server.engine.seen[-1].prompt) == kept


@pytest.mark.parametrize(
    ("truncated", "max_tokens", "why"), [(0, 2, "the prompt is empty"), (-1, 128, "lower max_tokens to 127")]
)
def test_truncation_that_leaves_nothing_is_refused(server: Server, truncated: int, max_tokens: int, why: str) -> None:
    body = {"prompt": "a" * 300, "truncate_prompt_tokens": truncated, "max_tokens": max_tokens}
    refused = server.http.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_times_are_told(server: Server, path: str) -> None:
    body = CHAT if "chat" in path else COMPLETION
    expected = {"time_to_first_token_ms": 100, "generation_time_ms": 300, "queue_time_ms": 50, "mean_itl_ms": 300 / 7}
    expected["tokens_per_second"] = 20
    assert post(server, path, **body)["metrics"] == pytest.approx(expected)
    streamed = server.http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    last = json.loads(streamed.split("\n\n")[-3].removeprefix("data: "))
    assert last["metrics"] == pytest.approx(expected)
    assert last["usage"]["completion_tokens"] == 8


def test_load_and_server_info(server: Server) -> None:
    assert server.http.get("/load").json() == {"server_load": 0}
    assert server.http.get("/server_info").json()["version"]


def test_include_stop_str_in_output(server: Server) -> None:
    body = {**COMPLETION, "stop": "fg", "include_stop_str_in_output": True}
    assert post(server, "/v1/completions", **body)["choices"][0]["text"] == "defg"


def test_echo_in_a_stream_comes_first(server: Server) -> None:
    chunks = list(server.client.completions.create(model="fake", **COMPLETION, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "abdefghijk"
    assert chunks[0].choices[0].text == "ab"


def test_ignore_eos_goes_on(serve) -> None:
    server = serve(FakeEngine(answer=b"xy"))
    assert post(server, "/v1/completions", **COMPLETION)["usage"]["completion_tokens"] == 3
    ignoring = post(server, "/v1/completions", **COMPLETION, ignore_eos=True, return_token_ids=True)
    assert ignoring["choices"][0]["token_ids"] == [120, 121, *[EOS] * 6]


def test_return_token_ids(server: Server) -> None:
    choice = post(server, "/v1/completions", **COMPLETION, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == [256, 97, 98]
    assert choice["token_ids"] == list(b"defghijk")
    assert "token_ids" not in post(server, "/v1/completions", **COMPLETION)["choices"][0]
    chunks = list(
        server.client.chat.completions.create(model="fake", **CHAT, stream=True, extra_body={"return_token_ids": True})
    )
    assert chunks[0].prompt_token_ids == list(b"<user>hi\n<assistant>")
    assert [c.choices[0].token_ids for c in chunks[1:3]] == [[117], [118]]


def test_return_tokens_as_token_ids(server: Server) -> None:
    choice = post(server, "/v1/completions", **COMPLETION, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
    assert choice["logprobs"]["tokens"][:2] == ["token_id:100", "token_id:101"]


def test_top_logprobs(server: Server) -> None:
    content = post(server, "/v1/chat/completions", **CHAT, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"][
        "content"
    ]
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * 8
    assert server.engine.seen[-1].params.logprobs == 3


def test_request_id_names_the_answer(server: Server) -> None:
    assert post(server, "/v1/completions", **COMPLETION, request_id="mine")["id"] == "cmpl-mine"
    answer = server.http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "yours.1"})
    assert answer.headers["x-request-id"] == "yours.1"
    assert answer.json()["id"] == "chatcmpl-yours.1"


def test_equal_request_ids_do_not_meet_in_the_engine(server: Server) -> None:
    for _ in range(2):
        post(server, "/v1/completions", **COMPLETION, request_id="twice")
    assert server.engine.seen[-1].request_id != server.engine.seen[-2].request_id


def test_tenant_and_timeout_reach_the_engine(server: Server) -> None:
    post(server, "/v1/completions", **COMPLETION, user="alice", timeout=2.5)
    seen = server.engine.seen[-1]
    assert (seen.tenant, seen.timeout, seen.priority) == ("alice", 2.5, 0)
    post(server, "/v1/completions", **COMPLETION)
    assert (server.engine.seen[-1].tenant, server.engine.seen[-1].timeout) == ("", None)


def test_priority_is_honoured_or_refused(serve) -> None:
    server = serve(FakeEngine(policy="priority"))
    post(server, "/v1/chat/completions", **CHAT, priority=-3)
    assert server.engine.seen[-1].priority == -3
    for policy in ("fcfs", "fair", "slo"):
        answer = serve(FakeEngine(policy=policy)).http.post("/v1/completions", json={**COMPLETION, "priority": 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "priority"


def test_cache_salt_reaches_the_engine(server: Server) -> None:
    post(server, "/v1/completions", **COMPLETION, cache_salt="tenant")
    assert server.engine.seen[-1].cache_salt == "tenant"


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        ({}, "<user>hi\n<assistant>"),
        ({"add_special_tokens": True}, "\u0000<user>hi\n<assistant>"),
        ({"add_generation_prompt": False}, "<user>hi\n"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "<user>hi"),
        ({"chat_template_kwargs": {"shout": True}}, "<USER>HI\n<ASSISTANT>"),
        ({"chat_template_kwargs": {"a": None, "b": 1, "c": 0.5, "d": "x", "e": True}}, "<user>hi\n<assistant>"),
        ({"messages": [{"role": "developer", "content": "be"}]}, "<system>be\n<assistant>"),
        ({"messages": [{"role": "user", "content": "hi", "name": "Bo"}]}, "<user>Bohi\n<assistant>"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            "<user>a\nb\n<assistant>",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "<assistant>\n<assistant>"),
    ],
)
def test_what_the_template_makes_of_a_chat(server: Server, change: dict, prompt: str) -> None:
    post(server, "/v1/chat/completions", **{**CHAT, **change})
    expected = [256 if letter == "\u0000" else ord(letter) for letter in prompt]
    assert server.engine.seen[-1].prompt == expected


def test_null_is_the_default_everywhere(server: Server) -> None:
    post(server, "/v1/completions", **COMPLETION)
    plain = server.engine.seen[-1].params
    nullable = [name for name, field in CompletionRequest.model_fields.items() if field.default is None]
    post(server, "/v1/completions", **{**dict.fromkeys(nullable), **COMPLETION})
    assert server.engine.seen[-1].params == plain


def test_model_defaults_apply_where_a_request_is_silent(serve) -> None:
    server = serve(FakeEngine(generation_defaults={"temperature": 0.6, "top_p": 0.9, "top_k": 40}))
    post(server, "/v1/chat/completions", **CHAT, top_p=0.5)
    params = server.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 40)


def test_without_model_defaults_openai_s_hold(server: Server) -> None:
    post(server, "/v1/chat/completions", **CHAT)
    params = server.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)


def test_every_field_has_a_row() -> None:
    tested = {row[0] for row in [*ENGINE_ROWS, *CHAT_ROWS, *COMPLETION_ROWS, *TEXT_ROWS]}
    tested |= {"model", "stream_options", "messages", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids"}
    tested |= {
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "include_reasoning",
        "max_thinking_tokens",
    }  # in test_tools.py
    tested |= {
        "user",
        "priority",
        "timeout",
        "request_id",
        "cache_salt",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    }
    assert {*ChatRequest.model_fields, *CompletionRequest.model_fields} == tested
