"""RoPE kinds: from the parameters of a checkpoint to fixed inverse frequencies and a scale for cos and sin.

Everything depends only on the parameters and on the length served, so factors are fixed at load and cached KV stays
valid. Arithmetic is float32 in the order that transformers uses, so that angles agree to the last bit.

    default    Su et al. 2021 (RoFormer)
    linear     positions divided by `factor` (position interpolation, Chen et al. 2023)
    dynamic    NTK-aware base, for the length served when that exceeds the trained one
    yarn       Peng et al. 2023: interpolates low frequencies, keeps high ones, scales attention
    llama3     Llama 3.1: as yarn, with a smooth step between two wavelengths
    longrope   Ding et al. 2024: searched factors per frequency, one list for short and one for long contexts
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.program.ops import Rope

Frequencies = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """What a checkpoint says about its rotary embedding; names are those of Hugging Face's `rope_parameters`.

    `max_position_embeddings` is the checkpoint's own limit, `original_max_position_embeddings` the trained length
    before scaling.
    """

    max_position_embeddings: int
    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # 0: the same as max_position_embeddings
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def original(self) -> int:
        """The trained length before scaling."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def reach(self) -> int:
        """The longest context that these parameters were made for."""
        if self.kind in ("yarn", "longrope"):
            return max(self.max_position_embeddings, int(self.original * self.factor))
        if self.kind in ("linear", "dynamic"):
            return int(self.max_position_embeddings * max(1.0, self.factor))
        return self.max_position_embeddings


def make_rope(parameters: RopeParameters, *, rotary_dim: int, max_model_len: int) -> Rope:
    """Fixes a rotary embedding for contexts of up to `max_model_len` tokens; `rotary_dim` values a head are rotated.

    Raises:
        UnsupportedModelError: a kind that has no row here.
        ModelFileError: parameters that contradict each other.
    """
    kind = _KINDS.get(parameters.kind)
    if kind is None:
        raise UnsupportedModelError(f"RoPE kind {parameters.kind!r} is not known; known kinds: {', '.join(_KINDS)}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelFileError(f"RoPE rotates pairs, so its dimension must be even and at least 2, not {rotary_dim}")
    frequencies, scale = kind(parameters, rotary_dim, max_model_len)
    return Rope(tuple(float(f) for f in frequencies), float(scale))


def _inverse_frequencies(theta: float, dim: int) -> Frequencies:
    """1 / theta^(2i / dim), rounded to float32 after the power and after the division."""
    return np.float32(1.0) / _powers(theta, dim)


def _powers(theta: float, dim: int) -> Frequencies:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _default(p: RopeParameters, dim: int, max_model_len: int) -> tuple[Frequencies, float]:
    return _inverse_frequencies(p.theta, dim), 1.0


def _linear(p: RopeParameters, dim: int, max_model_len: int) -> tuple[Frequencies, float]:
    return _inverse_frequencies(p.theta, dim) / np.float32(p.factor), 1.0


def _dynamic(p: RopeParameters, dim: int, max_model_len: int) -> tuple[Frequencies, float]:
    if dim < 4:
        raise ModelFileError(f"dynamic RoPE needs a rotary dimension of at least 4, not {dim}")
    length = max(max_model_len, p.max_position_embeddings)
    stretch = p.factor * length / p.max_position_embeddings - (p.factor - 1)
    return _inverse_frequencies(p.theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(p: RopeParameters, dim: int, max_model_len: int) -> tuple[Frequencies, float]:
    def dimension_of(rotations: float) -> float:
        return dim * math.log(p.original / (rotations * 2 * math.pi)) / (2 * math.log(p.theta))

    low, high = dimension_of(p.beta_fast), dimension_of(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp

    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    powers = _powers(p.theta, dim)
    interpolated, extrapolated = 1 / (np.float32(p.factor) * powers), 1 / powers
    scale = p.attention_factor if p.attention_factor is not None else _yarn_scale(p)
    return interpolated * (1 - kept) + extrapolated * kept, scale


def _yarn_scale(p: RopeParameters) -> float:
    def scale_of(mscale: float) -> float:
        return 0.1 * mscale * math.log(p.factor) + 1.0 if p.factor > 1 else 1.0

    if p.mscale and p.mscale_all_dim:
        return scale_of(p.mscale) / scale_of(p.mscale_all_dim)
    return scale_of(1.0)


def _llama3(p: RopeParameters, dim: int, max_model_len: int) -> tuple[Frequencies, float]:
    if p.high_freq_factor <= p.low_freq_factor:
        raise ModelFileError(
            f"llama3 RoPE needs high_freq_factor ({p.high_freq_factor}) above low_freq_factor ({p.low_freq_factor})"
        )
    plain = _inverse_frequencies(p.theta, dim)
    wavelengths = np.float32(2 * math.pi) / plain
    divided = plain / np.float32(p.factor)
    smooth = (np.float32(p.original) / wavelengths - np.float32(p.low_freq_factor)) / np.float32(
        p.high_freq_factor - p.low_freq_factor
    )
    blended = (1 - smooth) * divided + smooth * plain
    is_low = wavelengths > p.original / p.low_freq_factor
    is_high = wavelengths < p.original / p.high_freq_factor
    return np.where(is_low, divided, np.where(is_high, plain, blended)), 1.0


def _longrope(p: RopeParameters, dim: int, max_model_len: int) -> tuple[Frequencies, float]:
    name, factors = ("long_factor", p.long_factor) if max_model_len > p.original else ("short_factor", p.short_factor)
    if len(factors) != dim // 2:
        raise ModelFileError(f"longrope {name} has {len(factors)} values, but the rotary dimension needs {dim // 2}")
    scale = p.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(p.factor) / math.log(p.original)) if p.factor > 1 else 1.0
    return np.float32(1) / (np.asarray(factors, dtype=np.float32) * _powers(p.theta, dim)), scale


_KINDS: dict[str, Callable[[RopeParameters, int, int], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
