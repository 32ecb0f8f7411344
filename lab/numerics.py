"""`python -m lab.numerics`: fills the tables of docs/numerics.md from lab/results; --check says if they are stale.

A table stands between `<!-- KIND NAME NAME ...:start -->` and `<!-- end -->`: `alternatives` has a row an arithmetic of
one result, `models` one a result. NAME is that of lab.perplexity's result. No number of a table is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "numerics.md"
_MARKED = re.compile(r"(<!-- (alternatives|models) ([^>]+):start -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]


def alternatives(results: list[Result]) -> list[str]:
    """Arithmetics on the same tokens of one model."""
    (result,) = results
    against = result["against"]
    return [
        f"{result['model']} ({_stored(result)}), {_size(result)}:",
        "",
        "| arithmetic | perplexity | difference | KL, nats | KL, 99th percentile | same top 1 |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {against['runtime']} | {against['perplexity']:.4f} | | | | |",
        *(f"| {row['runtime']} | {row['perplexity']:.4f} | {_distance(row)} |" for row in result["rows"]),
    ]


def models(results: list[Result]) -> list[str]:
    """The same arithmetic on several models or stored types."""
    return [
        "| model, stored types, text | arithmetic: perplexity | compared with | difference | KL, nats "
        "| KL, 99th percentile | same top 1 |",
        "|---|---|---|---:|---:|---:|---:|",
        *(
            f"| {result['model']}: {_stored(result)}; {_size(result)} | {row['runtime']}: {row['perplexity']:.4f} "
            f"| {result['against']['dtype']}: {result['against']['perplexity']:.4f} | {_distance(row)} |"
            for result in results
            for row in result["rows"]
        ),
    ]


def _stored(result: Result) -> str:
    return ", ".join(f"{name} x{count}" for name, count in result["stored_types"].items())


def _size(result: Result) -> str:
    return f"{result['num_tokens']:,} tokens of {result['text']['name']}"


def _distance(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    difference = f"{row['difference']:+.3%}" + ("" if error is None else f" ± {error:.3%}")
    return f"{difference} | {row['kl']:.6f} | {row['kl_p99']:.6f} | {row['top1_agreement']:.2%}"


def filled(page: str, results: Path) -> str:
    """The page with every marked place filled from the results it names; their commands stand under each table."""

    def fill(match: re.Match[str]) -> str:
        paths = [results / f"perplexity-{name}.json" for name in match[3].split()]
        read = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        table = (alternatives if match[2] == "alternatives" else models)(read)
        sources = [f"- `{result['command']}`, {result['machine']}, {result['date']}" for result in read]
        return match[1] + "\n".join([*table, "", *sources, ""]) + match[4]

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
