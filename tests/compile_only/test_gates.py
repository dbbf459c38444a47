"""Every kernel, compiled for GPUs that are not here: it compiles, nothing spills, shared memory fits."""

import functools
import re

import pytest
import torch

from indexproj.kernels import TARGETS, choose
from indexproj.kernels.compiled import SHARED_MEMORY, compile_for
from indexproj.kernels.matrix import Kind
from indexproj.kernels.target import INTERPRETED
from support import DEEPSEEK, GLM

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")

BF16, FP8, FP16 = Kind.BF16, Kind.FP8_BLOCK, {"x": torch.float16, "outs": (torch.float16, torch.float32)}
PAIRS = {
    "deepseek-dense-dense": (DEEPSEEK, (BF16, BF16), {}),
    "deepseek-fp8-dense": (DEEPSEEK, (FP8, BF16), {}),
    "deepseek-fp8-fp8": (DEEPSEEK, (FP8, FP8), {}),
    "deepseek-fp8-dense-fp16": (DEEPSEEK, (FP8, BF16), FP16),
    "deepseek-fp8_row-dense": (DEEPSEEK, (Kind.FP8, BF16), {}),
    "deepseek-fp8_fnuz-dense": (DEEPSEEK, (Kind.FP8_BLOCK_FNUZ, BF16), {}),
    "deepseek-mxfp8-mxfp8": (DEEPSEEK, (Kind.MXFP8, Kind.MXFP8), {}),
    "deepseek-nvfp4-dense": (DEEPSEEK, (Kind.NVFP4, BF16), {}),
    "deepseek-nvfp4-nvfp4": (DEEPSEEK, (Kind.NVFP4, Kind.NVFP4), {}),
    "deepseek-mxfp4-dense": (DEEPSEEK, (Kind.MXFP4, BF16), {}),
    "deepseek-mxfp4-mxfp4": (DEEPSEEK, (Kind.MXFP4, Kind.MXFP4), {}),
    "glm-dense-dense": (GLM, (BF16, BF16), {}),
    "glm-fp8-dense": (GLM, (FP8, BF16), {}),
}
compiled = functools.cache(
    lambda name, config, shape, kinds, *dtypes: compile_for(TARGETS[name], config, shape, kinds, **dict(dtypes))
)


def binaries(name, pair):
    """Every config that some M asks for, with its binary."""
    shape, kinds, dtypes = PAIRS[pair]
    x_dtype = dtypes.get("x", torch.bfloat16)
    configs = {choose(2**power, shape, TARGETS[name], x_dtype): None for power in range(17)}
    for config in configs:
        yield config, compiled(name, config, shape, kinds, *dtypes.items())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", TARGETS)
def test_resources(name, pair):
    target = TARGETS[name]
    for config, binary in binaries(name, pair):
        assert binary.spills == 0, config
        assert binary.scratch == 0, config
        assert 0 < binary.shared_memory <= SHARED_MEMORY[name], config
        mma = r"\b[HQ]MMA|\bHGMMA|\bUTC\w*MMA" if target.backend == "cuda" else r"v_mfma"
        assert binary.count(mma) > 0, config


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "hip"])
def test_amd_waits_for_its_stores_before_it_counts_itself_in(name):
    for config, binary in binaries(name, "deepseek-fp8-dense"):
        if config.workspace(1, 128, 64) == (0, 0):
            continue
        before_counter, atomic, after_counter = binary.assembly.partition("_atomic_add")
        assert atomic, config
        after_stores = before_counter.rpartition("_store_dword")[2]
        waited, barrier, _ = after_stores.partition("s_barrier")
        assert barrier, config
        assert "s_waitcnt vmcnt(0)" in waited, config
        assert "buffer_wbl2 sc1" in before_counter.rpartition("s_barrier")[2], config  # release, device-wide
        assert "buffer_inv sc1" in after_counter, config  # acquire


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_partials_are_released_and_acquired_device_wide(name):
    for config, binary in binaries(name, "deepseek-fp8-dense"):
        if config.workspace(1, 128, 64) == (0, 0):
            continue
        before_counter, counter, after_counter = re.split(r"(\bATOMG\S*)", binary.assembly)
        since_last_store = re.split(r"\bSTG\b", before_counter)[-1]
        assert "BAR.SYNC" in since_last_store, config
        assert "MEMBAR.ALL.GPU" in since_last_store.rpartition("BAR.SYNC")[2], config
        assert counter.endswith("STRONG.GPU"), config
        assert "CCTL.IVALL" in after_counter.partition("LDG")[0], config


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_sums_over_k_are_added_outside_the_tensor_core(name):
    """Inside, they would be truncated hundreds of times; see `dot` in kernels/tile.py."""
    for config, binary in binaries(name, "deepseek-dense-dense"):
        if config.regime == "tiled":
            per_thread = config.block_m * (128 + 64) // (32 * config.num_warps)
            assert binary.count(r"\bFADD") >= per_thread, config


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_one_counter_per_split_k_program_and_no_float_atomics(name):
    for config, binary in binaries(name, "deepseek-fp8-dense"):
        expected = 0 if config.workspace(1, 128, 64) == (0, 0) else 1
        assert binary.count(r"\bATOMG") == expected, config
        assert binary.count(r"\b(?:RED|ATOM)\b") == 0, config
