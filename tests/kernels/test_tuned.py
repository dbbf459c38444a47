"""Tables of measurements: what is written is read back, what does not fit is refused, and launches follow them."""

import dataclasses
import json
import logging
from unittest import mock

import pytest
import torch

from indexproj.benchmarks.stub import stub_driver
from indexproj.kernels import TARGETS, DenseMatrix, KernelConfig, ProjectionWeights, choose, launch, project, tuned
from indexproj.kernels.matrix import Kind
from indexproj.kernels.tuned import Case, Entry, Table
from support import GLM, weights

GPU, SM90 = "NVIDIA H100 80GB HBM3", TARGETS["sm_90"]
BF16, FP32 = torch.bfloat16, torch.float32
SPLIT = KernelConfig("split_k", block_m=16, block_k=64, split_k=6, slices=4, num_warps=4, num_stages=2)
GEMV = KernelConfig("gemv", block_m=8, block_k=128, slices=8)
FP8 = Case(16, GLM, (Kind.FP8_BLOCK, Kind.BF16))
DENSE = Case(16, GLM, (Kind.BF16, Kind.BF16))


def table(*entries):
    return Table(GPU, "2026-11-24", tuned.versions(), entries)


ENTRIES = (
    Entry(FP8, SPLIT, 3.25, GEMV, 4.0, 3.5, {"fp32": 3.0, "bf16": 3.0}, tried=9, candidates=20),
    Entry(DENSE, SPLIT, 3.25, None, None, 3.25, {"fp32": 6.0, "bf16": 3.0}, tried=1, candidates=20),
)


@pytest.fixture
def path(tmp_path):
    table(*ENTRIES).write(tmp_path / "deep/table.json")
    return tmp_path / "deep/table.json"


def test_what_is_written_is_read_back(path):
    assert Table.read(path, GPU, SM90) == table(*ENTRIES)
    assert len(path.read_text().splitlines()) == 9  # an entry a line
    empty = table()
    empty.write(path)
    assert Table.read(path, GPU, SM90) == empty


def test_a_pick_is_for_all_m_that_round_up_to_it(path):
    found = Table.read(path, GPU, SM90)
    for m, expected in ((8, None), (9, SPLIT), (16, SPLIT), (17, None)):
        assert found.find(m, GLM, FP8.kinds, None) == expected
    assert found.find(16, (128, 64, 7168), FP8.kinds, None) is None
    assert found.find(16, GLM, (Kind.NVFP4, Kind.BF16), None) is None


def test_torch_is_picked_where_it_was_faster_and_computes_the_same(path):
    found = Table.read(path, GPU, SM90)
    picks = [found.find(16, GLM, DENSE.kinds, outs) for outs in ((BF16, BF16), (BF16, FP32), (FP32, FP32), None)]
    assert picks == ["torch", SPLIT, SPLIT, SPLIT]
    for kinds in (FP8.kinds, (Kind.BF16, Kind.FP8_BLOCK)):  # torch would need another copy of the weights
        entry = dataclasses.replace(ENTRIES[1], case=Case(16, GLM, kinds))
        assert entry.torch_for == []
    for us, outs in ((3.25, []), (3.2, []), (3.18, ["bf16"])):  # by more than what two measurements differ
        assert dataclasses.replace(ENTRIES[1], torch_us={"bf16": us}).torch_for == outs


