"""`indexproj` and `python -m indexproj`."""

from .benchmarks import commands  # noqa: F401  # adds compile, tune, bench and report
from .indexer.cli.commands import app

if __name__ == "__main__":
    app(prog_name="indexproj")
