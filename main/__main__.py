"""`indexproj` and `python -m indexproj`."""

import os
import sys

from .benchmarks import commands  # noqa: F401  # adds compile, tune, bench and report
from .indexer.cli.commands import app


def main() -> None:
    """Ends with 2, without a traceback, if output cannot be written, such as to a full disk."""
    try:
        try:
            app(prog_name="indexproj")
        finally:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