def changed(place, **fields):
    def change(content):
        (content["entries"][place] if isinstance(place, int) else content).update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("head", gpu="NVIDIA H200"), "other GPU: expected NVIDIA H100 80GB HBM3, got NVIDIA H200; run"),
        (changed("head", versions=tuned.versions() | {"kernels": "0" * 12}), "other kernels or versions"),
        (
            changed("head", versions=tuned.versions() | {"triton": "3.0"}),
            "other kernels or versions: .*3.0'}; run",
        ),
        (changed("head", extra=1), "cannot be used: .*extra"),
        (lambda content: content.pop("date"), "cannot be used: .*date"),
        (lambda content: content.pop("entries"), "no table .*entries"),
        (lambda content: content.pop("versions"), "no table .*versions"),
        (lambda content: content["entries"].append(content["entries"][0]), "two entries for one case"),
        (lambda content: content["entries"][1].pop("us"), "entry 2: .*us"),
        (lambda content: content["entries"][1].pop("m"), "entry 2: 'm' is missing"),
        (changed(0, pick="torch"), "entry 1: "),
        (changed(0, pick=None), "entry 1: "),
        (changed(0, torch_for=["bf16"]), r"entry 1: expected torch_for to be \[\] .* got \['bf16'\]"),
        (changed(1, us=2.5), r"entry 2: expected torch_for to be \[\]"),
        (changed(1, us="3.25"), "entry 2: "),
        (changed(1, us=-1), "entry 2: expected microseconds"),
        (changed(1, us=10**400), "entry 2: expected microseconds"),
        (changed(1, us=float("inf")), "entry 2: expected microseconds"),
        (changed(0, runner_up_us="4"), "entry 1: expected microseconds"),
        (changed(0, tried=0), "entry 1: expected how many kernels were tried"),
        (changed(0, tried=21), "entry 1: expected how many kernels were tried"),
        (changed(1, torch_us={"fp64": 3.0}, torch_for=["fp64"]), "entry 2: expected microseconds"),
        (changed(0, pick={"regime": "tiled", "block_m": 24, "block_k": 64}), "entry 1: KernelConfig: block_m"),
        (changed(0, pick={"regime": "tiled", "block_n": 16}), "entry 1: .*block_m"),
        (changed(0, pick={"regime": "gemv", "block_m": 1, "block_k": 64}), "entry 1: expected a kernel that .* tries"),
        (
            changed(0, pick={"regime": "tiled", "block_m": 256, "block_k": 128, "num_stages": 8}),
            "entry 1: expected a ke",
        ),
        (changed(0, tried="9"), "entry 1: expected how many kernels were tried"),
        (changed(1, candidates=None), "entry 2: expected how many kernels were tried"),
        (changed(0, m=15), "entry 1: expected a power of two as m, got 15"),
        (changed(0, m="16"), "entry 1: expected a power of two as m, got '16'"),
        (changed(0, kinds=["INT4", "BF16"]), "entry 1: 'INT4' is missing or unknown"),
        (changed(0, kinds=["BF16"]), "entry 1: expected as many kinds as matrices"),
        (changed(0, shape=[128]), "entry 1: expected as many kinds as matrices"),
        (changed(0, shape=None), "entry 1: "),
        (changed(0, shape=[128, 32, [6144]]), "entry 1: expected a shape of positive numbers"),
        (changed(0, kinds=["W8A8", "BF16"]), "entry 1: expected kinds that `indexproj tune` measures"),
        (changed(0, pick={"regime": "tiled", "block_m": 16.0, "block_k": 64}), "entry 1: KernelConfig: block_m"),
        (changed(0, pick={"regime": "tiled", "block_m": True, "block_k": 64}), "entry 1: KernelConfig: block_m"),
        (lambda content: content["entries"].insert(0, 3), "entry 1: "),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_a_reason(path, change, message):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        Table.read(path, GPU, SM90)
    assert str(path) in str(caught.value)


def test_a_table_of_another_gpu_is_refused_for_that(path):
    """Not for kernels that this one would not try."""
    with pytest.raises(ValueError, match="measured with other GPU"):
        Table.read(path, "NVIDIA H20", dataclasses.replace(SM90, sm_count=1000))
    with pytest.raises(ValueError, match="entry 1: expected a kernel"):
        Table.read(path, GPU, dataclasses.replace(SM90, sm_count=1000))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"entries": 3}', "null", "\ud800", "[" * 100_000])
def test_a_file_that_is_no_table_is_refused(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="run `indexproj tune` again"):
        Table.read(path, GPU, SM90)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that has a name, and a config folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(tuned, "target_of", lambda _: SM90)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.table_of.cache_clear()
    yield torch.device("cuda", 0)
    tuned.table_of.cache_clear()


def test_tables_are_found_in_the_config_folder_or_where_the_variable_says(gpu, path, monkeypatch, tmp_path):
    assert tuned.table_of(gpu) is None
    tuned.table_of.cache_clear()
    assert tuned.default_path(GPU) == tmp_path / "config/indexproj/nvidia-h100-80gb-hbm3.json"
    table(ENTRIES[0]).write(tuned.default_path(GPU))
    assert tuned.table_of(gpu) == table(ENTRIES[0])
    for value, expected in ((str(path), table(*ENTRIES)), ("", None)):
        monkeypatch.setenv(tuned.VARIABLE, value)
        tuned.table_of.cache_clear()
        assert tuned.table_of(gpu) == expected
    assert tuned.table_of(torch.device("cpu")) is None
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tuned, "INTERPRETED", True)
    tuned.table_of.cache_clear()
    assert tuned.table_of(gpu) is None


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "corrupt"])
def test_a_refused_table_is_a_warning_and_no_error(gpu, path, monkeypatch, caplog, content):
    path.unlink()
    if content:
        path.write_text(content)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    with caplog.at_level(logging.INFO, "indexproj"):
        assert tuned.table_of(gpu) is None
        assert tuned.table_of(gpu) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()


