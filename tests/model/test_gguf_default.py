"""What a GGUF file in blocks is computed in on a CPU where nobody says: int8, or as stored if that takes too much."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.executor.local import LocalExecutor
from octavo.models.spec import ModelFiles
from octavo.runtime.base import Float32
from octavo.worker.worker import WorkerInfo
from tests.engine.test_core import run
from tests.model.gguf_tiny import convert
from tests.model.tiny import make_tiny

SETTINGS = {
    "runtime": "native",
    "num_threads": 1,
    "num_gpu_blocks_override": 6,
    "max_num_batched_tokens": 8,
    "max_num_seqs": 2,
    "max_model_len": 48,
}
OVERRIDES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def blocks(folder: Path, architecture: str) -> ModelFiles:
    own = {"query_pre_attn_scalar": 16} if architecture == "gemma3" else {"mlp_bias": False}
    hf = make_tiny(architecture, folder / "hf", **OVERRIDES, **own)
    return convert(hf, folder / "x.gguf", quantize=gguf.GGMLQuantizationType.Q4_1)


def served(files: ModelFiles, **settings: Any) -> tuple[WorkerInfo, Float32]:
    """What a loaded model tells, and the logits of the last step of two prompts in chunks."""
    executor = LocalExecutor(EngineConfig(model=str(files.path), **{**SETTINGS, **settings}), files)
    core = EngineCore(executor.worker._config, executor, executor.start())
    run(core, [list(range(3, 23)), [5, 6, 7]], max_tokens=1)
    logits = executor.worker.runtime.logits()
    core.close()
    return core.info, logits


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_blocks_are_computed_in_int8(tmp_path: Path, architecture: str) -> None:
    files = blocks(tmp_path, architecture)
    info, logits = served(files)
    assert info.dtype == "int8"
    assert info.runtime.endswith("1 threads, int8)")
    np.testing.assert_array_equal(logits, served(files, quantization="int8")[1])
    np.testing.assert_array_equal(logits, served(files, dtype="bfloat16", quantization="int8")[1])
    stored, kept = served(files, dtype="quantized")
    assert stored.dtype == "quantized"
    assert stored.plan.weight_bytes < info.plan.weight_bytes
    assert stored.plan.kv_dtype == info.plan.kv_dtype == "bfloat16"
    assert not np.array_equal(logits, kept)
    assert served(files, runtime="reference")[0].dtype == "float32"  # what the file says
    native, defined = (
        served(files, runtime=runtime, quantization="int8", kv_cache_dtype="float32")[1]
        for runtime in ("native", "reference")
    )
    np.testing.assert_allclose(native, defined, atol=0.02 * np.abs(defined).max())


def test_floats_are_computed_as_stored(tmp_path: Path) -> None:
    hf = make_tiny("llama", tmp_path / "hf", **OVERRIDES)
    assert served(convert(hf, tmp_path / "x.gguf"))[0].dtype == "float32"


def test_int8_takes_at_most_half_of_the_memory_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "octavo")
    files = blocks(tmp_path, "llama")
    weights = served(files)[0].plan.weight_bytes

    monkeypatch.setattr("octavo.worker.worker.free_memory", lambda: 1 << 30)

    def with_share(num_bytes: int, **settings: Any) -> str:
        monkeypatch.setattr("octavo.worker.memory.PREFERRED_SHARE", num_bytes / (1 << 30))
        return served(files, **settings)[0].dtype

    assert with_share(weights) == "int8"
    assert not caplog.records
    assert with_share(weights - 1) == "quantized"
    assert "weights are kept quantized instead of int8, which is faster: it takes" in caplog.text
    assert len(caplog.records) == 1
    assert with_share(weights - 1, quantization="int8") == "int8"
    assert len(caplog.records) == 1
