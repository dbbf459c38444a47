"""Dispatch: a pure function, checked for every GPU that the gates cover."""

import math

import pytest
import torch

from indexproj.benchmarks.gates import PAIRS
from indexproj.kernels import TARGETS, KernelConfig, choose
from indexproj.kernels.dispatch import cdiv, next_power_of_2
from indexproj.kernels.matrix import Kind
from support import DEEPSEEK, GLM

FP8 = (Kind.FP8_BLOCK, Kind.BF16)


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM, (128, 32, 128, 6144)], ids=str)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", [*PAIRS, "W8A8, BF16"])
def test_every_m_is_covered_and_the_last_split_has_work(name, shape, dtype, pair):
    target, kinds = TARGETS[name], PAIRS.get(pair, (Kind.W8A8, Kind.BF16))
    gemv_up_to, split_k_up_to = (1, 32) if pair not in PAIRS else (8 if name in ("sm_100", "sm_120") else 4, 64)
    around = [2**power + offset for power in range(17) for offset in (-1, 0, 1)]
    for m in [*range(1, 70), *around[12:-1]]:
        config = choose(m, shape, kinds, target, dtype)
        step = config.block_k * config.slices
        steps = cdiv(shape[-1], step * config.split_k)
        assert (config.split_k - 1) * steps * step < shape[-1]
        assert config.regime == ("gemv" if m <= gemv_up_to else "split_k" if m <= split_k_up_to else "tiled")
        assert step % 128 == 0 or pair in PAIRS  # groups of x
        if config.regime != "tiled":
            assert math.prod(config.grid(m, *shape[:-1])) <= 3 * target.sm_count
        if config.regime == "gemv":
            assert config.grid(m, *shape[:-1]) == (sum(shape[:-1]), 1, 1)  # weights are read once


@pytest.mark.parametrize("name", TARGETS)
def test_few_kernels_serve_all_batch_sizes(name):
    assert len({choose(m, DEEPSEEK, FP8, TARGETS[name]) for m in range(1, 65537)}) <= 14


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_invariant_sum_is_made_up_alike_for_every_m(name):
    configs = [choose(m, DEEPSEEK, FP8, TARGETS[name], batch_invariant=True) for m in range(1, 65537)]
    assert {(c.regime, c.block_k, c.block_n, c.slices, c.split_k, c.num_warps) for c in configs} == {
        ("split_k", 64, 16, 8, 14, 8)
    }
    assert [c.serial for c in configs] == [m > 64 for m in range(1, 65537)]


def test_one_wave_fills_an_h100():
    for m, programs in (
        (1, 192),
        (4, 192),
        (16, 12 * 14),
        (64, 2 * 12 * 7),
        (100, 7 * 16),
        (256, 16 * 8),
        (512, 8 * 16),
        (4096, 64 * 2),
    ):
        grid = choose(m, DEEPSEEK, FP8, TARGETS["sm_90"]).grid(m, 128, 64)
        assert math.prod(grid) == programs


def test_workspace_is_what_the_programs_write():
    ns = DEEPSEEK[:-1]
    for m, expected in (
        (4, (0, 0)),
        (16, (12 * 14 * 16 * 16, 12)),
        (64, (24 * 7 * 16 * 32, 24)),
        (100, (7 * 16 * 16 * 192, 7)),
        (65536, (0, 0)),
    ):
        config = choose(m, DEEPSEEK, FP8, TARGETS["sm_90"])
        assert config.workspace(config.grid(m, *ns), *ns) == expected
    serial = choose(65536, DEEPSEEK, FP8, TARGETS["sm_90"], batch_invariant=True)
    assert serial.workspace(serial.grid(65536, *ns), *ns) == (0, 0)


def test_fp16_takes_half_the_block_for_it_is_multiplied_in_fp32():
    for m in (100, 10_000):
        wide, narrow = (choose(m, GLM, FP8, TARGETS["sm_90"], dtype) for dtype in (torch.float16, torch.bfloat16))
        assert (wide.block_k, narrow.block_k) == (32, 64)


def test_weights_that_are_decoded_take_half_the_rows_on_sm_120():
    for pair, kinds in PAIRS.items():
        assert choose(65536, DEEPSEEK, kinds, TARGETS["sm_120"]).block_m == (64 if pair == "BF16, BF16" else 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_k", 256), ("block_k", 48), ("block_k", 16), ("regime", "gemm"), ("block_m", 24), ("block_m", "16"),
     ("block_n", 8), ("slices", 3), ("split_k", 0), ("num_stages", 0), ("num_warps", 6), ("serial", 2)],
)  # fmt: skip
def test_no_config_is_made_that_no_kernel_can_be(field, value):
    fields = {"regime": "tiled", "block_m": 16, "block_k": 64, "split_k": 1, "num_stages": 2}
    with pytest.raises(ValueError, match=f"KernelConfig: {field} must be one of .*, got {value!r}"):
        KernelConfig(**fields | {field: value})


def test_a_small_k_is_not_split_beyond_its_blocks():
    assert choose(10, (128, 16, 100), FP8, TARGETS["sm_90"]).split_k == 1
    assert choose(100, (128, 16, 100), FP8, TARGETS["sm_90"]).split_k == 2


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power
