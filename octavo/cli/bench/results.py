"""The JSON file of a `bench serve` run, under vLLM's keys."""

import contextlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from octavo.cli.bench.arithmetic import Outcome, Report, result_keys
from octavo.cli.files import write_json


def save(
    folder: Path,
    name: str | None,
    settings: dict[str, Any],
    run: Report,
    outcomes: Sequence[Outcome],
    *,
    detailed: bool,
) -> Path:
    """Writes settings and numbers, `detailed` also what every request saw; returns the path.

    Raises ConfigError when the file cannot be written.
    """
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    content = {"date": date, **settings, **result_keys(run)}
    if detailed:
        content |= details(outcomes)
    path = folder / (name or default_name(settings, date))
    with contextlib.suppress(OSError):  # what is wrong with it is said of the file
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def default_name(settings: dict[str, Any], date: str) -> str:
    """`openai-4.0qps-concurrency8-smollm2-20260101-120000.json`."""
    concurrency = f"-concurrency{settings['max_concurrency']}" if settings["max_concurrency"] else ""
    model = str(settings["model_id"]).split("/")[-1]
    return f"{settings['backend']}-{settings['request_rate']}qps{concurrency}-{model}-{date}.json"


def details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What every request saw, as parallel lists. Seconds."""
    names = {"input_lens": "prompt_tokens", "output_lens": "output_tokens", "ttfts": "ttft", "itls": "itls"}
    names |= {"generated_texts": "text", "errors": "error"}
    return {name: [getattr(outcome, field) for outcome in outcomes] for name, field in names.items()}
