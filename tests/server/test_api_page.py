"""docs/api.md names every parameter, honoured or refused, every route and every error code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from octavo.server import errors, protocol
from octavo.server.app import create_app
from octavo.server.embeddings import EmbeddingRequest, ScoreRequest
from octavo.server.responses import UNBUILT, ResponsesRequest

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
WORDS = set(re.findall(r"[a-z_0-9]+", PAGE))


MODELS = [protocol.ChatRequest, protocol.CompletionRequest, protocol.StreamOptions, EmbeddingRequest, ScoreRequest]
MODELS.append(ResponsesRequest)


@pytest.mark.parametrize("model", MODELS)
def test_parameters(model: type[protocol.Strict]) -> None:
    assert set(model.model_fields) - WORDS == set()


def test_refused_parameters() -> None:
    assert {*protocol.UNBUILT_SAMPLING, *protocol.UNBUILT_CHAT, *UNBUILT} - WORDS == set()


def test_routes_and_codes() -> None:
    for path in create_app(FakeEngine(), served_model_names=["fake"]).openapi()["paths"]:
        assert f"{path.split('{')[0].rstrip('/')}" in PAGE
    assert {*errors.CODES.values(), *errors.PYDANTIC_CODES.values(), *errors.TYPES.values()} - WORDS == set()
