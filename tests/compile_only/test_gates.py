"""Every kernel, compiled for GPUs that are not here: it compiles, nothing spills, shared memory fits."""

import dataclasses
import functools
import re

import pytest
import torch
import triton
import triton.language as tl

from indexproj.benchmarks.compiled import Binary, compile_for, compile_kernel, warm_up
from indexproj.benchmarks.gates import CASES, COMPILED, SHAPES, configs, faults
from indexproj.kernels import TARGETS, choose
from indexproj.kernels.matrix import Kind
from indexproj.kernels.target import INTERPRETED
from support import DEEPSEEK, GLM

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")

BF16, FP8, FP16 = Kind.BF16, Kind.FP8_BLOCK, {"x": torch.float16, "outs": (torch.float16, torch.float32)}
PAIRS = {f"{shape}: {pair}": (SHAPES[shape], COMPILED[pair], {}) for shape, pair in CASES} | {
    "FP8 128x128, BF16, fp16 x": (DEEPSEEK, (FP8, BF16), FP16),
    "FP8 per row, BF16": (DEEPSEEK, (Kind.FP8, BF16), {}),
    "FP8 128x128 fnuz, BF16": (DEEPSEEK, (Kind.FP8_BLOCK_FNUZ, BF16), {}),
    "W8A8 fnuz, BF16": (DEEPSEEK, (Kind.W8A8_FNUZ, BF16), {}),
    "W8A8, BF16, fp16 x": (DEEPSEEK, (Kind.W8A8, BF16), FP16),
    "glm-5: W8A8, BF16": (GLM, (Kind.W8A8, BF16), {}),
}
compiled = functools.cache(
    lambda name, config, shape, kinds, *dtypes: compile_for(TARGETS[name], config, shape, kinds, **dict(dtypes))
)


def binaries(name, pair, **options):
    """Every config that some M asks for, the largest such M, and the binary."""
    shape, kinds, dtypes = PAIRS[pair]
    for config, m in configs(TARGETS[name], shape, kinds, x_dtype=dtypes.get("x", torch.bfloat16), **options).items():
        yield config, m, compiled(name, config, shape, kinds, *dtypes.items())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", TARGETS)
def test_resources(name, pair):
    for config, m, binary in binaries(name, pair):
        assert faults(TARGETS[name], PAIRS[pair][0], m, config, binary) == [], config


@pytest.mark.parametrize(
    ("ns", "kinds", "ms"),
    [
        ((128, 32, 128), (FP8, BF16, BF16), (4, 64, 100, 65536)),
        ((128, 256), (FP8, BF16), (100, 65536)),
        ((128, 32, 128), (Kind.W8A8, BF16, BF16), (1, 32, 100, 65536)),
        ((128, 256), (Kind.W8A8, BF16), (100, 65536)),
    ],
    ids=["three matrices", "384 rows", "three matrices, W8A8", "384 rows, W8A8"],
)
@pytest.mark.parametrize("name", TARGETS)
def test_more_matrices_and_more_rows(name, ns, kinds, ms):
    shape, options = (*ns, GLM[2]), {"outs": (torch.bfloat16,) * len(ns), "factors": (1.0,) * len(ns)}
    for m in ms:
        config = choose(m, shape, kinds, TARGETS[name])
        binary = compile_for(TARGETS[name], config, shape, kinds, **options)
        # In decode, 32 rows of x are one tile; two may come in more than one wave.
        at_once = min(m, 32) if config.regime == "split_k" else m
        assert faults(TARGETS[name], shape, at_once, config, binary) == [], config


@pytest.mark.parametrize("name", TARGETS)
def test_dense_weights_and_x_are_loaded_16_bytes_at_a_time(name):
    for config, _, binary in binaries(name, "deepseek-v3.2: BF16, BF16"):
        if config.regime == "gemv":
            assert set(binary.loads) == {16}, config
        elif config.regime == "split_k":
            partials = config.split_k * 2  # of two matrices; the last program of each adds them up
            assert binary.loads[16] >= 8, config
            assert sum(binary.loads.values()) - binary.loads[16] <= partials, config


FINE = {"registers": 64, "spills": 0, "scratch": 0, "shared_memory": 1024, "threads": 256, "assembly": "HMMA LDG.E.128"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"spills": 2}, "2 spills"),
        ({"scratch": 8}, "8 bytes of local memory"),
        ({"shared_memory": 228 * 1024}, "bytes of shared memory"),
        ({"assembly": "LDG.E.128"}, "matrix instructions: {}"),
        ({"assembly": "HMMA LDG.E.64"}, "no load is wider than 8 bytes"),
        ({"registers": 136}, "168 programs, and the GPU holds 132"),
        ({"shared_memory": 120 * 1024}, "168 programs, and the GPU holds 132"),
    ],
)
def test_gates_can_close(changes, fault):
    config = choose(16, DEEPSEEK, (FP8, BF16), TARGETS["sm_90"])
    found = faults(TARGETS["sm_90"], DEEPSEEK, 16, config, Binary(**FINE | changes))
    assert any(fault in line for line in found) if fault else found == []


