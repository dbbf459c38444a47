"""Measurements: tuning, compile reports and checks, and the pytest-benchmark suites of `indexproj bench`."""
