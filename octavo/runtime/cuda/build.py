"""Compiles the CUDA C++ operators of cpp/ with the nvcc found: `python -m octavo.runtime.cuda.build`.

One shared library behind a C interface, so that one build serves every torch and Python: code for sm_80, for Hopper
with what it alone has (sm_90a), and for what comes later, which the driver compiles.
It is built when first asked for, by `--attention-backend` or `--cuda-ops`; without nvcc Triton's kernels run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from octavo.errors import ConfigError

LIBRARY = Path(__file__).with_name("liboctavo_cuda.so")
SOURCES = sorted((Path(__file__).parent / "cpp").glob("*.cu"))
_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


def find_nvcc() -> str | None:
    """The compiler: $CUDA_HOME/bin/nvcc if that is set, else the first on the PATH."""
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
        raise ConfigError(
            "C++ kernels: no nvcc found: install the CUDA toolkit, or leave out --cuda-ops and --attention-backend"
        )
    targets = [f"-gencode={target}" for target in _TARGETS]
    made = LIBRARY.with_suffix(f".{os.getpid()}.so")  # a process that builds beside this one finds all or nothing
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "--threads=0", *targets, "-o", str(made)]
    done = subprocess.run([*command, *map(str, SOURCES)], capture_output=True, text=True)  # no shell, our own files
    if done.returncode:
        raise ConfigError(f"C++ kernels: {nvcc} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    made.replace(LIBRARY)
    return LIBRARY


if __name__ == "__main__":
    print(built_library())
