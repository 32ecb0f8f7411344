"""A process that compiles Triton kernels into Triton's cache: `python -m octavo.runtime.cuda.compiling ARCH KEY`.

On its standard input, a line each, is what to compile, as Triton writes it down (JSON), behind a word: "caller" where
what calls the kernel is compiled, too. When that is done it prints a line. It needs neither torch nor a card, so it
begins at once, and shares nothing with others: threads of one process would wait for Python's lock.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import cache
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


def compile_kernel(wanted: str, *, with_caller: bool) -> None:
    """Compiles a kernel, and what calls it, which is C and compiled by gcc."""
    module, _, name = json.loads(wanted)["name"].rpartition(".")
    compiled = getattr(import_module(module), name).preload(wanted)
    if with_caller:
        CudaLauncher(compiled.src, compiled.metadata)


if __name__ == "__main__":
    driver.set_active(Card(int(sys.argv[1])))
    cache.triton_key = lambda: sys.argv[2]  # whoever started this knows it: to make it, all of Triton is read
    for line in sys.stdin:
        word, _, text = line.partition(" ")
        compile_kernel(text, with_caller=word == "caller")
        print("done", flush=True)
