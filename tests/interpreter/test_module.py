"""A checkpoint end to end: file, module, kernels, reference."""

import pytest
import torch

from indexproj.indexer import IndexerProjection
from indexproj.indexer.cli.fixture import write_fixture
from indexproj.kernels import project, reference
from indexproj.loading import load


@pytest.fixture(autouse=True)
def default_device():
    """Checkpoints are made on the CPU; modules say where they load to."""


@pytest.mark.parametrize("kind", ["deepseek-v3.2", "glm-5-bf16", "glm-5.2-fp8"])
def test_forward_from_a_checkpoint(tmp_path, kind, device):
    write_fixture(kind, tmp_path, layers=1)
    module = IndexerProjection.from_checkpoint(tmp_path, layer=0, device=device, k_dtype=torch.float32)
    x = torch.randn(2, 3, module.weights.shape[2], dtype=torch.bfloat16, device=device)
    options = {"gate_scale": 0.125, "batch_invariant": True}
    scaled = IndexerProjection.from_checkpoint(tmp_path, layer=0, device=device, **options)(x)[1]
    assert torch.equal(scaled, 0.125 * project(x, module.weights, batch_invariant=True)[1])
    for output, truth in zip(module(x), reference(x, load(tmp_path, device=device)[0]), strict=True):
        assert output.dtype == torch.float32
        assert (output - truth).abs().max() <= 2e-6 * truth.abs().max()
