"""A process that compiles Triton kernels into Triton's cache: `python -m octavo.runtime.cuda.compiling ARCH`.

On its standard input, a line each, is what to compile, as Triton writes it down (JSON). It needs neither torch nor a
card, so it begins at once, and shares nothing with others: threads of one process would wait for Python's lock.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.driver import driver


class Card:
    """What Triton asks of its driver to compile: the target alone."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        """NVIDIA, compute capability times ten, threads of a warp."""
        return self._target

    def get_current_device(self) -> int:
        """Any: kernels are kept by it."""
        return 0


def compile_kernel(wanted: str) -> None:
    """Compiles a kernel, and what calls it, which is C and compiled by gcc."""
    module, _, name = json.loads(wanted)["name"].rpartition(".")
    compiled = getattr(import_module(module), name).preload(wanted)
    CudaLauncher(compiled.src, compiled.metadata)


if __name__ == "__main__":
    driver.set_active(Card(int(sys.argv[1])))
    for line in sys.stdin:
        compile_kernel(line)
