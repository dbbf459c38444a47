"""The command line: audit, verify and fixture; benchmarks/commands.py adds compile, tune and bench."""
