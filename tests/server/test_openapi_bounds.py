"""Nothing in the OpenAPI file is unbounded: unbounded numbers, strings and lists are how servers are brought down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine

from octavo.server.app import create_app

DOCUMENT = create_app(FakeEngine(), served_model_names=["fake"]).openapi()


def schemas(node: object, path: str = "#") -> Iterator[tuple[str, dict]]:
    """Every schema in the document, with where it stands."""
    if isinstance(node, dict):
        if "type" in node and isinstance(node["type"], str):
            yield path, node
        for key, value in node.items():
            yield from schemas(value, f"{path}/{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from schemas(value, f"{path}/{number}")


def problem(schema: dict) -> str | None:
    kind = schema["type"]
    if kind in ("integer", "number"):
        low = schema.keys() & {"minimum", "exclusiveMinimum"}
        return None if low and schema.keys() & {"maximum", "exclusiveMaximum"} else "no minimum or no maximum"
    if kind == "string":
        return None if schema.keys() & {"maxLength", "enum", "const"} else "no maxLength"
    if kind == "array":
        return None if "maxItems" in schema else "no maxItems"
    if kind == "object" and schema.get("additionalProperties") is not False and "properties" not in schema:
        return None if "maxProperties" in schema else "no maxProperties"
    return None


def test_everything_is_bounded() -> None:
    found = list(schemas(DOCUMENT))
    assert len(found) > 80
    assert [(path, problem(schema)) for path, schema in found if problem(schema)] == []


@pytest.mark.parametrize(
    "schema", [{"type": "integer", "minimum": 0}, {"type": "string"}, {"type": "array"}, {"type": "object"}]
)
def test_the_walk_finds_what_is_not(schema: dict) -> None:
    assert problem(schema)


def test_bodies_are_closed() -> None:
    for name in (
        "ChatRequest",
        "CompletionRequest",
        "TokenizeRequest",
        "DetokenizeRequest",
        "Message",
        "EmbeddingRequest",
    ):
        assert DOCUMENT["components"]["schemas"][name]["additionalProperties"] is False


def test_routes() -> None:
    assert {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods} == {
        ("/v1/chat/completions", "post"),
        ("/v1/completions", "post"),
        ("/v1/responses", "post"),
        ("/v1/responses/{response_id}", "get"),
        ("/v1/responses/{response_id}/cancel", "post"),
        ("/v1/embeddings", "post"),
        ("/v1/score", "post"),
        ("/score", "post"),
        ("/v1/messages", "post"),
        ("/v1/messages/count_tokens", "post"),
        ("/v1/responses/{response_id}", "delete"),
        ("/v1/models", "get"),
        ("/v1/models/{model}", "get"),
        ("/tokenize", "post"),
        ("/detokenize", "post"),
        ("/health", "get"),
        ("/health/live", "get"),
        ("/health/ready", "get"),
        ("/health/progress", "get"),
        ("/metrics", "get"),
        ("/version", "get"),
        ("/load", "get"),
        ("/server_info", "get"),
        ("/memory", "get"),
    }