@pytest.fixture
def driver(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(launch, "table_of", lambda device: table(*ENTRIES))
    with stub_driver(tmp_path / "cache") as stub:
        yield stub


@pytest.mark.parametrize("gate_dtype", [FP32, BF16])
def test_a_launch_has_the_config_that_was_fastest(driver, gate_dtype):
    w, reckoned = weights("fp8-dense", GLM), choose(16, GLM, FP8.kinds, TARGETS["sm_90"])
    x = torch.zeros(16, GLM[2], dtype=BF16)
    assert SPLIT.grid(16, 128, 32) != reckoned.grid(16, 128, 32)
    for m in (9, 16):
        for _ in range(2):
            project(x[:m], w, gate_dtype=gate_dtype)
            assert driver.grid == SPLIT.grid(m, 128, 32)
    for run in (
        lambda: project(x, weights("nvfp4-nvfp4", GLM)),  # not measured
        lambda: project(x.half(), w),
        lambda: project(x, w, batch_invariant=True),
    ):
        before = driver.launches
        run()
        assert driver.launches == before + 1
        assert driver.grid == reckoned.grid(16, 128, 32)


@pytest.mark.parametrize("row", [160, 200], ids=["contiguous", "row-strided"])
def test_torch_multiplies_where_it_was_fastest(driver, row, monkeypatch):
    products = mock.Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", products)
    w, x = weights("dense-dense", GLM), torch.randn(13, GLM[2]).bfloat16()
    out = torch.full((13, row), torch.nan, dtype=BF16)[:, :160]
    before = driver.launches
    k, gate = project(x, w, out=out)
    assert (products.call_count, driver.launches) == (1, before)  # both in one, as in vLLM
    assert torch.equal(out, torch.nn.functional.linear(x, w.fused_weight))
    assert torch.equal(torch.cat((k, gate), 1), out)


def test_torch_does_not_multiply_twice_what_was_measured_as_one(driver, monkeypatch):
    """Where outputs or weights are apart; kernels take them as they are."""
    products = mock.Mock(wraps=torch.mm)
    monkeypatch.setattr(torch, "mm", products)
    packed, x, out = weights("dense-dense", GLM), torch.zeros(13, GLM[2], dtype=BF16), torch.empty(13, 160, dtype=BF16)
    apart = ProjectionWeights(*(DenseMatrix(matrix.weight.clone()) for matrix in (packed.wk, packed.gate)))
    for run in (lambda: project(x, packed, gate_dtype=BF16), lambda: project(x, apart, out=out)):
        for _ in range(2):  # compiled, and taken from what is kept
            before = driver.launches
            run()
            assert (products.call_count, driver.launches) == (0, before + 1)
            assert driver.grid == SPLIT.grid(13, 128, 32)
    project(x, packed, out=out)  # the same problem to a kernel, and still torch's
    assert products.call_count == 1


def test_torch_multiplies_what_requires_grad_as_the_kernels_do(driver):
    w, x = weights("dense-dense", GLM), torch.zeros(13, GLM[2], dtype=BF16, requires_grad=True)
    out = torch.empty(13, 160, dtype=BF16)
    torch.ops.indexproj.project_out(x, [w.wk.weight, w.gate.weight], "BF16 BF16", out)
    assert torch.equal(out, torch.zeros(13, 160, dtype=BF16))


def test_a_config_that_is_given_goes_before_the_table(driver):
    w, x = weights("fp8-dense", GLM), torch.zeros(16, GLM[2], dtype=BF16)
    outs = torch.empty(16, 128, dtype=BF16), torch.empty(16, 32)
    launch.launch(x, (w.wk.operands, w.gate.operands), outs, launch.problem_of(w, BF16, FP32), GEMV)
    assert driver.grid == GEMV.grid(16, 128, 32) != SPLIT.grid(16, 128, 32)


def test_without_a_home_there_is_no_table_and_no_error(gpu, monkeypatch):
    monkeypatch.setattr(tuned, "default_path", mock.Mock(side_effect=RuntimeError("no home directory")))
    assert tuned.table_of(gpu) is None


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_torch_does_not_multiply_what_it_would_round_twice(driver, dtype, monkeypatch):
    entry = dataclasses.replace(ENTRIES[1], torch_us={"fp32": 3.0, "bf16": 3.0})
    monkeypatch.setattr(launch, "table_of", lambda device: table(entry))
    w, x = weights("dense-dense", GLM), torch.zeros(13, GLM[2], dtype=BF16)
    before = driver.launches
    options = {"out": torch.empty(13, 160, dtype=BF16)} if dtype == BF16 else {"gate_dtype": FP32}
    project(x, w, gate_scale=0.5, **options)
    assert driver.launches == before + 1
    assert driver.grid == SPLIT.grid(13, 128, 32)


def test_torch_does_not_multiply_for_who_asks_for_deterministic_algorithms(driver):
    w, x = weights("dense-dense", GLM), torch.zeros(13, GLM[2], dtype=BF16)
    before = driver.launches
    torch.use_deterministic_algorithms(True)
    try:
        project(x, w, out=torch.empty(13, 160, dtype=BF16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert driver.launches == before + 1


@pytest.mark.usefixtures("mm_to_fp32")
def test_torch_gives_the_gate_in_fp32_where_that_is_asked_for(driver, monkeypatch):
    entry = dataclasses.replace(ENTRIES[1], torch_us={"fp32": 3.0})
    monkeypatch.setattr(launch, "table_of", lambda device: table(entry))
    w, x = weights("dense-dense", GLM), torch.randn(13, GLM[2]).bfloat16()
    before = driver.launches
    _, gate = project(x, w)
    assert driver.launches == before
    assert gate.dtype == FP32
    assert torch.equal(gate, x.float() @ w.gate.weight.float().T)
