"""The command line: fixture, audit and verify. benchmarks/commands.py adds compile, tune and bench."""
