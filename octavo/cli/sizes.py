"""Numbers as people type them: 400MiB, 1.5G, 8k."""

import re

_FACTORS = {"": 1, "kb": 1000}
for _power, (_small, _large) in enumerate(zip("kmgt", "KMGT", strict=True), start=1):
    _FACTORS |= {_small: 1000**_power, f"{_large}B": 1000**_power, _large: 1024**_power, f"{_large}iB": 1024**_power}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str | int) -> int:
    """An integer with an optional suffix. As in vLLM, k m g t are powers of 1000 and K M G T powers of 1024; KiB, MiB
    and GiB are powers of 1024, KB, MB and GB of 1000.

    Raises ValueError for anything else, and for a fraction that is not a whole number.
    """
    if isinstance(text, int):
        return text
    match = _PATTERN.fullmatch(text.strip())
    factor = _FACTORS.get(match[2]) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size: write 4096, 8k, 400MiB or 1.5G")
    value = float(match[1]) * factor if "." in match[1] else int(match[1]) * factor
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)
