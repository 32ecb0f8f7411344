"""What `--quantization int8` computes (W8A8): rotated rows, one scale a row, exact integer sums.

The definition: native kernels give these bits, whatever their level and order. Rotating before rounding follows QuaRot
(Ashkboos et al. 2024); here nothing is folded into the model, each Linear rotates its own input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.runtime.base import Float32

BLOCK = 64  # of the Hadamard part of the rotation
_LARGEST = np.float32(127)
_SMALLEST = np.float32(1e-30)  # rows with no larger value are zeros: 127 / it is finite


@dataclass(slots=True)
class Int8Matrix:
    """A matrix [channels, width] as int8 in the rotated basis."""

    codes: npt.NDArray[np.int8]  # [channels, width, padded to whole blocks]
    scales: Float32  # [channels]: of the codes, and of the rotation
    width: int

    @classmethod
    def of(cls, values: Float32) -> Int8Matrix:
        """Rounds a matrix."""
        codes, scales = quantise(rotate(values))
        return cls(codes, scales / np.float32(norm(codes.shape[-1])), values.shape[-1])

    def rows(self, ids: npt.NDArray[np.integer]) -> Float32:
        """The weights of some rows, [n, width]: what a look-up gives."""
        values: Float32 = rotate(self.codes[ids].astype(np.float32))[..., : self.width] * self.scales[ids][:, None]
        return values

    def linear(self, x: Float32, channels: slice = slice(None)) -> Float32:
        """x [rows, width], rounded, times the transposed matrix, or some of its rows: [rows, channels]."""
        codes, scales = quantise(rotate(x))
        weights = self.codes[channels].T.astype(np.float64)
        sums = (codes.astype(np.float64) @ weights).astype(np.float32)  # exact, then rounded
        out: Float32 = sums * (scales[:, None] * self.scales[channels])
        return out


def rotate(values: Float32) -> Float32:
    """Rows [..., k] padded with zeros to whole blocks of 64, times an orthogonal matrix and sqrt(norm()).

    Numbers `stride` apart are mixed in groups of p: strides 1, 2, ..., 32 with p = 2, which makes the Hadamard matrix
    of 64; then strides 64, 64 p, ... with the prime factors p of the number of blocks, smallest first. Two become
    their sum and difference; an odd number p of them x - (2 / p) * sum, summed in order.
    """
    k = values.shape[-1]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -k % BLOCK)])
    shape, stride = padded.shape, 1
    for p in (*(2,) * 6, *prime_factors(shape[-1] // BLOCK)):
        padded = _mix(padded.reshape(*shape[:-1], shape[-1] // (p * stride), p, stride)).reshape(shape)
        stride *= p
    return padded


def norm(padded: int) -> int:
    """What the rotation of rows of this (padded) length multiplies products of two rows by."""
    blocks = padded // BLOCK
    return BLOCK * (blocks & -blocks)


def prime_factors(number: int) -> list[int]:
    """In ascending order, each as often as it divides."""
    factors, p = [], 2
    while number > 1:
        while number % p:
            p += 1
        factors.append(p)
        number //= p
    return factors


def quantise(rows: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Codes and scales [...] of rows [..., k]: the nearest of 255 levels of the row's own, ties to even.

    A row with an infinity or a NaN has codes 0 and the scale NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.abs(rows).max(axis=-1)
        finite = np.isfinite(largest)
        kept = finite & (largest > _SMALLEST)
        factor = np.divide(_LARGEST, largest, out=np.zeros_like(largest), where=kept)
        codes = np.rint(np.where(finite[..., None], rows, 0) * factor[..., None]).astype(np.int8)
        scales = np.where(kept, largest / _LARGEST, np.where(finite, np.float32(0), np.float32(np.nan)))
    return codes, scales


def _mix(groups: Float32) -> Float32:
    """[..., groups, p, stride]: mixes the p."""
    p = groups.shape[-2]
    total = groups[..., 0, :]
    for i in range(1, p):
        total = total + groups[..., i, :]
    if p == 2:
        return np.stack((total, groups[..., 0, :] - groups[..., 1, :]), axis=-2)
    mixed: Float32 = groups - (total * (np.float32(2) / np.float32(p)))[..., None, :]
    return mixed
