"""The command line: one file per verb. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `octavo` command; exits with the verb's status."""
    from octavo.cli.app import run

    sys.exit(run(sys.argv[1:]))
