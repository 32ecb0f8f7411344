"""Files that verbs read and write: a result is JSON, and what cannot be read or written the verb says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError


def read_text(flag: str, path: Path) -> str:
    """The text of a file that a flag names. Raises ConfigError where it cannot be read, or is none."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: {getattr(error, 'strerror', error)}") from error


def read_stdin(read: Callable[[], str]) -> str:
    """What a method of sys.stdin reads. Raises ConfigError where that is no text."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is no text in {error.encoding}: {error.reason} at byte {error.start}") from error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document for people and programs. Raises ConfigError where it cannot be: no such folder, no room."""
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file") from error
