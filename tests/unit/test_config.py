"""EngineConfig: bounds, and refusal by name of what is not built."""

import dataclasses
from typing import get_args

import pytest

from octavo import config
from octavo.config import FUSIONS, EngineConfig, EvictionPolicy
from octavo.errors import ConfigError, UnsupportedError
from octavo.kvcache.eviction import EVICTIONS


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("dtype", "int3"),
        ("load_format", "pickle"),
        ("runtime", "tpu"),
        ("scheduling_policy", "random"),
        ("kv_cache_dtype", "fp9"),
        ("max_model_len", 0),
        ("max_num_seqs", -1),
        ("max_num_seqs", 600),  # above max_num_batched_tokens
        ("max_num_batched_tokens", -1),
        ("block_size", 257),
        ("gpu_memory_utilization", 0.0),
        ("num_threads", 0),
        ("max_logprobs", 21),
        ("max_logprobs", True),
        ("max_num_seqs", None),
        ("max_model_len", "4k"),
        ("gpu_memory_utilization", "0.9"),
        ("enable_prefix_caching", "no"),
        ("served_model_name", ["a"]),
        ("prefix_caching_hash_key", b"key"),
        ("model", None),
        ("dtype", None),
    ],
)
def test_bad_values_name_the_field(name, bad):
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: bad})


@pytest.mark.parametrize(
    ("name", "value"),
    [("quantization", "awq"), ("tensor_parallel_size", 2), ("pipeline_parallel_size", 2), ("trust_remote_code", True)],
)
def test_unbuilt_settings_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedError, match=name):
        EngineConfig(**{name: value})


def test_an_unknown_argument_is_refused_and_the_known_ones_listed():
    with pytest.raises(UnsupportedError, match="max_model_len"):
        EngineConfig.from_kwargs(max_model_length=3)


def test_every_choice_is_there_and_is_checked():
    assert set(get_args(EvictionPolicy)) == set(EVICTIONS)
    for name in ("load_format", "runtime", "prefix_eviction_policy", "cuda_ops"):
        with pytest.raises(ConfigError, match=f"{name} must be one of"):
            EngineConfig(**{name: ["auto"]})


def test_fusions_are_switched_off_together_or_by_name():
    assert EngineConfig().fusions == set(FUSIONS)
    assert EngineConfig(fuse_ops=False).fusions == set()
    assert EngineConfig(disable_fusions="rope,pdl").fusions == set(FUSIONS) - {"rope", "pdl"}
    with pytest.raises(ConfigError, match=r"disable_fusions must be one of norm, .*, pdl, not 'all'"):
        EngineConfig(disable_fusions="norm,all")


def test_a_gpu_takes_more_at_once_unless_told_otherwise(monkeypatch, tmp_path):
    def limits(**given):
        made = EngineConfig(**given)
        return made.max_num_seqs, made.max_num_batched_tokens

    monkeypatch.setattr(config, "find_spec", lambda name: name)
    monkeypatch.setattr(config, "GPU_FILES", (tmp_path / "absent", tmp_path / "card"))
    assert limits() == (64, 512)
    (tmp_path / "card").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert limits() == limits(runtime="cuda") == (256, 8192)
    assert limits(runtime="native") == (64, 512)
    assert limits(max_num_seqs=7) == (7, 8192)
    assert limits(max_num_batched_tokens=100) == (100, 100)
    assert dataclasses.replace(EngineConfig(), runtime="native").max_num_seqs == 256, "what is resolved stays"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert limits() == (64, 512)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(config, "find_spec", {"torch": None}.get)
    assert limits() == (64, 512)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 1
