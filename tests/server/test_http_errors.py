"""Errors in OpenAI's shape, whatever layer they come from, and a stream that fails after it began."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine
from live_server import Server

from octavo.errors import EngineDeadError, QueueFullError, StepError, TimeLimitError

COMPLETION = {"prompt": "ab", "max_tokens": 8}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


def error_of(answer) -> dict:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    "content",
    [b'{"prompt": "a', b"[1,", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b"nonsense"],
)
def test_what_is_not_json(shared: Server, content: bytes) -> None:
    answer = shared.http.post("/v1/completions", content=content, headers=JSON)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "missing_required_parameter"),
        (b"[1]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),  # half a character
        (b'{"prompt": "a", "temperature": NaN}', "invalid_value"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_value"),
    ],
)
def test_json_that_is_no_request(shared: Server, content: bytes, code: str) -> None:
    answer = shared.http.post("/v1/completions", content=content, headers=JSON)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)


def test_other_content_types_are_told_the_right_one(shared: Server) -> None:
    answer = shared.http.post("/v1/completions", data={"prompt": "a"})
    assert answer.status_code == 400
    assert "application/json" in error_of(answer)["message"]
    packed = shared.http.post("/v1/completions", content=b"", headers={**JSON, "content-encoding": "gzip"})
    assert (packed.status_code, error_of(packed)["code"]) == (400, "invalid_content_type")


def test_an_endless_head_is_not_read(shared: Server) -> None:
    url = shared.http.base_url
    answered = b""
    connection = socket.create_connection((url.host, url.port), timeout=20)
    with connection, contextlib.suppress(ConnectionError):  # it hangs up while we still send
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for number in range(64):
            connection.sendall(b"X-%d: " % number + b"a" * 65536 + b"\r\n")
        connection.sendall(b"\r\n")
        answered = connection.recv(4096)
    assert b"200 OK" not in answered
    assert shared.http.get("/health").status_code == 200


def test_a_long_path_is_not_sent_back(shared: Server) -> None:
    answer = shared.http.get("/" + "a" * 20_000)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "route_not_found")
    assert len(answer.content) < 1000


def test_unknown_route_and_wrong_method(shared: Server) -> None:
    answer = shared.http.get("/v1/nothing")
    assert (answer.status_code, error_of(answer)["type"]) == (404, "not_found_error")
    answer = shared.http.get("/v1/completions")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    for method, path in (("PUT", "/v1/completions"), ("PATCH", "/v1/chat/completions"), ("POST", "/health")):
        answer = shared.http.request(method, path)  # no body, so no type of one is missed
        assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed"), (method, path)
    assert shared.http.put("/v1/completions", content=b"x").status_code == 405
    answer = shared.http.post("/v1/completions")
    assert (answer.status_code, error_of(answer)["message"]) == (400, "the body is empty: send a JSON object")


def _chunks(size: int) -> Iterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(size // 100):
        yield b"x" * 100


def test_large_bodies_are_refused_announced_or_not(serve) -> None:
    server = serve(max_body_bytes=1000)
    for content in (b"x" * 2000, _chunks(2000)):
        answer = server.http.post("/v1/completions", content=content, headers=JSON)
        assert (answer.status_code, error_of(answer)["type"]) == (413, "request_too_large")
    assert server.http.post("/v1/completions", json=COMPLETION).status_code == 200


@pytest.mark.parametrize("sent", ["a b", "x" * 129, "", "ä"])
def test_unfit_request_ids_are_replaced(shared: Server, sent: str) -> None:
    answer = shared.http.get("/health", headers={"X-Request-Id": sent.encode()})
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (QueueFullError("the queue is full", retry_after=2.5), 429, "queue_full"),
        (TimeLimitError("the timeout has passed"), 408, "timeout"),
        (EngineDeadError("killed"), 503, "engine_dead"),
        (StepError("secret"), 500, None),
        (ZeroDivisionError("secret"), 500, None),
    ],
)
def test_failures_before_the_first_token_have_their_status(
    serve, stream: bool, failure: Exception, status: int, code: str | None
) -> None:
    server = serve(FakeEngine(fail_after=0, failure=failure))
    answer = server.http.post("/v1/completions", json={**COMPLETION, "stream": stream})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code)
    assert answer.headers.get("retry-after") == {429: "3", 503: "5"}.get(status)
    if status == 500:
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in error["message"]
        assert error["type"] == "server_error"
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cd"]])
@pytest.mark.parametrize("failure", [EngineDeadError("killed"), StepError("secret"), ZeroDivisionError("secret")])
def test_failures_in_a_stream_end_it_in_the_stream(serve, failure: Exception, prompt: str | list[str]) -> None:
    server = serve(FakeEngine(fail_after=2, failure=failure))
    answer = server.http.post("/v1/completions", json={**COMPLETION, "prompt": prompt, "stream": True})
    assert answer.status_code == 200
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert error["type"] == ("service_unavailable" if isinstance(failure, EngineDeadError) else "server_error")
    assert "secret" not in answer.text
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["text"]
    assert not server.engine.running


def test_a_dead_engine_is_told_by_health_and_refuses(serve) -> None:
    engine = FakeEngine()
    server = serve(engine)
    assert server.http.get("/health").json() == {"status": "ok"}
    engine.dead = "the engine process was killed by signal 9"
    for answer in (server.http.get("/health"), server.http.post("/v1/chat/completions", json=CHAT)):
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "engine_dead"
        assert "signal 9" in error_of(answer)["message"]
        assert answer.headers["retry-after"] == "5"


def test_token_ids_only(serve) -> None:
    server = serve(FakeEngine(has_text=False))
    body = {"prompt": [1, 2], "max_tokens": 3, "return_token_ids": True, "logprobs": 1}
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["token_ids"] == [99, 100, 101]
    assert choice["logprobs"]["tokens"] == ["token_id:99", "token_id:100", "token_id:101"]
    stream = server.http.post("/v1/completions", json={**body, "stream": True}).text
    assert '"token_ids":[99]' in stream
    for path, refused in (
        ("/v1/completions", {"prompt": "text"}),
        ("/v1/completions", {"prompt": [1], "stop": "x"}),
        ("/v1/completions", {"prompt": [1], "echo": True}),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": "text"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = server.http.post(path, json=refused)
        assert answer.status_code == 400
        assert "tokenizer" in error_of(answer)["message"]


def test_no_chat_without_a_template(serve) -> None:
    engine = FakeEngine()
    engine.chat_template = None
    answer = serve(engine).http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 400
    assert "--chat-template" in error_of(answer)["message"]
