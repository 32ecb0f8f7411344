"""IQ2_XXS blocks with their grid and signs looked up, as 4-bit codes that the library keeps (native/stores.h).

A block of 256 values in 66 bytes: half d, then for 32 values each 4 bytes of grid indices (8 values each) and 4 bytes
of 7-bit sign indices and a 4-bit scale s; value = d (2 s + 1) / 8 * {8, 25, 43} * sign. Source: ggml's k-quants. The
grid and the signs are the gguf package's own.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.runtime.base import UInt32

SOURCE_TYPE = "IQ2_XXS"
CODED_TYPE = "IQ2_XXS_CODES"  # half d, 8 bytes of 2 s + 1, 128 bytes of nibbles: magnitude, and 8 for a minus
_BLOCK_BYTES = 66
_MAGNITUDES = (8, 25, 43)


def to_codes(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Rows of IQ2_XXS blocks [rows, bytes] as rows of coded blocks; the values are exactly the same."""
    grid, signs = _tables()
    blocks = data.reshape(-1, _BLOCK_BYTES)
    words = np.ascontiguousarray(blocks[:, 2:]).view("<u4").reshape(-1, 8, 2)
    indices = np.ascontiguousarray(words[..., 0]).view(np.uint8).reshape(-1, 8, 4)
    packed = words[..., 1]
    codes = grid[indices]  # [blocks, 8, 4], each of 8 nibbles
    for i in range(4):
        codes[..., i] |= signs[(packed >> np.uint32(7 * i)) & np.uint32(0x7F)]
    scales = ((packed >> np.uint32(28)) * 2 + 1).astype(np.uint8)
    out = np.concatenate(
        (blocks[:, :2], scales, codes.reshape(-1, 32).astype("<u4", copy=False).view(np.uint8)), axis=1
    )
    return np.ascontiguousarray(out.reshape(len(data), -1))


@cache
def _tables() -> tuple[UInt32, UInt32]:
    """Nibbles of the 256 grid entries, and the sign bits of the 128 sign indices."""
    from gguf import quants

    quants.IQ2_XXS.init_grid()  # type: ignore[no-untyped-call]  # gguf declares no types here
    values: npt.NDArray[Any] = np.asarray(quants.IQ2_XXS.grid).reshape(256, 8)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    magnitudes = np.searchsorted(_MAGNITUDES, values).astype(np.uint32)
    sign_bytes = np.frombuffer(quants.IQ2_XXS.ksigns, dtype=np.uint8)
    minus = (sign_bytes[:, None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    return _join(magnitudes, shifts), _join(minus.astype(np.uint32) * np.uint32(8), shifts)


def _join(nibbles: UInt32, shifts: UInt32) -> UInt32:
    joined: UInt32 = np.bitwise_or.reduce(nibbles << shifts, axis=1)
    return joined
