"""Fixtures shared by the end-to-end tests."""

import pytest
from serving import serving


@pytest.fixture(scope="session")
def server():
    """The default model, shared by tests that do not harm it."""
    with serving("smollm2", "--max-model-len", "2048") as running:
        yield running
