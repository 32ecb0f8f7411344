"""Who may ask, what each may do, and how much of it per minute.

A server with at least one key is closed: every route asks for one, in `Authorization: Bearer KEY` or `x-api-key: KEY`,
routes that do not exist included. Keys are compared as digests under a secret drawn at start, each with all, in
constant time. A key stands for a tenant: its requests never share cached prefixes with another's.
"""

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from starlette.datastructures import Headers

from octavo.errors import ConfigError
from octavo.server.errors import Failure

MAX_KEYS = 4096
MAX_FILE_BYTES = 4 << 20
ADMIN_PATHS = frozenset({"/memory", "/metrics", "/server_info"})  # they tell of everybody's requests
PROBE_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
_KEY = r"^[\x21-\x7e]{16,256}$"
_TENANT = r"^[A-Za-z0-9._-]{1,64}$"


class KeyEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One key as the file has it."""

    key: Annotated[str, msgspec.Meta(pattern=_KEY)]
    tenant: Annotated[str, msgspec.Meta(pattern=_TENANT)] = "default"
    weight: Annotated[float, msgspec.Meta(ge=0.01, le=1000)] = 1.0
    requests_per_minute: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] | None = None
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] | None = None
    admin: bool = False


class KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file: `[[key]]` tables in TOML, {"key": [...]} in JSON."""

    key: Annotated[list[KeyEntry], msgspec.Meta(min_length=1, max_length=MAX_KEYS)]


class Allowance:
    """So much a minute, up to a minute's worth at once. What is taken may go into debt, which must be paid back first.

    Debt is what makes tokens countable: how many an answer has is known only while it comes.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._left = self._most
        self._clock = clock
        self._at = clock()

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there; 0 when it is."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now
        return max(0.0, (amount - self._left) * 60 / self._most)

    def take(self, amount: float) -> None:
        """Takes `amount`, there or not."""
        self._left -= amount


@dataclass(slots=True)
class Key:
    """What a caller may do. `tenant` separates cached prefixes and shares the engine by `weight`."""

    tenant: str
    weight: float = 1.0
    admin: bool = False
    requests: Allowance | None = None
    tokens: Allowance | None = None

    def admit(self) -> Failure | None:
        """Takes one request from the allowance, or says when to come back."""
        for what, allowance in (("requests", self.requests), ("tokens", self.tokens)):
            wait = allowance.wait(1.0) if allowance else 0.0
            if wait > 0:
                seconds = math.ceil(wait)
                message = f"this key has used up its {what} per minute: try again in {seconds} s"
                headers = {"Retry-After": str(seconds)}
                return Failure(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=headers)
        if self.requests:
            self.requests.take(1.0)
        return None

    def spend(self, num_tokens: int) -> None:
        """Books tokens of a prompt or an answer."""
        if self.tokens:
            self.tokens.take(num_tokens)

    def salt(self, asked: str | None) -> str | None:
        """What goes into the hash of this caller's prefixes: nothing on an open server, unless asked for."""
        return f"{self.tenant}/{asked or ''}" if self.tenant else asked


class Keyring:
    """All keys of one server; without any, everybody may do everything.

    Raises ConfigError: two entries with the same key, or too many.
    """

    def __init__(self, entries: Sequence[KeyEntry] = (), *, public_probes: bool = False) -> None:
        if len(entries) > MAX_KEYS:
            raise ConfigError(f"{len(entries)} keys were given; at most {MAX_KEYS} are served")
        self._secret = secrets.token_bytes(32)
        self._public = PROBE_PATHS if public_probes else frozenset()
        self._open = Key("", admin=True)
        self._keys: list[tuple[bytes, Key]] = []
        for entry in entries:
            digest = self._digest(entry.key.encode())
            if any(digest == other for other, _ in self._keys):
                raise ConfigError(f"the key that ends in ...{entry.key[-4:]} was given twice")
            self._keys.append((digest, _key(entry)))

    def check(self, path: str, headers: Headers) -> Key | Failure:
        """The caller's key, or the refusal: 401 without a valid one, 403 for what only an administrator may."""
        if not self._keys or path in self._public:
            return self._open
        key = self._find(headers)
        if key is None:
            why = "no valid API key: send 'Authorization: Bearer KEY'"
            return Failure(401, why, "authentication_error", None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        if path in ADMIN_PATHS and not key.admin:
            return Failure(403, f"{path} needs an administrator's key", "permission_error", code="admin_only")
        return key

    def _find(self, headers: Headers) -> Key | None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = self._digest(given.encode("utf-8", "replace"))
        # all of them are compared, so that time tells nothing
        found = [key for other, key in self._keys if hmac.compare_digest(digest, other)]
        return found[0] if found else None

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret, digest_size=32).digest()


def read_keys(
    keys: Sequence[str] = (), admin_keys: Sequence[str] = (), path: Path | None = None, *, public_probes: bool = False
) -> Keyring:
    """The keys of the command line and of a file. Raises ConfigError, naming no key, for what is none."""
    raw = [{"key": key} for key in keys] + [{"key": key, "admin": True} for key in admin_keys]
    try:
        entries = msgspec.convert(raw, list[KeyEntry])
    except msgspec.ValidationError as error:
        raise ConfigError("an API key has 16 to 256 visible characters; `openssl rand -hex 32` makes one") from error
    return Keyring([*entries, *(_read_file(path) if path else ())], public_probes=public_probes)


def _read_file(path: Path) -> list[KeyEntry]:
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"--api-key-file {path}: its name must end in .toml or .json")
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"--api-key-file {path} is larger than {MAX_FILE_BYTES} bytes")
        decode = msgspec.toml.decode if path.suffix == ".toml" else msgspec.json.decode
        return decode(data, type=KeyFile).key
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise ConfigError(f"--api-key-file {path}: {error}") from error


def _key(entry: KeyEntry) -> Key:
    requests = Allowance(entry.requests_per_minute) if entry.requests_per_minute else None
    tokens = Allowance(entry.tokens_per_minute) if entry.tokens_per_minute else None
    return Key(entry.tenant, entry.weight, entry.admin, requests, tokens)
