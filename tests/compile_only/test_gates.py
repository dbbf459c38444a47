"""Every kernel, compiled for GPUs that this machine does not have: it compiles, nothing spills, shared memory fits."""

import functools
import itertools
import re
from dataclasses import replace

import pytest
import torch

from indexproj.benchmarks.compiled import CASES, Binary, Case, configs, faults, warm_up
from indexproj.kernels import TARGETS, KernelConfig, choose
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.launch import Signature
from indexproj.kernels.target import INTERPRETED
from support import DEEPSEEK, GLM

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 disables compilation")

DENSE, FP8 = parse_pair("BF16, BF16"), parse_pair("FP8 128x128, BF16")
FP16 = {"x_dtype": torch.float16, "dtypes": (torch.float16, torch.float32)}
SIGNATURES = {", ".join(filter(None, case)): case.signature() for case in CASES} | {
    "fp16 x": replace(Signature.of(DEEPSEEK, FP8), **FP16),
    "fp16 x, fp8": replace(Signature.of(DEEPSEEK, FP8, "fp8"), **FP16),
    "FP8 per row, BF16": Signature.of(DEEPSEEK, parse_pair("FP8 per row, BF16")),
    "glm-5, fp8": Signature.of(GLM, FP8, "fp8"),
}
# As vLLM launches them.
for pair in ("BF16, BF16", "FP8 128x128, BF16", "NVFP4, BF16"):
    SIGNATURES[f"{pair}, outputs in BF16"] = Case("deepseek-v3.2", pair).signature("bf16")
# Combinations of what other cases have one by one.
WIDER = ("fp16 x, fp8", "glm-5, fp8")
NVIDIA, AMD = ([name for name in TARGETS if TARGETS[name].backend == backend] for backend in ("cuda", "hip"))


@functools.cache
def binary_of(name, config, problem):
    return Binary.of(warm_up(TARGETS[name], config, problem), TARGETS[name])


def count(binary, pattern):
    return len(re.findall(pattern, binary.assembly))


def binaries(name, problem):
    """Every config that dispatch selects, the largest M for it, and its binary."""
    for config, m in configs(TARGETS[name], problem).items():
        yield config, m, binary_of(name, config, problem)


def split_between(config, selected):
    """Whether dispatch also selects both more and fewer splits for the same tile: the same code, other loop counts."""
    splits = [other.split_k for other in selected if replace(other, split_k=1) == replace(config, split_k=1)]
    return min(splits) < config.split_k < max(splits)


@pytest.mark.parametrize("between", [False, pytest.param(True, marks=pytest.mark.full)], ids=["", "splits in between"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] * (case in WIDER)) for case in SIGNATURES]
)
@pytest.mark.parametrize("name", TARGETS)
def test_resources(name, case, between):
    problem = SIGNATURES[case]
    selected = configs(TARGETS[name], problem)
    for config, m in selected.items():
        if split_between(config, selected) == between:
            binary = binary_of(name, config, problem)
            assert faults(TARGETS[name], problem, m, config, binary) == [], config


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("pair", ["BF16, BF16", "FP8 128x128, BF16", "MXFP8, MXFP8", "NVFP4, NVFP4", "MXFP4, MXFP4"])
def test_resources_with_a_factor(pair, name):
    """One config per regime, also with older versions of Triton, see test_older.py."""
    problem = replace(Signature.of(DEEPSEEK, parse_pair(pair)), factors=(1.0, 0.0110485))
    for m in (4, 16, 1000, 8192):
        config = choose(m, DEEPSEEK, problem.formats, TARGETS[name])
        assert faults(TARGETS[name], problem, m, config, binary_of(name, config, problem)) == [], config


@pytest.mark.parametrize("ns", [(128, 32, 128), (128, 256)], ids=["three matrices", "384 rows"])
@pytest.mark.parametrize("activation", [None, "fp8"])
@pytest.mark.parametrize("name", TARGETS)
def test_resources_of_more_matrices_and_rows(name, ns, activation):
    problem = Signature.of((*ns, GLM[2]), (*FP8, FP8[1])[: len(ns)], activation, (torch.bfloat16,) * len(ns))
    for m in (1 if activation else 4, 32 if activation else 64, 100, 65536):
        config = choose(m, (*ns, GLM[2]), problem.formats, TARGETS[name], quantize_x=bool(activation))
        # In decode, 32 rows of x are one tile; two may need a second wave.
        at_once = min(m, 32) if config.regime == "split_k" else m
        assert faults(TARGETS[name], problem, at_once, config, binary_of(name, config, problem)) == [], config


