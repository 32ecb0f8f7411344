"""Fills the numbers of README.md from docs/results/*.json; with --check, says whether they are up to date.

A result is {"what": ..., "date": ..., "machine": ..., "command": ..., "rows": [[name, value, ...], ...]}, with
"columns" where a row has more than one value. No number is typed into README by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

START, END = "<!-- numbers:start -->", "<!-- numbers:end -->"
KEYS = ("what", "date", "machine", "command", "rows")


def table(result: dict[str, object]) -> str:
    """One result as a Markdown table, with where it came from under it."""
    missing = [key for key in KEYS if key not in result]
    if missing:
        raise SystemExit(f"a result lacks {', '.join(missing)}: {result}")
    rows = result["rows"]
    assert isinstance(rows, list)
    columns = result.get("columns", [""])
    assert isinstance(columns, list)
    lines = [f"| {' | '.join([str(result['what']), *columns])} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"`{result['command']}`, {result['machine']}, {result['date']}"])


def filled(readme: str, folder: Path) -> str:
    """README with its marked place filled, in order of the file names."""
    before, _, rest = readme.partition(START)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"README.md lacks {START} ... {END}")
    tables = [table(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return before + "\n\n".join([START, *tables, END]).replace(f"{START}\n\n{END}", f"{START}\n{END}") + after


def main(root: Path, check: bool) -> int:
    """Rewrites README.md, or with `check` returns 1 when that would change it."""
    path = root / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old, root / "docs" / "results")
    if check and new != old:
        print("README.md does not show the numbers of docs/results: run python tools/readme_numbers.py")
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent, "--check" in sys.argv[1:]))
