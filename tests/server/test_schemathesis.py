"""Requests made from the OpenAPI file, right ones and wrong ones: what it says is what the server does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of

from octavo.server.app import create_app

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    schemathesis = pytest.importorskip("schemathesis")

    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
APP = create_app(FakeEngine(), served_model_names=["fake"])
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
# Schemathesis' own parametrisation gives all operations one name; a run in several processes would ask one of them.
OPERATIONS = {f"{found.ok().method} {found.ok().path}": found.ok() for found in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_file_and_the_server_agree(name: str) -> None:
    cases = [OPERATIONS[name].as_strategy(generation_mode=mode) for mode in GenerationMode]  # right ones, wrong ones
    asked = []

    @settings(max_examples=10, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
    @given(one_of(cases))
    def agree(case: Any) -> None:
        asked.append(case)
        case.call_and_validate(checks=CHECKS)

    agree()
    assert asked
