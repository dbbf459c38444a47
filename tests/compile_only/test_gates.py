"""Every kernel, compiled for GPUs that this machine does not have: it compiles, nothing spills, shared memory fits."""

import functools
import re
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from indexproj.benchmarks.compiled import CASES, Binary, Case, compile_kernel, configs, faults, warm_up
from indexproj.benchmarks.estimate import l2_bytes
from indexproj.kernels import TARGETS, KernelConfig, choose
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.launch import Signature
from indexproj.kernels.target import INTERPRETED
from support import DEEPSEEK, GLM

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 disables compilation")

DENSE, FP8 = parse_pair("BF16, BF16"), parse_pair("FP8 128x128, BF16")
FP32 = torch.float32
FP16 = {"x_dtype": torch.float16, "dtypes": (torch.float16, FP32)}
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


def test_l2_bytes_of_prefill():
    """Bytes that all programs of a launch read, including 117 MB of x."""
    for formats, limit in ((FP8, 240e6), (DENSE, 300e6)):
        assert l2_bytes((8192, DEEPSEEK, formats), choose(8192, DEEPSEEK, formats, TARGETS["sm_90"])) < limit


# Instructions per 64 rows of x and 64 of K, all columns included, where the tensor core reads shared memory.
@pytest.mark.parametrize(("pair", "limit"), [("BF16, BF16", 130), ("FP8 128x128, BF16", 170), ("NVFP4, BF16", 220)])
@pytest.mark.parametrize("name", ["sm_90", "sm_100", "gfx942", "gfx950"])
def test_instructions_per_step_of_prefill(name, pair, limit):
    problem = Signature.of(DEEPSEEK, parse_pair(pair))
    config = choose(16384, DEEPSEEK, problem.formats, TARGETS[name])
    assert (config.block_m, config.block_n, config.block_k) == (128, 0, 64)
    if TARGETS[name].is_cuda() or pair != "NVFP4, BF16":  # AMD decodes without PTX
        assert 0 < binary_of(name, config, problem).step * 64 / config.block_m <= limit


V4 = "deepseek-v4-pro, BF16, BF16, BF16"


@pytest.mark.parametrize("case", ["FP8 128x128, BF16", "NVFP4, NVFP4", "FP8 128x128, BF16, fp8", "fp16 x", V4])
@pytest.mark.parametrize("name", TARGETS)
def test_batch_invariant_instructions(name, case):
    """A row meets the same instructions in a batch of any size."""
    problem = replace(SIGNATURES.get(f"deepseek-v3.2, {case}") or SIGNATURES[case], batch_invariant=True)
    found = list(binaries(name, problem))
    assert len({(config.block_k, config.slices, config.split_k) for config, _, _ in found}) == 1
    assert len({frozenset(binary.mma) for _, _, binary in found}) == 1
    assert len(found[0][2].mma) == 1
    for config, m, binary in found:
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


def test_load_widths_in_sass_and_amdgcn():
    text = "LDG.E.128.CONSTANT LDGSTS.E.BYPASS.LTC128B.128 LDG.E R1 LDG.E.U8 global_load_lds_dwordx4 buffer_load_ubyte"
    assert Binary(**FINE | {"assembly": text}).loads == {16: 3, 4: 1, 1: 2}


@pytest.mark.parametrize("name", TARGETS)
def test_dense_loads_are_16_bytes(name):
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, DENSE)):
        if config.regime == "gemv":
            assert set(binary.loads) == {16}, config
        elif config.regime == "split_k":
            partials = config.split_k * 2  # of two matrices; the last program of each adds them up
            assert binary.loads[16] >= 8, config
            assert sum(binary.loads.values()) - binary.loads[16] <= partials, config


def arrivals(name, atomic, store):
    """Where programs count themselves in: the code since the last store of partial sums, the atomic, the code after."""
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, FP8)):
        before, *parts = re.split(rf"(\b\w*{atomic}\S*)", binary.assembly)
        assert len(parts) == 2 * (0 if not config.has_workspace else 2 if config.block_n else 1), config
        for counter, after in zip(parts[::2], parts[1::2], strict=True):
            yield re.split(store, before)[-1], counter, after
            before = after


