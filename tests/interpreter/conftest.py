import pytest

from indexproj.kernels.target import INTERPRETED


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        reason = "the interpreter needs a process of its own, started with TRITON_INTERPRET=1; `make test` does that"
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))
