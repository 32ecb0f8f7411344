"""Compiles the CUDA C++ operators of cpp/ with the nvcc found: `python -m octavo.runtime.cuda.build`.

One shared library behind a C interface, so that one build serves every torch and Python: code for sm_80, for Hopper
with what it alone has (sm_90a), and for what comes later, which the driver compiles. A start that may want it builds it
while torch is imported, all files at once; without nvcc Triton's kernels run.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from os import environ
from pathlib import Path

from octavo.errors import ConfigError

LIBRARY = Path(__file__).with_name("liboctavo_cuda.so")
SOURCES = sorted((Path(__file__).parent / "cpp").glob("*.cu*"))
_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")


def find_nvcc() -> str | None:
    """The compiler: $CUDA_HOME/bin/nvcc if that is set, else the first on the PATH."""
    home = environ.get("CUDA_HOME")
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
    compiler = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--threads=0"]
    compiler += [f"-gencode={target}" for target in _TARGETS]
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:  # who builds beside this one finds all or nothing
        objects = {f"{folder}/{source.stem}.o": source for source in SOURCES if source.suffix == ".cu"}
        _run([[*compiler, "-c", "-o", name, str(source)] for name, source in objects.items()])
        _run([[*compiler, "-shared", "-o", f"{folder}/all.so", *objects]])
        Path(folder, "all.so").replace(LIBRARY)
    return LIBRARY


@functools.cache
def begin() -> Future[Path]:
    """Builds it in a thread, once."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(built_library)
    pool.shutdown(wait=False)
    return future


def _run(commands: list[list[str]]) -> None:
    """Runs all at once (no shell, our own files). Raises ConfigError with what the first that failed said."""
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    for process, said in [(process, process.communicate()[0]) for process in running]:
        if process.returncode:
            raise ConfigError(f"C++ kernels: {commands[0][0]} failed:\n{said[-2000:]}")


if __name__ == "__main__":
    print(built_library())
