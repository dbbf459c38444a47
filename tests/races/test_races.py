"""The kernels' IR for sm_90, run on the CPU: nothing races, and nothing is out of bounds.

Bounds are those of a tensor's memory. Not seen here: what lies below Triton's IR, PDL, and AMD's wait for its stores.
"""

import pytest
import torch

from indexproj.kernels import TARGETS, KernelConfig
from indexproj.kernels import launch as original
from support import MATRICES

# Configs, and rows of x that their blocks do not divide; of K = 200 the last split gets nothing.
LAUNCHES = {
    "gemv": (KernelConfig("gemv", block_m=4, block_k=64, slices=8), 6),
    "split_k": (KernelConfig("split_k", block_m=8, block_k=32, slices=2, split_k=3), 11),
    "serial": (KernelConfig("split_k", block_m=8, block_k=32, slices=2, split_k=3, serial=True), 11),
    "tiled": (KernelConfig("tiled", block_m=16, block_k=64), 19),
    "splits": (KernelConfig("tiled", block_m=16, block_k=64, split_k=3), 19),
}


@pytest.fixture
def run(ttsem, monkeypatch):
    """Launches matrices of up to 40, 9 and 24 rows; returns the error against fp64 and the counters afterwards."""

    def launch(module, config, m, encodings, k=200):
        counters = []

        def workspace(device, partials, count):
            if not count:
                return None, None
            counters.append(torch.zeros(count, dtype=torch.int32))
            return torch.full((partials,), torch.nan), counters[-1]

        monkeypatch.setattr(module, "workspace", workspace)  # the real one lends more than is asked for
        monkeypatch.setattr(module, "target_of", lambda device: TARGETS["sm_90"])
        monkeypatch.setattr(module, "_ready", {})  # a launch that ttsem takes over leaves nothing ready for the next
        rows = zip(encodings.split("-"), (40, 9, 24), strict=False)
        matrices = [MATRICES[name](n, k).map(torch.clone) for name, n in rows]
        operands, kinds = tuple(matrix.operands for matrix in matrices), tuple(matrix.kind for matrix in matrices)
        x = torch.randn(m, k, dtype=torch.bfloat16)
        outs = tuple(torch.full((m, matrix.shape[0]), torch.nan) for matrix in matrices)
        for tensor in (x, *outs, *(tensor for matrix in matrices for tensor in matrix.tensors)):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # the bounds are seen only where memory ends
        module.launch(x, operands, kinds, outs, (1.0,) * len(outs), config=config)
        exact = [x.double() @ matrix.dequantize(torch.float64).T for matrix in matrices]
        errors = [(out - truth).abs().max() / truth.abs().max() for out, truth in zip(outs, exact, strict=True)]
        return torch.stack(errors).max().item(), torch.cat(counters).tolist() if counters else []

    return launch


@pytest.mark.parametrize("order", ["", "reverse", "shuffle:1"])
@pytest.mark.parametrize("encodings", ["dense-dense", "fp8-dense", "nvfp4-mxfp8", "fp8_row-mxfp4-dense"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels(name, encodings, order, run, monkeypatch):
    monkeypatch.setenv("TTSEM_GRID_ORDER", order)
    config, m = LAUNCHES[name]
    error, counters = run(original, config, m, encodings)
    assert error <= 2e-6
    assert bool(counters) == config.has_workspace
    assert not any(counters)


@pytest.mark.parametrize("order", ["", "reverse", "shuffle:1"])
@pytest.mark.parametrize("m", [3, 20, 70])
def test_what_dispatch_chooses(m, order, run, monkeypatch):
    monkeypatch.setenv("TTSEM_GRID_ORDER", order)
    error, counters = run(original, None, m, "fp8-dense", k=520)
    assert error <= 2e-6
    assert bool(counters) == (m > 3)
    assert not any(counters)
