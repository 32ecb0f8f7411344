"""`python -m lab.numerics`: fills the tables of docs/numerics.md from lab/results; --check says if they are stale.

A table stands between `<!-- perplexity-NAME:start -->` and `<!-- perplexity-NAME:end -->`, made from the result of that
name. No number of a table is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"
_MARKED = re.compile(r"(<!-- (perplexity-[\w.-]+):start -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """One result of lab.perplexity as a Markdown table, with where it came from under it."""
    against = result["against"]
    stored = ", ".join(f"{name} x{count}" for name, count in result["stored_types"].items())
    lines = [
        f"**{result['model']}** ({stored}), {result['num_tokens']:,} tokens of {result['text']['name']} "
        f"in windows of {result['window']:,}",
        "",
        "| arithmetic | perplexity | difference | KL, nats | KL, 99th percentile | same top 1 |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {against['runtime']} | {against['perplexity']:.4f} | | | | |",
        *(_row(row) for row in result["rows"]),
        "",
        f"`{result['command']}`, {result['machine']}, {result['date']}",
    ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    difference = f"{row['difference']:+.3%}" + ("" if error is None else f" ± {error:.3%}")
    return (
        f"| {row['runtime']} | {row['perplexity']:.4f} | {difference} | {row['kl']:.6f} | {row['kl_p99']:.6f} "
        f"| {row['top1_agreement']:.2%} |"
    )


def filled(page: str, results: Path) -> str:
    """The page with every marked place filled from the result of its name."""

    def fill(match: re.Match[str]) -> str:
        result = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + table(result) + match[4]

    return _MARKED.sub(fill, page)


def main(page: Path, results: Path, check: bool) -> int:
    """Rewrites the page, or with `check` returns 1 when that would change it."""
    old = page.read_text(encoding="utf-8")
    new = filled(old, results)
    if check and new != old:
        print(f"{page.name} does not show the numbers of {results.name}: run python -m lab.numerics")
        return 1
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(PAGE, RESULTS, "--check" in sys.argv[1:]))
