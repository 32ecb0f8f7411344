from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "ceilings.py"


@pytest.fixture(scope="module")
def ceilings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ceilings", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_blanks_comments_and_docstrings_are_free(ceilings: ModuleType) -> None:
    source = (
        '"""Doc\nstring."""\n\n# comment\nx = 1  # counted\n\ndef f():\n    """Doc."""\n    return """two\nlines"""\n'
    )
    assert ceilings.code_lines(source) == {5, 7, 9, 10}


def test_a_long_file_must_say_why(ceilings: ModuleType) -> None:
    source = "x = 1\n" * 401
    assert "401 code lines" in ceilings.complaints("a.py", source)[0][0]
    assert ceilings.complaints("a.py", "# long: a table\n" + source)[0] == []
    assert ceilings.complaints("a.py", "x = 1\n" * 400)[0] == []


def test_a_long_function_must_say_why(ceilings: ModuleType) -> None:
    body = "".join(f"    x = {i}\n" for i in range(61))
    assert "f() has 61 code lines" in ceilings.complaints("a.py", f"def f():\n{body}")[0][0]
    assert ceilings.complaints("a.py", f"# long: steps in order\ndef f():\n{body}")[0] == []


def test_the_package_is_under_its_ceiling(
    tmp_path: Path, ceilings: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "octavo").mkdir()
    (tmp_path / "octavo" / "big.py").write_text("# long: on purpose\n" + "x = 1\n" * (ceilings.MAX_PACKAGE + 1))
    assert ceilings.main(tmp_path) == 1
    assert f"octavo/ has {ceilings.MAX_PACKAGE + 1:,} code lines" in capsys.readouterr().out
