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
    """What a load masks out is NaN or -480 unless it names another value: on a GPU it is whatever the register held."""
    load = interpreter.InterpreterBuilder.create_masked_load

    def fill(self, pointers, mask, other, *rest):
        if other is None:
            dtype = pointers.get_element_ty()
            bits = np.full((*pointers.data.shape, dtype.primitive_bitwidth // 8), 0xFF, np.uint8)
            other = interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(dtype))[..., 0], dtype)
        return load(self, pointers, mask, other, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", fill)
