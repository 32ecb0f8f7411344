"""--dtype float16: matrices hold float16 values, computed in float32; on both runtimes the same."""

import numpy as np
import pytest

from octavo.errors import UnsupportedError
from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.runtime.base import Tensor
from octavo.runtime.half import HalfWeights
from tests.engine.test_core import files, make_core, run

__all__ = ["files"]


def test_matrices_are_rounded_and_vectors_are_not(files):
    spec = read_spec(files)
    source = open_weights(files, spec, load_format="dummy")
    half = HalfWeights(source)
    changed = 0
    for part in (part for weight in record(spec).weights for part in weight.parts):
        stored, given = source.get(part), half.get(part)
        if len(stored.shape) == 1:
            np.testing.assert_array_equal(given.data, stored.data)
            continue
        assert given.type == "F16"
        np.testing.assert_array_equal(given.data, stored.data.astype(np.float16))
        changed += int(np.any(given.data.astype(np.float32) != stored.data))
    assert changed > 0


def test_both_runtimes_agree_and_differ_from_float32(files):
    prompts = [[5, 6, 7], list(range(3, 60))]
    logprobs = {}
    for runtime in ("native", "reference"):
        for dtype in ("float16", "float32"):
            core = make_core(files, runtime=runtime, dtype=dtype)
            assert core.info.dtype == dtype
            run(core, prompts)
            logprobs[runtime, dtype] = core._executor.worker.runtime.logits()
            core.close()
    np.testing.assert_allclose(logprobs["native", "float16"], logprobs["reference", "float16"], atol=1e-4)
    assert np.abs(logprobs["native", "float16"] - logprobs["native", "float32"]).max() > 1e-6


def test_values_beyond_float16_are_refused():
    class Large:
        def get(self, part):
            return Tensor(part, "F32", (1, 2), np.array([[1.0, 70000.0]], np.float32))

        def type_of(self, part):
            return "F32"

    with pytest.raises(UnsupportedError, match="holds 70000; float16 ends at 65504"):
        HalfWeights(Large()).get("w")
