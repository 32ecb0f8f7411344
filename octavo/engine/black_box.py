"""What is known of an engine that stalls or dies, in one JSON file below a megabyte: why, how it stood, what ran, its
last steps, and where its scheduler was recorded (`octavo replay`). No text, no token ids.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo import structs
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.messages import EngineReady, StepRecord
from octavo.models.hub import cache_folder

if TYPE_CHECKING:
    from octavo.engine.groups import Child
    from octavo.engine.watchdog import Progress

log = logging.getLogger("octavo.engine")
MAX_STEPS = 256  # the last ones
MAX_REQUESTS = 1024  # the oldest ones
MAX_LEFT = 8  # black boxes in the cache folder


def write_black_box(
    reason: str,
    *,
    config: EngineConfig,
    pid: int,
    ready: EngineReady,
    progress: Progress,
    running: Iterable[Child],
    steps: Iterable[StepRecord],
) -> str:
    """Writes it beside the recordings; the end of a log line that says where it is. Empty under `--record off`, and
    where it cannot be written, which is logged. Times in `requests` are seconds, `steps` are StepRecords."""
    if config.record == "off":
        return ""
    now = datetime.now(UTC)
    box: dict[str, Any] = {
        "format": "octavo-black-box-1",
        "written": now.isoformat(timespec="milliseconds"),
        "reason": reason,
        "pid": pid,
        "runtime": ready.runtime,
        "recording": ready.record,
        "progress": asdict(progress),
        "requests": [_facts(child) for child in islice(running, MAX_REQUESTS)],
        "steps": [structs.asdict(step) for step in steps],
    }
    try:
        folder, keep = record_folder(config)
        path = folder / f"engine-{pid}-{now:%Y%m%dT%H%M%S}.black-box.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(box, indent=1) + "\n")
    except (OSError, ConfigError) as error:
        log.warning("no black box was written: %s", error)
        return ""
    if not keep:
        forget_old(folder, "engine-*.black-box.json", MAX_LEFT)
    return f"; black box: {path}"


def _facts(child: Child) -> dict[str, Any]:
    group = child.parent
    return {
        "id": child.request_id,
        "age": time.monotonic() - group.metrics.arrival_time,
        "prompt_tokens": len(group.prompt_token_ids),
        "output_tokens": len(child.output.token_ids),
        "max_tokens": child.request.max_tokens,
        "ran_alone": child.alone,
    }


def record_folder(config: EngineConfig) -> tuple[Path, bool]:
    """Where recordings and black boxes go, and whether all of them stay."""
    if config.record == "auto":
        return cache_folder(config.download_dir) / "records", False
    return Path(config.record).expanduser(), True


def forget_old(folder: Path, pattern: str, most: int) -> None:
    """Removes all but the newest files that earlier engines left."""
    with contextlib.suppress(OSError):  # another engine may be doing the same
        left = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        for path in left[:-most]:
            path.unlink()
