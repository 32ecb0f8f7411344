"""Files that verbs write: a result is JSON, and where it cannot be written the verb says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document for people and programs. Raises ConfigError where it cannot be: no such folder, no room."""
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file") from error
