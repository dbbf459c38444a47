import importlib.util

import pytest

HAS_TTSEM = importlib.util.find_spec("ttsem") is not None


def pytest_collection_modifyitems(items):
    if not HAS_TTSEM:
        reason = "ttsem has an environment of its own; `make test-races` makes it"
        for item in items:
            if "races" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def ttsem(monkeypatch):
    """Launches are run by ttsem, which raises KernelFault at a race or an access out of bounds."""
    from ttsem import sanitize

    from races import happens_before

    happens_before.install(monkeypatch)
    with sanitize.session(90, cuda_is_cpu=False) as session:
        yield sanitize
    assert session.launches == 1
    assert session.races_unchecked == 0
