"""POST /v1/embeddings and /v1/score through the official client: shapes, order, encodings, refusals."""

from __future__ import annotations

import math

import pytest
from inside import Inside
from live_server import Server


def unit(*values: float) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


LAST_A = unit(ord("a"), 2, 0)  # of "a" behind <bos>, as FakeEngine makes it


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])  # the client asks for base64 by itself
def test_embeddings(shared: Server, encoding_format: str | None) -> None:
    more = {} if encoding_format is None else {"encoding_format": encoding_format}
    answer = shared.client.embeddings.create(model="fake", input=["a", "bcd"], **more)
    assert answer.object == "list"
    assert [d.index for d in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 2 + 4
    if encoding_format != "base64":
        assert answer.data[0].embedding == pytest.approx(LAST_A)
        assert answer.data[1].embedding == pytest.approx(unit(ord("d"), 4, 0))


def test_how_it_is_pooled(shared: Server) -> None:
    body = {"input": [[1, 2], [3, 5, 7]], "pooling": "mean", "normalize": False}
    answer = shared.http.post("/v1/embeddings", json=body).json()
    assert [d["embedding"] for d in answer["data"]] == [[1.5, 2, 0], [5, 3, 0]]
    body = {"input": "abc", "normalize": False, "add_special_tokens": False, "truncate_prompt_tokens": 2}
    answer = shared.http.post("/v1/embeddings", json=body).json()
    assert answer["data"][0]["embedding"] == [ord("c"), 2, 0]
    assert shared.engine.seen[-1].params.max_tokens == 1


def test_many_prompts_come_back_in_their_order(shared: Server) -> None:
    prompts = [[n % 200] * (1 + n % 3) for n in range(150)]
    body = {"input": prompts, "normalize": False}
    answer = shared.http.post("/v1/embeddings", json=body).json()
    assert [d["embedding"][:2] for d in answer["data"]] == [[n % 200, 1 + n % 3] for n in range(150)]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores(shared: Server, path: str) -> None:
    body = {"text_1": "a", "text_2": ["a", "bcd"]}
    answer = shared.http.post(path, json=body).json()
    assert [(d["index"], d["object"]) for d in answer["data"]] == [(0, "score"), (1, "score")]
    cosine = sum(x * y for x, y in zip(LAST_A, unit(ord("d"), 4, 0), strict=True))
    assert [d["score"] for d in answer["data"]] == pytest.approx([1.0, cosine])
    assert answer["usage"]["prompt_tokens"] == 2 + 2 + 4
    pairs = shared.http.post(path, json={"text_1": ["a", "b"], "text_2": ["a", "b"]}).json()
    assert [d["score"] for d in pairs["data"]] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": "a", "dimensions": 2}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "pooling": "max"}, "pooling"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": "a" * 200}, "input"),
        ("/v1/embeddings", {"input": "a", "temperature": 1}, "temperature"),
        ("/v1/embeddings", {"input": "a", "priority": 1}, "priority"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
    ],
)
def test_refusals_name_the_parameter(path: str, body: dict, param: str) -> None:
    answer = Inside()("POST", path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
