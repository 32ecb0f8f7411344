"""Building and loading the library: what is wrong is said, with the next step."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from octavo.errors import ConfigError
from octavo.runtime.native import build
from octavo.runtime.native.library import LEVELS, LIBRARY, open_library


def test_the_names_of_the_library_agree() -> None:
    assert build.LIBRARY == LIBRARY


def test_x86_has_more_levels_than_others() -> None:
    assert list(build.levels("x86_64")) == list(LEVELS[1:])
    assert list(build.levels("aarch64")) == ["portable"]


def test_no_compiler_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match=r"apt install g\+\+"):
        build.find_compiler()


def test_a_broken_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(build.BuildError, match="cannot run"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())


def compile_c(tmp_path: Path, source: str) -> Path:
    path = tmp_path / LIBRARY
    command = [*build.find_compiler(), "-x", "c++", "-", "-shared", "-fPIC", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def test_a_library_of_another_abi_is_refused(tmp_path: Path) -> None:
    path = compile_c(tmp_path, 'extern "C" int octavo_abi_version() { return 999; }')
    with pytest.raises(ConfigError, match=r"ABI 999.*rebuild it with"):
        open_library(path)


def test_a_missing_or_broken_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.*rebuild"):
        open_library(tmp_path / LIBRARY)
    (tmp_path / LIBRARY).write_text("not a library")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*rebuild"):
        open_library(tmp_path / LIBRARY)
