"""The command line: one file per verb. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `octavo` command; exits with the verb's status."""
    try:
        from octavo.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while this was still being imported
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
