"""What `make serve` says on a machine that lacks something. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "env", "tr", "dirname", "uname", "touch", "tail")


def machine(folder: Path, **programs: str) -> dict[str, str]:
    """An environment whose PATH holds a few system tools and these scripts."""
    for name in TOOLS:
        path = shutil.which(name)
        assert path is not None
        (folder / name).symlink_to(path)
    for name, script in programs.items():
        path = folder / name.replace("_", ".")
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)
    return {"PATH": str(folder), "HOME": os.environ.get("HOME", "/")}


def set_up(tmp_path: Path, environment: dict[str, str], **extra: str) -> str:
    """Runs the script, which must fail, and returns what it said."""
    done = subprocess.run(
        [str(shutil.which("bash")), str(ROOT / "tools" / "setup.sh"), str(tmp_path / "venv"), "base"],
        cwd=tmp_path,
        env=environment | extra,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert not (tmp_path / "venv").exists()
    return done.stderr


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


OLD = 'if [[ $1 == -c ]]; then exit 1; else echo "Python 3.9.2"; fi'


def test_no_compiler(tmp_path: Path, bin_folder: Path) -> None:
    said = set_up(tmp_path, machine(bin_folder))
    assert "no C++ compiler found" in said
    assert "sudo apt install g++" in said


def test_cxx_that_is_not_there(tmp_path: Path, bin_folder: Path) -> None:
    assert "CXX is set to 'icpx'" in set_up(tmp_path, machine(bin_folder), CXX="icpx")


def test_python_too_old_is_named(tmp_path: Path, bin_folder: Path) -> None:
    said = set_up(tmp_path, machine(bin_folder, gxx="", python3=OLD), CXX="gxx", MAKECMDGOALS="serve")
    assert "Python 3.11 or newer is needed" in said
    assert "is Python 3.9.2" in said
    assert "make serve PYTHON=/path/to/python3.12" in said


def test_a_newer_python_beside_an_old_one_is_taken_and_venv_missed(tmp_path: Path, bin_folder: Path) -> None:
    new = f'if [[ $2 == *ensurepip* ]]; then exit 1; fi; exec {sys.executable} "$@"'
    said = set_up(tmp_path, machine(bin_folder, gxx="", python3=OLD, python3_13=new), CXX="gxx")
    assert "has no venv module" in said
    assert "sudo apt install python3-venv" in said


def test_no_python_at_all(tmp_path: Path, bin_folder: Path) -> None:
    assert "no Python found" in set_up(tmp_path, machine(bin_folder, gxx=""), CXX="gxx")
