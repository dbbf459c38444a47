"""Dispatch: a pure function, checked for every GPU that the gates cover; and the tuned table that overrides it."""

import json
import logging
import math
from unittest import mock

import pytest
import torch

from indexproj.indexer.models import PAIRS
from indexproj.kernels import TARGETS, DenseMatrix, KernelConfig, ProjectionWeights, choose, dispatch, launch, project
from indexproj.kernels.dispatch import cdiv, next_power_of_2
from indexproj.kernels.formats import Format, parse_pair
from indexproj.kernels.target import Target
from stub import stub_driver
from support import DEEPSEEK, GLM, weights

FP8 = (Format.FP8_BLOCK, Format.BF16)
SM90 = TARGETS["sm_90"]
BF16, FP32 = torch.bfloat16, torch.float32
V4 = (2048, 64, 512, 7168)  # DeepSeek-V4's three projections of one x


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM, (128, 32, 128, 6144), V4], ids=str)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("quantize_x", [False, True])
def test_every_m_has_a_regime_and_every_split_has_work(name, shape, dtype, quantize_x):
    target = TARGETS[name]
    gemv_rows, split_k_rows = (1, 32) if quantize_x else (4, 64)
    around = [2**power + offset for power in range(6, 17) for offset in (-1, 0, 1)][:-1]
    for pair in ["FP8 128x128, BF16"] if quantize_x else PAIRS:
        for m in [*range(1, 70), *around]:
            config = choose(m, shape, parse_pair(pair), target, dtype, quantize_x=quantize_x)
            step = config.block_k * config.slices
            steps = cdiv(shape[-1], step * config.split_k)
            assert (config.split_k - 1) * steps * step < shape[-1]
            per_sm = 4 if m == 1 and not quantize_x else 2
            is_gemv = m <= gemv_rows and sum(shape[:-1]) <= per_sm * target.sm_count  # one wave
            if shape == V4:  # tiles of split_k do not fit in one wave either
                assert config.regime == "prefill"
            elif len(shape) == 3 or not quantize_x:
                assert config.regime == ("gemv" if is_gemv else "split_k" if m <= split_k_rows else "prefill")
            assert step % 128 == 0 or not quantize_x  # scale groups of x
            if config.regime == "split_k":
                assert math.prod(config.grid(m, *shape[:-1])) <= 2 * target.sm_count
            if config.regime == "gemv":
                assert config.grid(m, *shape[:-1]) == (sum(shape[:-1]), 1, 1)  # loads weights once


@pytest.mark.parametrize("name", TARGETS)
def test_few_kernels_serve_all_batch_sizes(name):
    assert len({choose(m, DEEPSEEK, FP8, TARGETS[name]) for m in (*range(1, 600), *range(600, 65537, 100))}) <= 15


@pytest.mark.parametrize("name", TARGETS)
def test_batch_invariant_sums_have_the_same_order_for_every_m(name):
    ms = (*range(1, 600), 1000, 4096, 65536)
    configs = [choose(m, DEEPSEEK, FP8, TARGETS[name], batch_invariant=True) for m in ms]
    assert {(c.regime, c.block_k, c.block_n, c.slices, c.split_k, c.num_warps) for c in configs} == {
        ("split_k", 64, 16, 8, 14, 8)
    }
    assert [c.loop_splits for c in configs] == [m > 64 for m in ms]


