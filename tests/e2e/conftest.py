"""Fixtures shared by the end-to-end tests."""

import json

import pytest
from serving import serving

from tests.tiny_llama import TINY


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model without weights or tokenizer: tiny_engine.with_engine runs it."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def server():
    """The default model, shared by tests that do not harm it."""
    with serving("smollm2", "--max-model-len", "2048") as running:
        yield running
