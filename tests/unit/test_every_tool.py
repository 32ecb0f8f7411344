"""Every tool starts: what it imports is still where it looks for it (the long ones run too seldom to tell)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_tool_finds_what_it_imports() -> None:
    names = sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py"))
    assert "tools.soak_server" in names
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
