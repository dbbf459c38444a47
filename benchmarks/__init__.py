"""Measurements: benchmarks, tuning, compile reports and checks."""
