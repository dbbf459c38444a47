"""Dispatch: a pure function, checked for every GPU that the gates cover."""

import pytest
import torch

from indexproj.kernels import TARGETS, KernelConfig, choose
from indexproj.kernels.dispatch import cdiv, next_power_of_2
from support import DEEPSEEK, GLM


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM], ids=str)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_m_is_covered_and_the_last_split_has_work(name, shape, dtype):
    for m in range(1, 5000):
        config = choose(m, shape, TARGETS[name], dtype)
        step = config.block_k * config.slices
        steps = cdiv(shape[2], step * config.split_k)
        assert (config.split_k - 1) * steps * step < shape[2]
        assert config.regime == ("split_k" if m <= 64 else "tiled")
        assert config.block_k <= 128  # one scale per dot


@pytest.mark.parametrize("name", TARGETS)
def test_few_kernels_serve_all_batch_sizes(name):
    assert len({choose(m, DEEPSEEK, TARGETS[name]) for m in range(1, 65537)}) <= 14


def test_one_wave_fills_an_h100():
    for m, programs in (
        (1, 12 * 14),
        (16, 12 * 14),
        (64, 2 * 12 * 14),
        (100, 7 * 16),
        (256, 16 * 8),
        (512, 8 * 16),
        (4096, 64 * 2),
    ):
        grid = choose(m, DEEPSEEK, TARGETS["sm_90"]).grid(m, 128, 64)
        assert torch.Size(grid).numel() == programs


def test_fp16_takes_half_the_block_for_it_is_multiplied_in_fp32():
    for m in (100, 10_000):
        wide, narrow = (choose(m, GLM, TARGETS["sm_90"], dtype) for dtype in (torch.float16, torch.bfloat16))
        assert (wide.block_k, narrow.block_k) == (32, 64)


@pytest.mark.parametrize("block_k", [256, 48, 16])
def test_a_block_has_one_scale(block_k):
    with pytest.raises(ValueError, match="block_k must be 32, 64 or 128"):
        KernelConfig("tiled", block_m=16, block_k=block_k, split_k=1, num_stages=2)


def test_a_small_k_is_not_split_beyond_its_blocks():
    assert choose(1, (128, 16, 100), TARGETS["sm_90"]).split_k == 1
    assert choose(100, (128, 16, 100), TARGETS["sm_90"]).split_k == 2


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power
