"""Where the recording of an engine's scheduler goes, and for how long it stays."""

import logging
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from octavo.engine.black_box import forget_old, record_folder
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.scheduler.recorder import RecordingScheduler, Ring

log = logging.getLogger("octavo.engine")
MAX_LEFT = 8  # recordings of engines that died, in the cache folder
WHAT_IF = (  # settings that a replay may change
    *("admission_headroom", "block_size", "enable_prefix_caching", "long_prefill_token_threshold"),
    *("max_num_batched_tokens", "max_num_queued_tokens", "max_num_seqs", "prefix_eviction_policy"),
    *("priority_ageing", "scheduling_policy", "slo_itl_ms", "slo_ttft_ms"),
)


def start_recording(core: EngineCore, *, serving: bool) -> Path | None:
    """Begins to record an idle engine, as its config says: `auto` does so behind a server, in the cache folder, and
    the file goes when the engine ends well; where that cannot be written, there is a warning and no recording. A folder
    is written to in any case, and its files stay.

    Raises ConfigError: that folder cannot be written.
    """
    config = core.config
    scheduler = core.scheduler
    if not isinstance(scheduler, RecordingScheduler) or (config.record == "auto" and not serving):
        return None
    try:
        return _start(core, scheduler)
    except ConfigError as error:
        if config.record != "auto":
            raise
        log.warning("%s", error)
        return None


def _start(core: EngineCore, scheduler: RecordingScheduler) -> Path:
    config = core.config
    folder, keep = record_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot record to {folder}: {error.strerror}; take another --record, or off") from error
    if not keep:
        forget_old(folder, "engine-*.jsonl*", 2 * MAX_LEFT)
    began = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    path = folder / f"engine-{began}-{os.getpid()}.jsonl"  # in a container every engine may have the same number
    settings = asdict(config)
    known = {name: settings[name] for name in WHAT_IF}
    info = core.info
    known |= {"num_blocks": info.plan.num_blocks, "max_model_len": info.spec.max_model_len}
    known |= {"num_host_blocks": info.plan.num_host_blocks, "host_copy_seconds": info.host_copy_seconds}
    known["kv_windows"] = info.kv_windows
    scheduler.record(Ring(path, config.record_bytes, keep=keep), known)
    return path
