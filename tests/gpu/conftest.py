import pytest
import torch

from indexproj.kernels.target import INTERPRETED, target_of


@pytest.fixture(autouse=True)
def target():
    """The current GPU; tensors are made on it."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU" if not INTERPRETED else "needs a GPU, but TRITON_INTERPRET=1 is set")
    device = torch.device("cuda", torch.cuda.current_device())
    with device:
        yield target_of(device)
