"""/tokenize, /detokenize, /version."""

from __future__ import annotations

import pytest
from live_server import Server

import octavo

HELLO = [104, 105]  # "hi", one token per byte


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "hi"}, [256, *HELLO]),
        ({"prompt": "hi", "add_special_tokens": False}, HELLO),
        ({"messages": [{"role": "user", "content": "hi"}]}, list(b"<user>hi\n<assistant>")),
        (
            {"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": True},
            [256, *b"<user>hi\n<assistant>"],
        ),
        ({"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}, list(b"<user>hi\n")),
    ],
)
def test_tokenize(shared: Server, body: dict, tokens: list[int]) -> None:
    answer = shared.http.post("/tokenize", json=body).json()
    assert answer == {"count": len(tokens), "max_model_len": 128, "tokens": tokens, "token_strs": None}


def test_token_strings(shared: Server) -> None:
    answer = shared.http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["<bos>", "h", "i"]


def test_a_long_text_is_tokenised_whole(shared: Server) -> None:
    assert shared.http.post("/tokenize", json={"prompt": "x" * 100_000}).json()["count"] == 100_001


def test_detokenize(shared: Server) -> None:
    assert shared.http.post("/detokenize", json={"tokens": [256, *HELLO]}).json() == {"prompt": "<bos>hi"}
    assert shared.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [999]}, "tokens"),
        ("/detokenize", {"tokens": "hi"}, "tokens"),
    ],
)
def test_wrong_bodies(shared: Server, path: str, body: dict, param: str) -> None:
    answer = shared.http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_version(shared: Server) -> None:
    assert shared.http.get("/version").json() == {"version": octavo.__version__}
