"""Compiles the CUDA C++ operators of cpp/ with the nvcc found: `python -m octavo.runtime.cuda.build`.

One shared library with code for sm_80 and sm_90 behind a C interface, so that one build serves every torch and Python.
It is built when `--cuda-ops cuda` first asks for it; without nvcc, and without that flag, Triton's kernels run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from octavo.errors import ConfigError

LIBRARY = Path(__file__).with_name("liboctavo_cuda.so")
SOURCES = sorted((Path(__file__).parent / "cpp").glob("*.cu"))
_TARGETS = ("80", "90")


def find_nvcc() -> str | None:
    """The compiler: $CUDA_HOME/bin/nvcc, or the first on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def built_library() -> Path:
    """The library, compiled if it is absent or older than a source.

    Raises:
        ConfigError: there is no nvcc, or it failed; with what it said.
    """
    if LIBRARY.exists() and all(LIBRARY.stat().st_mtime >= source.stat().st_mtime for source in SOURCES):
        return LIBRARY
    nvcc = find_nvcc()
    if nvcc is None:
        raise ConfigError("--cuda-ops cuda: no nvcc found: install the CUDA toolkit, or take --cuda-ops triton")
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in _TARGETS]
    made = LIBRARY.with_suffix(f".{os.getpid()}.so")  # a process that builds beside this one finds all or nothing
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", *targets, "-o", str(made)]
    done = subprocess.run([*command, *map(str, SOURCES)], capture_output=True, text=True)  # no shell, our own files
    if done.returncode:
        raise ConfigError(f"--cuda-ops cuda: {nvcc} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    made.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    print(built_library())