@pytest.mark.parametrize(
    "pair",
    [
        "deepseek-v3.2: FP8 128x128, BF16",
        "deepseek-v3.2: NVFP4, NVFP4",
        "FP8 128x128, BF16, fp16 x",
        "deepseek-v3.2: W8A8, BF16",
    ],
)
@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_invariant_row_meets_the_same_instructions_in_any_batch(name, pair):
    found = list(binaries(name, pair, batch_invariant=True))
    assert len({(config.block_k, config.slices, config.split_k) for config, _, _ in found}) == 1
    assert len({frozenset(binary.mma) for _, _, binary in found}) == 1
    assert len(found[0][2].mma) == 1
    for config, m, binary in found:
        # Up to 32 rows are one tile; more of them may come in two waves.
        assert faults(TARGETS[name], PAIRS[pair][0], min(m, 32), config, binary) == [], config


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "hip"])
def test_amd_waits_for_its_stores_before_it_counts_itself_in(name):
    for config, _, binary in binaries(name, "deepseek-v3.2: FP8 128x128, BF16"):
        before, *arrivals = re.split(r"_atomic_add", binary.assembly)
        assert len(arrivals) == counters(config), config
        for after in arrivals:
            since_last_store = before.rpartition("_store_dword")[2]
            waited, barrier, _ = since_last_store.partition("s_barrier")
            assert barrier, config
            assert "s_waitcnt vmcnt(0)" in waited, config
            assert "buffer_wbl2 sc1" in before.rpartition("s_barrier")[2], config  # release, device-wide
            assert "buffer_inv sc1" in after, config  # acquire
            before = after


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_partials_are_released_and_acquired_device_wide(name):
    for config, _, binary in binaries(name, "deepseek-v3.2: FP8 128x128, BF16"):
        before, *arrivals = re.split(r"(\bATOMG\S*)", binary.assembly)
        assert len(arrivals) == 2 * counters(config), config
        for counter, after in zip(arrivals[::2], arrivals[1::2], strict=True):
            since_last_store = re.split(r"\bSTG\b", before)[-1]
            assert "BAR.SYNC" in since_last_store, config
            assert "MEMBAR.ALL.GPU" in since_last_store.rpartition("BAR.SYNC")[2], config
            assert counter.endswith("STRONG.GPU"), config
            assert "CCTL.IVALL" in after.partition("LDG")[0], config
            before = after


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "hip"])
def test_amd_binaries_are_those_of_tensors_up_to_2_gb(name):
    """Triton's launcher compiles other loads for them than for larger ones."""
    binary = compiled(name, choose(16, DEEPSEEK, (FP8, BF16), TARGETS[name]), DEEPSEEK, (FP8, BF16))
    assert binary.count(r"\bbuffer_load_") > 0
    assert binary.count(r"\bglobal_load_") == 0


def counters(config):
    """Places in a kernel for two matrices where a program counts itself in; it comes to one of them."""
    return 0 if not config.has_workspace else 2 if config.regime == "split_k" else 1


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_no_float_is_added_atomically(name):
    for config, _, binary in binaries(name, "deepseek-v3.2: FP8 128x128, BF16"):
        assert binary.count(FLOAT_ATOMIC) == 0, config


FLOAT_ATOMIC = r"\b(?:RED|ATOM)[\w.]*\.F\d"


@triton.jit
def add_floats(ptr):
    tl.atomic_add(ptr + tl.arange(0, 128), 1.0)


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_float_atomics_would_be_seen(name):
    kernel = compile_kernel(add_floats, TARGETS[name], torch.empty(0), enable_fp_fusion=True)
    assert Binary.of(kernel, TARGETS[name]).count(FLOAT_ATOMIC) > 0


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].backend == "cuda"])
def test_sums_over_k_are_added_outside_the_tensor_core(name):
    """Inside, they would be truncated hundreds of times; see `dot` in kernels/tile.py."""
    for config, _, binary in binaries(name, "deepseek-v3.2: BF16, BF16"):
        if config.regime == "tiled":
            per_thread = config.block_m * (128 + 64) // (32 * config.num_warps)
            assert binary.count(r"\bFADD") >= per_thread, config


@pytest.mark.parametrize("m", [1, 16, 4096])
@pytest.mark.parametrize(
    ("name", "asm", "division"), [("sm_90", "ptx", "div.rn.f32"), ("gfx942", "amdgcn", "v_div_fixup")]
)
def test_x_is_divided_by_its_scales_as_ieee_754_says(name, asm, division, m):
    """Triton's own division is off by a bit at times, and then codes are off by a whole step."""
    config = choose(m, DEEPSEEK, (Kind.W8A8, BF16), TARGETS[name])
    text = warm_up(TARGETS[name], config, DEEPSEEK, (Kind.W8A8, BF16)).asm[asm]
    assert division in text
    assert "div.full" not in text


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "sm_120"])
def test_dependent_launch_is_off_unless_asked_for(name):
    for m in (4, 16):
        config = choose(m, DEEPSEEK, (FP8, BF16), TARGETS[name])
        for pdl, count in ((False, 0), (True, 1)):
            binary = compiled(name, dataclasses.replace(config, pdl=pdl), DEEPSEEK, (FP8, BF16))
            assert (binary.count("ACQBULK") >= count, binary.count("ACQBULK") > 0) == (True, pdl)
            assert (binary.count("PREEXIT") > 0) == pdl


def test_dependent_launch_is_off_where_there_is_none():
    for name in ("sm_80", "gfx942"):
        config = dataclasses.replace(choose(4, DEEPSEEK, (FP8, BF16), TARGETS[name]), pdl=True)
        assert compiled(name, config, DEEPSEEK, (FP8, BF16)).count("ACQBULK|PREEXIT") == 0


def test_loads_are_read_from_assembly_of_both_vendors():
    text = (
        "LDG.E.128.CONSTANT R4 LDGSTS.E.BYPASS.LTC128B.128 LDG.E R1 LDG.E.U8 global_load_lds_dwordx4 buffer_load_ubyte"
    )
    assert Binary(**FINE | {"assembly": text}).loads == {16: 3, 4: 1, 1: 2}
