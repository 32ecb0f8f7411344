"""Names a full block by everything its KV depends on: all token ids up to its end, and who may share it.

A chain: each digest covers its parent's, so equal digests mean equal prefixes. BLAKE2b (RFC 7693) with a secret key
and 16 bytes: unlike a plain or 64-bit hash, a collision can be neither guessed nor searched for by another tenant.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

DIGEST_SIZE = 16  # bytes


class BlockHasher:
    """Hashes blocks of `block_size` token ids (each below 2**32) under one key of any length."""

    def __init__(self, block_size: int, key: bytes) -> None:
        key = hashlib.blake2b(key, digest_size=32).digest()
        self._pack = struct.Struct(f"<{block_size}I").pack
        self._block = hashlib.blake2b(key=key, digest_size=DIGEST_SIZE, person=b"block")
        self._root = hashlib.blake2b(key=key, digest_size=DIGEST_SIZE, person=b"root")

    def root(self, cache_salt: str | None, adapter_id: int) -> bytes:
        """Where a chain begins. Requests with different extra keys share no block."""
        state = self._root.copy()
        state.update(struct.pack("<Q?", adapter_id, cache_salt is not None))
        state.update((cache_salt or "").encode("utf-8", "surrogatepass"))
        return state.digest()

    def digest(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The digest of the full block that follows `parent` (another block's digest, or a root)."""
        state = self._block.copy()
        state.update(parent + self._pack(*token_ids))
        return state.digest()
