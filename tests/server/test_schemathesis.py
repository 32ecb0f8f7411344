"""Requests made from the OpenAPI file, right ones and wrong ones: what it says is what the server does."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, settings

from octavo.server.app import create_app

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    schemathesis = pytest.importorskip("schemathesis")

    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
APP = create_app(FakeEngine(), served_model_names=["fake"])
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
asked: set[str] = set()


def agree(operation: Any) -> Any:
    """The test of an operation: with one for all, its items would have one name, of which pytest-xdist runs one."""

    @SCHEMA.include(method=operation.method, path=operation.path).parametrize()
    @settings(max_examples=10, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
    def test(case: Any) -> None:
        asked.add(f"{case.method} {case.path}")
        case.call_and_validate(checks=CHECKS)

    return test


for found in SCHEMA.get_all_operations():
    label = re.sub(r"\W+", "_", found.ok().label.lower())
    globals()[f"test_the_file_and_the_server_agree_on_{label}"] = agree(found.ok())


def test_every_operation_was_asked() -> None:
    operations = {f"{method.upper()} {path}" for path, methods in APP.openapi()["paths"].items() for method in methods}
    assert asked >= operations
