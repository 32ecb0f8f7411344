"""The command line: one file per verb. Nothing heavy is imported until a verb runs."""

import gc
import sys


def main() -> None:
    """Entry point of the `octavo` command; exits with the verb's status."""
    try:
        if sys.argv[1:2] == ["serve"] and not {"--help", "-h"}.intersection(sys.argv):
            from octavo.engine.spawn import ahead, spawn

            ahead.append(spawn())  # the engine imports while this process does, on another core
            gc.disable()  # until the server is there
        from octavo.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # while this was still being imported
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
