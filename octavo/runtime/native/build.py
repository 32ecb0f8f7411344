"""Compiles native/ into the shared library beside this file: `python -m octavo.runtime.native.build`.

Used by setup.py too, which loads this file by its path, so it imports the standard library only. The kernels
(native/levels/) are compiled once per instruction level, everything else once; the library picks a level when it runs.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = "liboctavo.dylib" if sys.platform == "darwin" else "liboctavo.so"
SOURCES = Path(__file__).resolve().parents[3] / "native"

# -ffp-contract=off: multiply-adds are fused where the source says so, never by a compiler's choice (same bits).
_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-ffp-contract=off"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"]
_X86_LEVELS = {
    "portable": [],
    "avx2": _AVX2,
    "avxvnni": [*_AVX2, "-mavxvnni"],
    "avx512": _AVX512,
    "avx512vnni": [*_AVX512, "-mavx512vnni"],
    "avx512bf16": _AVX512_BF16,
    "amx": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mprfchw"],
}
# The files of native/levels that make a level which is avx2 or avx512 but for them.
_LEVEL_FILES = {
    "avxvnni": {"int8"},
    "avx512vnni": {"int8"},
    "avx512bf16": {"attention", "cache", "int8", "packed", "probe"},
    "amx": {"attention", "attention_int8_tiles", "attention_tiles", "cache", "int8_tiles", "packed_tiles", "probe"},
}


class BuildError(Exception):
    """The library could not be built; the message says what to do."""


def find_compiler() -> list[str]:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is there."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError(
        "Octavo's native runtime needs a C++20 compiler, and none of c++, g++, clang++ is on the PATH. Install one "
        "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX."
    )


def levels(machine: str = "") -> dict[str, list[str]]:
    """Instruction levels to build for a processor, each with its compiler flags."""
    machine = machine or platform.machine()
    return _X86_LEVELS if machine.lower() in ("x86_64", "amd64") else {"portable": []}


def build(target: Path, *, extra_flags: list[str] | None = None) -> Path:
    """Compiles the library into the folder `target` and returns its path.

    Raises:
        BuildError: no compiler, no sources, or the compiler refused.
    """
    if not SOURCES.is_dir():
        raise BuildError(f"the C++ sources are not at {SOURCES}: build from a checkout or a source distribution")
    flags = [*find_compiler(), *_FLAGS, *(extra_flags or [])]
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[Path, list[str], Path]] = []  # (source, its flags, object); longest first
        for level, level_flags in levels().items():
            for source in _level_sources(level):
                target_flags = [f"-DOCTAVO_LEVEL={level}", *level_flags]
                jobs.append((source, target_flags, Path(folder, f"{level}_{source.stem}.o")))
        jobs += [(source, [], Path(folder, f"{source.stem}.o")) for source in sorted(SOURCES.glob("*.cpp"))]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda job: _run([*flags, *job[1], "-c", str(job[0]), "-o", str(job[2])]), jobs))
        target.mkdir(parents=True, exist_ok=True)
        linked = Path(folder, LIBRARY)
        _run([*flags, "-shared", *(str(job[2]) for job in jobs), "-o", str(linked)])
        staged = target / f".{LIBRARY}.{os.getpid()}"
        shutil.copy(linked, staged)
        staged.replace(target / LIBRARY)  # a process that has the old one mapped keeps it
    return target / LIBRARY


def _level_sources(level: str) -> list[Path]:
    sources = sorted((SOURCES / "levels").glob("*.cpp"))
    if level in _LEVEL_FILES:
        return [source for source in sources if source.stem in _LEVEL_FILES[level]]
    return [source for source in sources if not source.stem.endswith("_tiles")]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"cannot run the compiler {command[0]}: {error}") from None
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


def main() -> None:
    """Builds in place; arguments are added to the compiler's flags (sanitizers, -Wall)."""
    try:
        print(build(Path(__file__).resolve().parent, extra_flags=sys.argv[1:]))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