@pytest.mark.parametrize(
    ("m", "programs", "workspace"),
    [
        (1, 192, (0, 0)),
        (4, 192, (0, 0)),
        (16, 12 * 14, (12 * 14 * 16 * 16, 12)),
        (64, 2 * 12 * 7, (24 * 7 * 16 * 32, 24)),
        (100, 4 * 3 * 11, (4 * 3 * 11 * 32 * 64, 12)),
        (512, 8 * 3 * 5, (8 * 3 * 5 * 64 * 64, 24)),
        (4096, 32 * 2, (32 * 2 * 128 * 192, 32)),
        (8192, 64 * 2, (64 * 2 * 128 * 192, 64)),
        (65536, 512, (0, 0)),
    ],
)
def test_grid_and_workspace_on_an_h100(m, programs, workspace):
    config = choose(m, DEEPSEEK, FP8, SM90)
    assert math.prod(config.grid(m, 128, 64)) == programs
    assert config.workspace_size(m, 128, 64) == workspace
    looped = choose(65536, DEEPSEEK, FP8, SM90, batch_invariant=True)
    assert looped.workspace_size(65536, 128, 64) == (0, 0)


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM, (128, 32, 128, 6144), (128, 256, 6144), V4], ids=str)
@pytest.mark.parametrize("quantize_x", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_last_program_reads_at_most_100_kb(name, quantize_x, shape):
    for m in (2**power for power in range(17)):
        config = choose(m, shape, FP8, TARGETS[name], quantize_x=quantize_x)
        read = 1 if config.split_k == 2 and config.regime == "prefill" else config.split_k
        assert not config.has_workspace or 4 * read * config.acc_size(*shape[:-1]) <= 100_000


@pytest.mark.parametrize("name", TARGETS)
def test_prefill_fills_the_gpu(name):
    target = TARGETS[name]
    for m in (2**power for power in range(7, 17)):
        config = choose(m, DEEPSEEK, FP8, target)
        assert math.prod(config.grid(m, *DEEPSEEK[:-1])) >= dispatch.FILLED * target.sm_count, config


def test_fp16_takes_half_of_k_per_step():
    for m in (100, 10_000):
        assert [choose(m, GLM, FP8, SM90, dtype).block_k for dtype in (torch.float16, BF16)] == [32, 64]


def test_small_k_is_not_split_beyond_its_blocks():
    assert choose(10, (128, 16, 100), FP8, SM90).split_k == 1
    assert choose(100, (128, 16, 100), FP8, SM90).split_k == 2


def test_newer_gpus_have_the_tiles_of_their_generation():
    """One program computes all columns where the tensor core reads weights from shared memory."""
    for arch, block_n in ((80, 64), (89, 64), (90, 0), (100, 0), (103, 0), (120, 64), (121, 64)):
        assert choose(65536, DEEPSEEK, FP8, Target("cuda", arch, 140)).block_n == block_n


@pytest.mark.parametrize(
    "field",
    [{"block_k": 256}, {"block_k": 16}, {"split_k": 0}, {"num_stages": 0}, {"regime": "tiled"}, {"block_m": 10},
     {"slices": 3}, {"num_warps": 3}, {"block_n": 24},
     {"regime": "split_k", "block_n": 0}, {"pdl": True}, {"loop_splits": True}, {"regime": "gemv", "split_k": 2}],
    ids=str,
)  # fmt: skip
def test_configs_that_no_kernel_has_are_refused(field):
    with pytest.raises(ValueError, match="KernelConfig: expected"):
        KernelConfig(**{"regime": "prefill", "block_m": 16, "block_k": 64} | field)


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


# The tuned table.

GPU = "NVIDIA H100 80GB HBM3"
SPLIT = KernelConfig("split_k", block_m=16, block_k=64, split_k=6, slices=4, num_warps=4, num_stages=2)
SPLIT_FIELDS = {"regime": "split_k", "block_m": 16, "block_k": 64, "split_k": 6, "slices": 4, "num_warps": 4,
                "num_stages": 2}  # fmt: skip
CASES = {"fp8": (16, GLM, FP8), "bf16": (16, GLM, (Format.BF16, Format.BF16))}


def content(**changes):
    """A table as benchmarks/tune.py writes it."""
    entries = [
        {"m": 16, "shape": [*GLM], "formats": list(map(str, formats)), "config": SPLIT_FIELDS, "us": 3.25,
         "torch_for": torch_for}
        for (_, _, formats), torch_for in zip(CASES.values(), ([], ["bf16"]), strict=True)
    ]  # fmt: skip
    head = {"schema": dispatch.TABLE_SCHEMA, "gpu": GPU, "versions": dispatch.versions(), "date": "2026-11-24"}
    return head | {"entries": entries} | changes


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that has a name, and a config folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(dispatch.TABLE_VARIABLE, raising=False)
    dispatch.table_of.cache_clear()
    yield torch.device("cuda", 0)
    dispatch.table_of.cache_clear()


def test_table_is_found_by_default_and_by_variable(gpu, monkeypatch, tmp_path):
    assert dispatch.table_of(gpu) == {}
    path = dispatch.table_path(GPU)
    assert path == tmp_path / "config/indexproj/nvidia-h100-80gb-hbm3.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content()))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content(entries=[])))
    expected = {CASES["fp8"]: (SPLIT, ()), CASES["bf16"]: (SPLIT, ((BF16, BF16),))}
    for value, table in ((None, expected), (str(other), {}), ("", {})):
        dispatch.table_of.cache_clear()
        if value is not None:
            monkeypatch.setenv(dispatch.TABLE_VARIABLE, value)
        assert dispatch.table_of(gpu) == table
    monkeypatch.delenv(dispatch.TABLE_VARIABLE)
    assert dispatch.table_of(torch.device("cpu")) == {}
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    dispatch.table_of.cache_clear()
    assert dispatch.table_of(gpu) == {}


@pytest.mark.parametrize(
    "text",
    [
        None, "", "{", "[]", "3", "\ud800", "{}",
        content(gpu="NVIDIA H200"),
        content(schema=0),
        content(versions=dispatch.versions() | {"triton": "3.0"}),
        content(entries=3),
        content(entries=[3]),
        content(entries=[content()["entries"][0] | {"formats": ["INT4", "BF16"]}]),
        content(entries=[content()["entries"][0] | {"config": "torch"}]),
        content(entries=[content()["entries"][0] | {"config": SPLIT_FIELDS | {"block_k": 256}}]),
        content(entries=[content()["entries"][0] | {"config": SPLIT_FIELDS | {"serial": True}}]),
        content(entries=[content()["entries"][1] | {"torch_for": ["fp64"]}]),
    ],
    ids=lambda text: str(text)[:40],
)  # fmt: skip
def test_unusable_table_is_one_warning(gpu, monkeypatch, tmp_path, caplog, text):
    path = tmp_path / "table.json"
    if text is not None:
        text = json.dumps(text) if isinstance(text, dict) else text
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    monkeypatch.setenv(dispatch.TABLE_VARIABLE, str(path))
    with caplog.at_level(logging.INFO, "indexproj"):
        assert dispatch.table_of(gpu) == {}
        assert dispatch.table_of(gpu) == {}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()


def test_no_home_folder_is_no_error(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "table_path", mock.Mock(side_effect=RuntimeError("no home directory")))
    assert dispatch.table_of(gpu) == {}


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A stub driver, and a table that prefers torch for BF16 with one output tensor."""
    table = {CASES["fp8"]: (SPLIT, ()), CASES["bf16"]: (SPLIT, ((BF16, BF16),))}
    monkeypatch.setattr(launch, "table_of", lambda device: table)
    with stub_driver(tmp_path / "cache") as stub:
        yield stub


@pytest.fixture
def products(monkeypatch):
    counter = mock.Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", counter)
    return counter


@pytest.mark.parametrize("gate_dtype", [FP32, BF16])
def test_launch_uses_the_tuned_config(driver, gate_dtype):
    w, default = weights("FP8 128x128, BF16", GLM), choose(16, GLM, FP8, SM90)
    x = torch.zeros(17, GLM[2], dtype=BF16)
    assert SPLIT.grid(16, 128, 32) != default.grid(16, 128, 32)
    for m in (9, 9, 16):
        project(x[:m], w, gate_dtype=gate_dtype)
        assert driver.grid == SPLIT.grid(m, 128, 32)
    for run in (
        lambda: project(x[:16], weights("NVFP4, NVFP4", GLM)),  # not measured
        lambda: project(x[:16].half(), w),
        lambda: project(x[:16], w, batch_invariant=True),
        lambda: project(x[:16], w, activation="fp8"),
    ):
        before = driver.launches
        run()
        assert driver.launches == before + 1
        assert driver.grid == default.grid(16, 128, 32)
    for m in (8, 17):  # other powers of two
        project(x[:m], w)
        assert driver.grid == choose(m, GLM, FP8, SM90).grid(m, 128, 32)


def test_launch_with_a_given_config_ignores_the_table(driver):
    gemv = KernelConfig("gemv", block_m=8, block_k=128, slices=8)
    w, x = weights("FP8 128x128, BF16", GLM), torch.zeros(16, GLM[2], dtype=BF16)
    outs = torch.empty(16, 128, dtype=BF16), torch.empty(16, 32)
    launch.launch(x, (w.wk.operands, w.gate.operands), outs, launch.signature_of(w, BF16, FP32), gemv)
    assert driver.grid == gemv.grid(16, 128, 32) != SPLIT.grid(16, 128, 32)


@pytest.mark.parametrize("row", [160, 200], ids=["contiguous", "row-strided"])
def test_torch_mm_runs_where_it_was_faster(driver, row, products):
    w, x = weights("BF16, BF16", GLM), torch.randn(13, GLM[2]).bfloat16()
    out = torch.full((13, row), torch.nan, dtype=BF16)[:, :160]
    before = driver.launches
    k, gate = project(x, w, out=out)
    assert (products.call_count, driver.launches) == (1, before)  # both in one GEMM, as in vLLM
    assert torch.equal(out, torch.nn.functional.linear(x, w.fused_weight))
    assert torch.equal(torch.cat((k, gate), 1), out)


def test_torch_mm_needs_weights_and_outputs_in_one_tensor(driver, products):
    packed, x, out = weights("BF16, BF16", GLM), torch.zeros(13, GLM[2], dtype=BF16), torch.empty(13, 160, dtype=BF16)
    apart = ProjectionWeights(*(DenseMatrix(matrix.weight.clone()) for matrix in (packed.wk, packed.gate)))
    for run in (lambda: project(x, packed, gate_dtype=BF16), lambda: project(x, apart, out=out)):
        for _ in range(2):
            before = driver.launches
            run()
            assert (products.call_count, driver.launches) == (0, before + 1)
            assert driver.grid == SPLIT.grid(13, 128, 32)
    project(x, packed, out=out)
    assert products.call_count == 1


def test_torch_mm_takes_tensors_that_require_grad(driver):
    w, x = weights("BF16, BF16", GLM), torch.zeros(13, GLM[2], dtype=BF16, requires_grad=True)
    out = torch.empty(13, 160, dtype=BF16)
    torch.ops.indexproj.project_out(x, [*w.wk.operands, *w.gate.operands], ["BF16", "BF16"], out)
    assert torch.equal(out, torch.zeros(13, 160, dtype=BF16))


def test_torch_mm_is_left_out_for_gate_scale_and_deterministic_algorithms(driver, products):
    w, x, out = weights("BF16, BF16", GLM), torch.zeros(13, GLM[2], dtype=BF16), torch.empty(13, 160, dtype=BF16)
    before = driver.launches
    project(x, w, gate_scale=0.5, out=out)  # torch would round before it multiplies
    torch.use_deterministic_algorithms(True)
    try:
        project(x, w, out=out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (products.call_count, driver.launches) == (0, before + 2)


@pytest.mark.usefixtures("mm_to_fp32")
def test_torch_mm_gives_the_gate_in_fp32(driver, monkeypatch):
    monkeypatch.setattr(launch, "table_of", lambda device: {CASES["bf16"]: (SPLIT, ((BF16, FP32),))})
    w, x = weights("BF16, BF16", GLM), torch.randn(13, GLM[2]).bfloat16()
    before = driver.launches
    _, gate = project(x, w)
    assert driver.launches == before
    assert torch.equal(gate, x.float() @ w.gate.weight.float().T)
