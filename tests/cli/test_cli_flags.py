from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from octavo.cli.app import VERBS, make_app
from octavo.cli.flags import FLAGS, engine_flags, flag_name
from octavo.cli.sizes import parse_size
from octavo.config import EngineConfig

VERBS_WITH_ALL_FLAGS = (["serve"], ["chat"], ["complete"], ["bench", "throughput"], ["bench", "latency"])


def test_every_field_has_a_flag_and_every_flag_a_field() -> None:
    assert set(FLAGS) == {f.name for f in fields(EngineConfig)} - {"model"}, "the model is an argument"


def config_of(*args: str) -> EngineConfig:
    """The config that a verb sees for a command line."""
    seen: list[EngineConfig] = []
    probe = typer.Typer()

    @probe.command()
    @engine_flags()
    def verb(config: EngineConfig) -> None:
        seen.append(config)

    result = CliRunner().invoke(probe, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_no_flags_is_the_default_config() -> None:
    assert config_of() == EngineConfig()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["folder"], {"model": "folder"}),
        (["--dtype", "float32"], {"dtype": "float32"}),
        (["--max-model-len", "4k"], {"max_model_len": 4000}),
        (["--max-model-len", "4K"], {"max_model_len": 4096}),
        (["--kv-cache-memory-bytes", "400MiB"], {"kv_cache_memory_bytes": 400 << 20}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching"], {}),
        (["--skip-tokenizer-init"], {"skip_tokenizer_init": True}),
        (["--seed", "-3"], {"seed": -3}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--load-format", "dummy", "--served-model-name", "x"], {"load_format": "dummy", "served_model_name": "x"}),
    ],
)
def test_flags_reach_their_field(args: list[str], expected: dict[str, Any]) -> None:
    assert config_of(*args) == EngineConfig(**expected)


@pytest.mark.parametrize("verb", VERBS_WITH_ALL_FLAGS)
@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_help_names_every_flag_in_full(verb: list[str], columns: str) -> None:
    result = CliRunner().invoke(make_app(), [*verb, "--help"], env={"COLUMNS": columns})
    assert result.exit_code == 0
    left_out = set() if verb == ["serve"] else {"served_model_name"}
    for name in set(FLAGS) - left_out:
        assert f"  {flag_name(name)}" in result.output, name
    assert "Examples" in result.output
    assert "  octavo " in result.output.split("Examples")[1]


def test_help_of_every_verb_fits_a_terminal() -> None:
    benches = (["bench", kind] for kind in ("serve", "latency", "throughput", "scheduler"))
    for verb in ([], *([verb] for verb in VERBS), *benches):
        result = CliRunner().invoke(make_app(), [*verb, "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0, verb
        assert max(len(line) for line in result.output.splitlines()) <= 80, verb


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("8k", 8000), ("8K", 8192), ("1.5G", 3 << 29), ("400MiB", 400 << 20), ("2 GB", 2 * 10**9)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "many", "4x", "-1", "1.0001", "1e3", "4 Mib", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (size|whole number)"):
        parse_size(text)
