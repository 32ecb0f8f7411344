"""docs/operations.md names only what is there: metrics, flags, routes, results."""

from __future__ import annotations

import re
from pathlib import Path

from fake_engine import FakeEngine
from inside import Inside
from typer.main import get_command

from octavo.cli.app import make_app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_metrics_are_told() -> None:
    ask = Inside(FakeEngine())
    ask("GET", "/version")
    told = ask("GET", "/metrics").text
    named = set(re.findall(r"octavo:\w+", PAGE))
    assert len(named) > 8
    told = set(re.findall(r"# TYPE (\S+) ", told))
    missing = [name for name in named if name not in told and name.removesuffix("_total") not in told]
    assert not missing


def test_flags_and_routes_exist() -> None:
    serve = get_command(make_app()).commands["serve"]
    flags = {flag for option in serve.params for flag in option.opts}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= flags
    routes = {route.path for route in Inside().app.routes}
    assert set(re.findall(r"`(/health[a-z/]*)`", PAGE)) <= routes


def test_results_exist() -> None:
    named = set(re.findall(r"`([a-z-]+\.json)`", PAGE))
    assert len(named) == 4
    assert all((ROOT / "lab" / "results" / name).exists() for name in named)