@pytest.mark.parametrize("name", NVIDIA)
def test_gemv_issues_weights_and_scales_in_one_group(name):
    for formats in (DENSE, FP8):
        for m, limit in ((1, 1), (2, 2), (4, 2)):  # with more rows, x does not fit the registers next to the weights
            config = choose(m, DEEPSEEK, formats, TARGETS[name])
            assert binary_of(name, config, Signature.of(DEEPSEEK, formats)).load_groups <= 2 * limit, config


# Instructions per 64 rows of x and 64 of K, all columns included, where the tensor core reads shared memory.
@pytest.mark.parametrize(("pair", "limit"), [("BF16, BF16", 130), ("FP8 128x128, BF16", 170), ("NVFP4, BF16", 220)])
@pytest.mark.parametrize("name", ["sm_90", "sm_100", "gfx942", "gfx950"])
def test_instructions_per_step_of_prefill(name, pair, limit):
    problem = Signature.of(DEEPSEEK, parse_pair(pair))
    config = choose(16384, DEEPSEEK, problem.formats, TARGETS[name])
    assert (config.block_m, config.block_n, config.block_k) == (128, 0, 64)
    if TARGETS[name].is_cuda() or pair != "NVFP4, BF16":  # AMD decodes without PTX
        assert 0 < binary_of(name, config, problem).step * 64 / config.block_m <= limit


INVARIANT = [f"deepseek-v3.2, {case}" for case in ("FP8 128x128, BF16", "NVFP4, NVFP4", "FP8 128x128, BF16, fp8")]


@pytest.mark.parametrize("case", [*INVARIANT, "fp16 x", "deepseek-v4-pro, BF16, BF16, BF16"])
@pytest.mark.parametrize("name", TARGETS)
def test_batch_invariant_instructions(name, case):
    """A row meets the same instructions in a batch of any size."""
    problem = replace(SIGNATURES[case], batch_invariant=True)
    found = list(binaries(name, problem))
    assert len({(config.block_k, config.slices, config.split_k, *binary.mma) for config, _, binary in found}) == 1
    for config, m, binary in found:
        assert len(binary.mma) == 1, config
        assert faults(TARGETS[name], problem, m, config, binary) == [], config


FINE = {"registers": 64, "spills": 0, "scratch": 0, "shared_memory": 1024, "threads": 256, "assembly": "HMMA LDG.E.128"}
LOAD = "/*0000*/ LDG.E.128 R4, desc[R2.64] ;\n/*0000*/ IADD R4, R4, R4 ;\n"


@pytest.mark.parametrize(
    ("m", "changes", "expected"),
    [
        (16, {}, []),
        (16, {"spills": 2}, ["2 spills"]),
        (16, {"scratch": 8}, ["8 bytes of local memory"]),
        (16, {"shared_memory": 228 * 1024}, ["bytes of shared memory", "168 programs"]),
        (16, {"assembly": "LDG.E.128"}, ["matrix instructions: {}"]),
        (16, {"assembly": "HMMA LDG.E.64"}, ["the widest load has 8 bytes"]),
        (16, {"registers": 136}, ["168 programs, but the GPU runs 132"]),
        (16, {"shared_memory": 120 * 1024}, ["168 programs, but the GPU runs 132"]),
        (1, {"assembly": LOAD * 7 + "BAR.SYNC" * 11}, ["7 groups of loads, limit 3", "11 barriers, limit 5"]),
    ],
)
def test_faults_of_made_up_binaries(m, changes, expected):
    config = choose(m, DEEPSEEK, FP8, TARGETS["sm_90"])
    found = faults(TARGETS["sm_90"], Signature.of(DEEPSEEK, FP8), m, config, Binary(**FINE | changes))
    assert len(found) == len(expected)
    assert all(fault in line for fault, line in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", TARGETS)
def test_dense_loads_are_16_bytes_and_prefill_sums_outside_the_tensor_core(name):
    """Inside, NVIDIA's would truncate sums over K hundreds of times; see `dot` in kernels/tile.py."""
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, DENSE)):
        if config.regime == "gemv":
            assert set(binary.loads) == {16}, config
        elif config.regime == "split_k":
            partials = config.split_k * 2  # of two matrices; the last program of each adds them up
            assert binary.loads[16] >= 8, config
            assert sum(binary.loads.values()) - binary.loads[16] <= partials, config
        elif name in NVIDIA:
            per_thread = config.acc_size(128, 64) // (32 * config.num_warps)
            assert count(binary, r"\bFADD") >= per_thread, config


