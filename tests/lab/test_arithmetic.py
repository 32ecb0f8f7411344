"""The simulated arithmetics: what rounding does to values, and that every Linear's input is rounded, no other."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lab.arithmetic import (
    ARITHMETICS,
    REQUANTIZABLE,
    RequantizedWeights,
    SimulatedRuntime,
    SimulatedWeights,
    exact,
    to_bf16,
    to_int8,
)
from lab.teacher import one_request
from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles
from octavo.models.weights import open_weights
from octavo.runtime.base import SamplingInputs, Tensor
from octavo.runtime.reference import ReferenceRuntime
from octavo.runtime.reference.tensors import to_float32

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    files = ModelFiles("tiny", "hf", folder)
    spec = read_spec(files, max_model_len=64)
    return record(spec), open_weights(files, spec, load_format="dummy", seed=3)


def logits_of(runtime, program, weights):
    runtime.load(program, weights, dtype="float32", max_num_tokens=32, max_num_logits=32, max_num_requests=1)
    runtime.allocate_kv(2, 16)
    runtime.execute(one_request([7, 30, 11, 5, 52, 0, 19], first_logits=0))
    runtime.sample(SamplingInputs.greedy(7))
    return runtime.logits()


def test_bf16_rounds_ties_to_even():
    step = 2.0**-7  # between neighbours of 1
    values = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.75 * step, -1 - step / 2, 0], np.float32)
    assert to_bf16(values).tolist() == [1, 1 + 2 * step, 1 + step, -1, 0]


def test_int8_keeps_its_own_levels():
    levels = np.arange(-127, 128, dtype=np.float32).reshape(1, 255) * np.float32(0.5)
    np.testing.assert_array_equal(to_int8(None)(levels), levels)


def test_int8_errs_by_half_a_level_of_its_own_segment():
    values = np.random.default_rng(0).normal(size=(3, 5, 100)).astype(np.float32)  # 100: no multiple of 32
    values[..., 40] = 50  # in the second segment
    error = np.abs(to_int8(32)(values) - values)
    assert error[..., 32:64].max() <= 50 / 127 / 2 * 1.0001
    for start, end in ((0, 32), (64, 96), (96, 100)):
        bound = np.abs(values[..., start:end]).max(axis=-1, keepdims=True) / 127 / 2
        assert (error[..., start:end] <= bound * 1.0001).all()
    assert np.abs(to_int8(None)(values) - values)[..., :32].max() > 0.1  # one scale for all: the outlier is felt


def test_int8_of_zeros_is_zeros():
    np.testing.assert_array_equal(to_int8(32)(np.zeros((2, 64), np.float32)), np.zeros((2, 64)))


def test_exact_simulation_is_the_reference(model):
    program, weights = model
    simulated = logits_of(SimulatedRuntime(exact), program, SimulatedWeights(weights, exact))
    np.testing.assert_array_equal(simulated, logits_of(ReferenceRuntime(), program, weights))


def test_every_linear_sees_rounded_inputs(model):
    seen = []

    def count(x):
        seen.append(x.shape)
        return np.zeros_like(x)

    program, weights = model
    logits = logits_of(SimulatedRuntime(count), program, weights)
    assert len(seen) == 2 * 4 + 1  # qkv, out, gate and up, down; head
    np.testing.assert_array_equal(logits, np.zeros((7, 53)))


def test_the_residual_stream_is_not_rounded(model):
    """Linears that give nothing leave the embedding as it was: the head then sees its norm, bit for bit."""
    program, weights = model
    inputs = []

    def keep(x):
        inputs.append(x.copy())
        return np.zeros_like(x) if len(inputs) < 9 else x

    logits_of(SimulatedRuntime(keep), program, weights)
    embedding = np.asarray(weights.get("embed").data, np.float32)[[7, 30, 11, 5, 52, 0, 19]]
    norm = np.asarray(weights.get("final_norm.weight").data, np.float32)
    expected = embedding / np.sqrt(np.square(embedding).mean(axis=-1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(inputs[8], expected, rtol=1e-5)


def test_weights_are_rounded_and_vectors_are_not(model):
    _, weights = model
    simulated = SimulatedWeights(weights, lambda values: values * 0)
    assert not simulated.get("layers.0.q.weight").data.any()
    np.testing.assert_array_equal(simulated.get("final_norm.weight").data, weights.get("final_norm.weight").data)


@pytest.mark.parametrize("stored_type", REQUANTIZABLE)
def test_requantised_matrices_are_blocks_near_the_values(stored_type):
    values = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    tensors = {"up": Tensor("up", "F32", (3, 64), values), "norm": Tensor("norm", "F32", (64,), values[0])}
    weights = RequantizedWeights(SimpleNamespace(get=tensors.get), stored_type)
    requantised = weights.get("up")
    assert (requantised.type, requantised.shape) == (stored_type, (3, 64)) == (weights.type_of("up"), (3, 64))
    assert requantised.nbytes < values.nbytes / 3
    np.testing.assert_allclose(to_float32(requantised), values, atol=0.25)
    assert (weights.get("norm"), weights.type_of("norm")) == (tensors["norm"], "F32")


@pytest.mark.parametrize("name", ARITHMETICS)
def test_each_differs_from_exact_but_not_by_much(model, name):
    program, weights = model
    arithmetic = ARITHMETICS[name]
    logits = logits_of(SimulatedRuntime(arithmetic.activations), program, SimulatedWeights(weights, arithmetic.weights))
    right = logits_of(ReferenceRuntime(), program, weights)
    error = np.abs(logits - right).max() / np.abs(right).max()
    assert 0 < error < 0.05
