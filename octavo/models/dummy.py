"""Seeded random weights from a bare config.json: for benchmarks and tests without a checkpoint."""

import hashlib

import numpy as np

from octavo.models.decoder import record
from octavo.models.spec import ModelSpec
from octavo.runtime.base import RandomTensor, Tensor

STANDARD_DEVIATION = 0.02  # the initialiser of most models; logits stay sane


class DummyWeights:
    """Implements runtime.base.RandomSource. A tensor depends on its name and the seed only, never on order.

    Matrices and biases are normal with standard deviation 0.02, norm weights lie around one.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._seed = seed
        self._shapes = record(spec).parts

    def get(self, part: str) -> Tensor:
        """The float32 tensor with this canonical name."""
        recipe = self.random(part)
        random = np.random.Generator(np.random.Philox(key=recipe.seed))
        values = random.standard_normal(self._shapes[part], dtype=np.float32) * np.float32(recipe.standard_deviation)
        if recipe.mean:
            values += np.float32(recipe.mean)
        return Tensor(part, "F32", values.shape, values)

    def type_of(self, part: str) -> str:
        """Always F32."""
        return "F32"

    def random(self, part: str) -> RandomTensor:
        """Its distribution; a device may draw a large one itself."""
        digest = hashlib.blake2b(f"{self._seed}:{part}".encode(), digest_size=16).digest()
        mean = 1.0 if part.endswith("norm.weight") else 0.0
        return RandomTensor(mean, STANDARD_DEVIATION, int.from_bytes(digest, "little"))
