"""Which attention kernels run for which shapes, and what is said where they cannot."""

import threading
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.errors import ConfigError, UnsupportedError  # noqa: E402
from octavo.program.ops import Attention  # noqa: E402
from octavo.runtime.cuda import operators  # noqa: E402
from octavo.runtime.cuda.backend import AttentionBackend  # noqa: E402
from octavo.runtime.cuda.kernels import attention  # noqa: E402
from octavo.runtime.cuda.runtime import CudaRuntime  # noqa: E402
from octavo.runtime.reference import ReferenceRuntime  # noqa: E402
from tests.gpu.test_kernels import HANDLE  # noqa: E402
from tests.runtime.programs import Piece, Steps, attention_program, load, run  # noqa: E402

CPU, CARD = torch.device("cpu"), torch.device("cuda")
NODE = Attention("attention", HANDLE, HANDLE, 0, 16, 8, 128, scale=1.0)
TRITON = attention.decode_attention, attention.prefill_attention
CPP = operators.decode_attention, operators.prefill_attention


@pytest.fixture
def built(monkeypatch):
    """As on a Hopper card with nvcc."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(operators, "load", lambda: None)
    return lambda name, dtype=torch.bfloat16: AttentionBackend(name, dtype, CARD)


def test_each_shape_has_the_kernel_that_was_faster(built):
    chosen = built("auto")
    assert chosen.prepare([NODE], 16, 2) == 64
    assert chosen.prefill is CPP[1]
    found = [chosen.decode(NODE, count, 16, size) for count, size in ((1, 2), (64, 2), (65, 2), (256, 1))]
    assert found == [CPP[0], CPP[0], TRITON[0], CPP[0]]
    for other, block_size, size in (
        (replace(NODE, head_dim=96), 16, 2),
        (replace(NODE, window=100), 16, 2),
        (replace(NODE, softcap=3.0), 16, 2),
        (NODE, 32, 2),
        (NODE, 16, 1),
    ):
        assert chosen.prepare([other], block_size, size) == attention.queries_per_tile(other.head_dim, 2, 2)
        assert chosen.prefill is TRITON[1]


def test_a_name_is_kept_to(built):
    triton, cuda = built("triton"), built("cuda")
    assert triton.prepare([NODE], 16, 2) == 32
    assert (triton.decode(NODE, 1, 16, 1), triton.prefill) == TRITON
    small = replace(NODE, head_dim=64)
    assert cuda.prepare([small], 16, 2) == 64
    assert (cuda.decode(small, 256, 16, 2), cuda.prefill) == CPP
    assert cuda.decode(replace(NODE, head_dim=96), 1, 16, 2) is TRITON[0]


def test_other_types_are_tritons(built):
    assert built("auto", torch.float32).prepare([NODE], 16, 4) == attention.queries_per_tile(128, 2, 4)
    with pytest.raises(UnsupportedError, match=r"--attention-backend cuda.*take auto"):
        built("cuda", torch.float32)
    AttentionBackend("auto", torch.bfloat16, CPU).prepare([NODE], 16, 2)


def test_layers_of_several_shapes_are_refused(built):
    with pytest.raises(UnsupportedError, match="one shape"):
        built("triton").prepare([NODE, replace(NODE, num_kv_heads=2)], 16, 2)


def test_without_a_compiler_auto_takes_triton_and_cuda_says_why(built, monkeypatch):
    def fail():
        raise ConfigError("no nvcc found")

    monkeypatch.setattr(operators, "load", fail)
    chosen = built("auto")
    assert chosen.prepare([NODE], 16, 2) == 32
    assert (chosen.decode(NODE, 1, 16, 2), chosen.prefill) == TRITON
    with pytest.raises(ConfigError, match="no nvcc"):
        built("cuda").prepare([NODE], 16, 2)


def test_compiling_does_not_wait_for_the_compiler_of_cpp(built, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(operators, "load", lambda: done.wait(30))
    chosen = built("auto")
    assert chosen.prepare([NODE], 16, 2, waits=False) == 32
    assert (chosen.decode(NODE, 1, 16, 2), chosen.prefill) == TRITON
    done.set()
    assert chosen.prepare([NODE], 16, 2) == 64
    assert (chosen.decode(NODE, 1, 16, 2), chosen.prefill) == CPP


@pytest.mark.gpu
def test_the_flag_is_honoured_on_a_card(monkeypatch):
    called = []
    for name in ("decode_attention", "prefill_attention"):
        original = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, f=original, n=name, **k: (called.append(n), f(*a, **k)))
    plan = [[Piece(0, 0, 150), Piece(1, 0, 3)], [Piece(0, 150, 1), Piece(1, 3, 40)]]
    for backend, expected in (("triton", set()), ("cuda", {"decode_attention", "prefill_attention"})):
        called.clear()
        steps, program = Steps(), attention_program(heads=4, kv_heads=2, dim=64)
        reference = load(ReferenceRuntime(), program, dtype="bfloat16", steps=steps)
        runtime = load(CudaRuntime("bfloat16", attention_backend=backend), program, dtype="bfloat16", steps=steps)
        for pieces in plan:
            inputs = steps.inputs(pieces)
            want, got = run(reference, inputs), run(runtime, inputs)
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-2 * np.abs(want).max())
        assert set(called) == expected
