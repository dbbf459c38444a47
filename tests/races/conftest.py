import pytest


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
