"""Names a full block by everything its KV depends on: all token ids up to its end, and who may share it.

A chain: each digest covers its parent's, so equal digests mean equal prefixes. BLAKE2b (RFC 7693) with a secret key
and 16 bytes: unlike a plain or 64-bit hash, a collision can be neither guessed nor searched for by another tenant.
The key stands in front of what is hashed, which BLAKE2 allows (no length extension); its own keyed mode would pad the
key to 128 bytes and hash as many more for each block.
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence

DIGEST_SIZE = 16  # bytes


class BlockHasher:
    """Hashes blocks of `block_size` token ids (each below 2**32) under one key of any length."""

    def __init__(self, block_size: int, key: bytes) -> None:
        key = hashlib.blake2b(key, digest_size=32).digest()
        self.block_size = block_size
        self._block = hashlib.blake2b(key, digest_size=DIGEST_SIZE, person=b"block")
        self._root = hashlib.blake2b(key, digest_size=DIGEST_SIZE, person=b"root")

    def root(self, cache_salt: str | None) -> bytes:
        """Where a chain begins. Requests with different extra keys share no block."""
        state = self._root.copy()
        state.update(struct.pack("?", cache_salt is not None))
        state.update((cache_salt or "").encode("utf-8", "surrogatepass"))
        return state.digest()

    def chain(self, parent: bytes, token_ids: Sequence[int]) -> list[bytes]:
        """The digests of the full blocks that follow `parent` (another block's digest, or a root)."""
        data = array("I", token_ids).tobytes()
        size = 4 * self.block_size
        digests = []
        for start in range(0, len(data) - size + 1, size):
            state = self._block.copy()
            state.update(parent + data[start : start + size])
            parent = state.digest()
            digests.append(parent)
        return digests
