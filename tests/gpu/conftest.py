"""Runs the cuda runtime on a card where there is one, else its kernels under Triton's interpreter on the CPU."""

import os
from importlib.util import find_spec

import pytest

if find_spec("torch") and find_spec("triton"):
    import torch

    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of them
        from tests.gpu.interpreter import mend

        mend()
else:
    DEVICE = "none"
    collect_ignore_glob = ["test_*.py"]  # the kernels are Triton's: pip install 'octavo[gpu]'


def pytest_collection_modifyitems(items):
    if DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def device():
    """Where kernels run: "cuda", or "cpu" under the interpreter."""
    return DEVICE
