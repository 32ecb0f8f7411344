"""Ceilings that keep the house readable: code lines of a file, of a function, and of the package.

Code lines are counted without blanks, comments and docstrings, so nobody is punished for explaining. A file may be
longer when its first line says why: `# long: REASON`. A function may be longer when the line above it says so.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

MAX_FILE = 400
MAX_FUNCTION = 60
MAX_PACKAGE = 20_600
FOLDERS = ("octavo", "tests", "tools")
EXCUSE = "# long: "

_SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, not a comment, not a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | _Function) and ast.get_docstring(node, False) is not None:
            docstring = node.body[0]
            lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return lines


def long_functions(source: str, lines: set[int]) -> Iterator[tuple[str, int]]:
    """(name, code lines) of every function over the ceiling that carries no excuse above it."""
    text = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _Function):
            continue
        body_start = node.body[0].lineno
        length = sum(body_start <= line <= (node.end_lineno or body_start) for line in lines)
        first = min((d.lineno for d in node.decorator_list), default=node.lineno)
        excused = first >= 2 and text[first - 2].strip().startswith(EXCUSE)
        if length > MAX_FUNCTION and not excused:
            yield node.name, length


def complaints(name: str, source: str) -> tuple[list[str], int]:
    """What is too long in a file, and how many code lines it has."""
    lines = code_lines(source)
    found = [
        f"{name}: {function}() has {length} code lines; a function fits a screen ({MAX_FUNCTION}): split it"
        for function, length in long_functions(source, lines)
    ]
    if len(lines) > MAX_FILE and not source.startswith(EXCUSE):
        found.append(
            f"{name}: {len(lines)} code lines, the ceiling is {MAX_FILE}: split it by reason to change, "
            f"or say on its first line why not ('{EXCUSE}...')"
        )
    return found, len(lines)


def main(root: Path) -> int:
    """Prints every complaint and the size of the package; the exit status is 1 if there was one."""
    found: list[str] = []
    sizes: dict[str, int] = dict.fromkeys(FOLDERS, 0)
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            more, length = complaints(str(path.relative_to(root)), path.read_text(encoding="utf-8"))
            found.extend(more)
            sizes[folder] += length
    if sizes["octavo"] > MAX_PACKAGE:
        found.append(f"octavo/ has {sizes['octavo']:,} code lines; the ceiling of the package is {MAX_PACKAGE:,}")
    for line in found:
        print(line)
    print("code lines: " + ", ".join(f"{folder} {size:,}" for folder, size in sizes.items()))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
