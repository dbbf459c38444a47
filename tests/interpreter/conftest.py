"""The same tests in Triton's interpreter (`make test`) and on a GPU (`make test-gpu`)."""

import os

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

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


@pytest.fixture(autouse=True)
def garbage(monkeypatch):
    """Fills masked-out lanes with NaN or -480 if a load names no value for them: on a GPU they are undefined."""
    load = interpreter.InterpreterBuilder.create_masked_load

    def fill(self, pointers, mask, other, *rest):
        if other is None:
            dtype = pointers.get_element_ty()
            bits = np.full((*pointers.data.shape, dtype.primitive_bitwidth // 8), 0xFF, np.uint8)
            other = interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(dtype))[..., 0], dtype)
        return load(self, pointers, mask, other, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", fill)
