"""The same tests in Triton's interpreter (`make test`) and on a GPU (`make test-gpu`)."""

import os

import pytest
import torch

from indexproj.kernels.target import INTERPRETED

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for fp64 references while `poison` is on


@pytest.fixture(autouse=True)
def device():
    """The CPU in the interpreter, the GPU otherwise."""
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or Triton's interpreter in a process started with TRITON_INTERPRET=1")
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def default_device(device):
    """Tensors are made on the device."""
    with device:
        yield