# From a program's store of partial sums to its loads of those of others: all warps, release, count, acquire.
NVIDIA_ORDER = "STG", "BAR.SYNC", "MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL", "BAR.SYNC", "LDG"
AMD_ORDER = (
    "_store_dword", "s_waitcnt vmcnt(0)", "s_barrier", "buffer_wbl2 sc1", "s_waitcnt vmcnt(0)", "_atomic_add",
    "s_waitcnt vmcnt(0)", "buffer_inv sc1", "s_barrier", "buffer_load",
)  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_memory_order_of_partials_and_no_float_atomics(name):
    order = NVIDIA_ORDER if name in NVIDIA else AMD_ORDER
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, FP8)):
        expected = 0 if not config.has_workspace else 2 if config.block_n else 1
        found = re.findall("|".join(map(re.escape, order)), binary.assembly)
        assert " ".join(event for event, _ in itertools.groupby(found)).count(" ".join(order)) == expected, config
        assert count(binary, r"\b(?:ATOMG?|RED)\.|_atomic_") == expected, config


@pytest.mark.parametrize("name", AMD)
def test_loads_and_registers_amd(name):
    """Buffer loads for tensors up to 2 GB, as Triton's launcher would compile; one wave's registers for gemv."""
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, FP8)):
        assert (count(binary, "; Occupancy: 1\n") > 0) == (config.regime == "gemv"), config
        assert count(binary, r"\bglobal_load_dword") == 0, config


@pytest.mark.parametrize("m", [1, 16, 4096])
@pytest.mark.parametrize(("name", "asm", "div"), [("sm_90", "ptx", "div.rn.f32"), ("gfx942", "amdgcn", "v_div_fixup")])
def test_activation_scales_use_ieee_division(name, asm, div, m):
    """Triton's approximate division can be off by one bit, and then a code is off by one step."""
    config = choose(m, DEEPSEEK, FP8, TARGETS[name], quantize_x=True)
    text = warm_up(TARGETS[name], config, Signature.of(DEEPSEEK, FP8, "fp8")).asm[asm]
    assert div in text
    assert "div.full" not in text


def first_use_of_x(ptx):
    """The first load from x, whose addresses are computed from the first parameter, or what waits for it before."""
    addresses = {"_param_0"}
    for line in ptx.splitlines():
        result, *operands = re.findall(r"%\w+|_param_0\b", line) or [""]
        if "griddepcontrol.wait" in line or ("global" in line and addresses & set(re.findall(r"\[ (%\w+)", line))):
            return line.strip()
        if addresses & set(operands):
            addresses.add(result)
    return None


@pytest.mark.parametrize("name", TARGETS)
def test_pdl_is_off_by_default_and_waits_before_x(name):
    many_steps = KernelConfig("split_k", block_m=16, block_k=64, split_k=2, num_stages=2, slices=4)
    for config in (*(choose(m, DEEPSEEK, FP8, TARGETS[name]) for m in (4, 16)), many_steps):
        for pdl in (False, True):
            kernel = warm_up(TARGETS[name], replace(config, pdl=pdl), Signature.of(DEEPSEEK, FP8))
            has_pdl = pdl and TARGETS[name].is_cuda(90)
            binary = Binary.of(kernel, TARGETS[name])
            assert (count(binary, "ACQBULK") > 0) == (count(binary, "PREEXIT") > 0) == has_pdl
            if has_pdl:
                assert first_use_of_x(kernel.asm["ptx"]) == "griddepcontrol.wait ;"
