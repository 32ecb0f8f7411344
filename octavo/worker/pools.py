"""One vector of a prompt's last states, gathered chunk by chunk."""

import numpy as np

from octavo.runtime.base import Float32


class Pool:
    """What a row whose prompt is embedded has so far. `last`: the last position's state, else the mean of all."""

    def __init__(self, *, last: bool) -> None:
        self.last = last
        self._sum = np.zeros(1)
        self._count = 0

    def add(self, states: Float32) -> None:
        """The states [n, hidden_size] of the next positions that count."""
        self._sum = self._sum + states.sum(0, dtype=np.float64)
        self._count += len(states)

    def vector(self) -> bytes:
        """float32 [hidden_size], as bytes."""
        return (self._sum / self._count).astype("<f4").tobytes()
