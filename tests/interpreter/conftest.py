import numpy as np
import pytest

from indexproj.kernels.target import INTERPRETED


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        reason = "the interpreter needs a process of its own, started with TRITON_INTERPRET=1; `make test` does that"
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def exact_dot(monkeypatch):
    """Dots that treat every element alike, as tensor cores do; a BLAS adds up in an order that depends on the shape."""

    def matmul(a, b, dtype):
        total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
        for k in range(a.shape[-1]):
            total += a[..., k, None].astype(dtype) * b[..., k, None, :].astype(dtype)
        return total

    monkeypatch.setattr(np, "matmul", matmul)
