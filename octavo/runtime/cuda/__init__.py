"""Runs a program on an NVIDIA GPU: Triton and C++ kernels, cuBLAS for large products, CUDA graphs for small steps.

torch and triton (the extra `octavo[gpu]`) are imported in this folder and nowhere else, and only when a runtime
is made.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from octavo import cgroup
from octavo.runtime.cuda import build


def missing(*, builds: bool = False) -> str:
    """Why this runtime cannot run here, as a sentence with the next step; empty when it can.

    torch is asked last: importing it takes seconds, which a machine without a driver need not pay, and in which C++
    kernels can be built, if need be and if `builds`.
    """
    absent = [name for name in ("torch", "triton") if find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed: pip install 'octavo[gpu]'"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) here: install it, or take --runtime native"
    if cgroup.hides_gpus():
        return "CUDA_VISIBLE_DEVICES hides every GPU: unset it, or take --runtime native"
    if builds:
        build.begin()
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU: check nvidia-smi and that torch is a CUDA build, or take --runtime native"
    return ""
