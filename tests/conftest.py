import sys
import zlib

import numpy as np
import pytest
import torch

# `python -m pytest` puts the root of the repository on sys.path, where transformers would take the folder `kernels` for
# the package of that name, import it, and so define this project's operations once more.
sys.modules.setdefault("kernels", None)


@pytest.fixture(autouse=True)
def _seed(request):
    """Every case draws its own numbers, the same ones in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poison():
    """Uninitialised memory is filled with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def mm_to_fp32():
    """torch.mm with out_dtype, which it has for GPUs only: one that rounds nothing on the way. And older _scaled_mm."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", lambda a, b, dtype, *, out: out.copy_(a.to(dtype) @ b.to(dtype)), "CPU")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    if torch.__version__ < "2.13":
        multiply = lambda a, b, s, t, bias, scale, dtype, *_: ((s * a.float()) @ (t * b.float())).to(dtype)  # noqa: E731
        library.impl("_scaled_mm", multiply, "CPU")
    yield
    library._destroy()


@pytest.fixture
def exact_dot(monkeypatch):
    """Dots that treat every element alike, as tensor cores do; a BLAS adds up in an order that depends on the shape."""

    def matmul(a, b, dtype):
        products = a[..., None].astype(dtype) * b[..., None, :, :].astype(dtype)
        return np.add.accumulate(products, -2)[..., -1, :]

    monkeypatch.setattr(np, "matmul", matmul)