@pytest.mark.parametrize("name", AMD)
def test_memory_order_of_partials_amd(name):
    for since_store, _, after in arrivals(name, "_atomic_add", "_store_dword"):
        waited, barrier, _ = since_store.partition("s_barrier")
        assert barrier
        assert "s_waitcnt vmcnt(0)" in waited
        assert "buffer_wbl2 sc1" in since_store.rpartition("s_barrier")[2]  # release, device-wide
        assert "buffer_inv sc1" in after  # acquire


@pytest.mark.parametrize("name", NVIDIA)
def test_memory_order_of_partials_nvidia(name):
    for since_store, counter, after in arrivals(name, "ATOMG", r"\bSTG\b"):
        assert "BAR.SYNC" in since_store
        assert "MEMBAR.ALL.GPU" in since_store.rpartition("BAR.SYNC")[2]
        assert counter.endswith("STRONG.GPU")
        assert "CCTL.IVALL" in after.partition("LDG")[0]


@pytest.mark.parametrize("name", AMD)
def test_loads_and_registers_amd(name):
    """Buffer loads for tensors up to 2 GB, as Triton's launcher would compile; one wave's registers for gemv."""
    for m in (1, 4, 16):
        config = choose(m, DEEPSEEK, FP8, TARGETS[name])
        binary = binary_of(name, config, Signature.of(DEEPSEEK, FP8))
        assert (count(binary, "; Occupancy: 1\n") > 0) == (config.regime == "gemv")
        if m == 16:
            assert count(binary, r"\bbuffer_load_") > 0
            assert count(binary, r"\bglobal_load_") == 0


FLOAT_ATOMIC = r"\b(?:RED|ATOM)[\w.]*\.F\d"


@triton.jit
def add_floats(ptr):
    tl.atomic_add(ptr + tl.arange(0, 128), 1.0)


@pytest.mark.parametrize("name", NVIDIA)
def test_no_float_atomics(name):
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, FP8)):
        assert count(binary, FLOAT_ATOMIC) == 0, config
    kernel = compile_kernel(add_floats, TARGETS[name], torch.empty(0), enable_fp_fusion=True)
    assert count(Binary.of(kernel, TARGETS[name]), FLOAT_ATOMIC) > 0  # the pattern finds them


@pytest.mark.parametrize("name", NVIDIA)
def test_prefill_accumulates_outside_the_tensor_core(name):
    """Inside, sums over K would be truncated hundreds of times; see `dot` in kernels/tile.py."""
    for config, _, binary in binaries(name, Signature.of(DEEPSEEK, DENSE)):
        if config.regime == "prefill":
            per_thread = config.acc_size(128, 64) // (32 * config.num_warps)
            assert count(binary, r"\bFADD") >= per_thread, config


@pytest.mark.parametrize("m", [1, 16, 4096])
@pytest.mark.parametrize(
    ("name", "asm", "division"), [("sm_90", "ptx", "div.rn.f32"), ("gfx942", "amdgcn", "v_div_fixup")]
)
def test_activation_scales_use_ieee_division(name, asm, division, m):
    """Triton's approximate division can be off by one bit, and then a code is off by one step."""
    config = choose(m, DEEPSEEK, FP8, TARGETS[name], quantize_x=True)
    text = warm_up(TARGETS[name], config, Signature.of(DEEPSEEK, FP8, "fp8")).asm[asm]
    assert division in text
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
    """Ignored where unsupported."""
    many_steps = KernelConfig("split_k", block_m=16, block_k=64, split_k=2, num_stages=2, slices=4)
    for config in (*(choose(m, DEEPSEEK, FP8, TARGETS[name]) for m in (4, 16)), many_steps):
        for pdl in (False, True):
            kernel = warm_up(TARGETS[name], replace(config, pdl=pdl), Signature.of(DEEPSEEK, FP8))
            has_pdl = pdl and TARGETS[name].is_cuda(90)
            binary = Binary.of(kernel, TARGETS[name])
            assert (count(binary, "ACQBULK") > 0) == (count(binary, "PREEXIT") > 0) == has_pdl
            if has_pdl:
                assert first_use_of_x(kernel.asm["ptx"]) == "griddepcontrol.wait ;"
