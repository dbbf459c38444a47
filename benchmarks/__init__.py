"""pytest-benchmark suites; `indexproj bench` runs them and shows what they find."""
