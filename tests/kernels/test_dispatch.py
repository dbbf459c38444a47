"""Dispatch: a pure function, checked for every GPU that the gates cover; and the file that overrides it."""

import json
import logging
import math
from unittest import mock

import pytest
import torch

from indexproj.indexer.models import PAIRS
from indexproj.kernels import TARGETS, KernelConfig, choose, dispatch
from indexproj.kernels.dispatch import cdiv
from indexproj.kernels.formats import Format, parse_pair
from indexproj.kernels.target import Target
from support import DEEPSEEK, GLM

FP8 = (Format.FP8_BLOCK, Format.BF16)
BF16, FP16 = torch.bfloat16, torch.float16
V4 = (2048, 64, 512, 7168)  # DeepSeek-V4's three projections of one x
SHAPES = [DEEPSEEK, GLM, (128, 32, 128, 6144), (128, 256, 6144), V4]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("quantize_x", [False, True])
def test_every_m_has_a_regime_and_every_split_has_work(name, shape, dtype, quantize_x):
    target, (*ns, k) = TARGETS[name], shape
    gemv_rows, split_k_rows = (1, 32) if quantize_x else (4, 64)
    around = [2**power + offset for power in range(6, 17) for offset in (-1, 0, 1)][:-1]
    for pair in ["FP8 128x128, BF16"] if quantize_x else PAIRS:
        for m in [*range(1, 70), *around]:
            config = choose(m, shape, parse_pair(pair), target, dtype, quantize_x=quantize_x)
            step = config.block_k * config.slices
            steps, programs = cdiv(k, step * config.split_k), math.prod(config.grid(m, *ns))
            assert (config.split_k - 1) * steps * step < k
            per_sm = 4 if m == 1 and not quantize_x else 2
            is_gemv = m <= gemv_rows and sum(ns) <= per_sm * target.sm_count  # one wave
            if shape == V4:  # tiles of split_k do not fit in one wave either
                assert config.regime == "prefill"
            elif sum(ns) <= (192 if quantize_x else 288):
                assert config.regime == ("gemv" if is_gemv else "split_k" if m <= split_k_rows else "prefill")
            assert step % 128 == 0 or not quantize_x  # scale groups of x
            if config.regime == "split_k":
                assert programs <= 2 * target.sm_count
            # Bytes that the last program of a tile reads: of two splits, one.
            read = 1 if config.split_k == 2 and config.regime == "prefill" else config.split_k
            assert not config.has_workspace or 4 * read * config.acc_size(*ns) <= 100_000


@pytest.mark.parametrize("name", TARGETS)
def test_few_kernels_serve_all_batch_sizes(name):
    """And batch-invariant sums have the same order for every M."""
    ms = (*range(1, 600), *range(600, 65537, 100))
    assert len({choose(m, DEEPSEEK, FP8, TARGETS[name]) for m in ms}) <= 15
    configs = [choose(m, DEEPSEEK, FP8, TARGETS[name], batch_invariant=True) for m in ms]
    (order,) = {(c.regime, c.block_k, c.block_n, c.slices, c.split_k, c.num_warps) for c in configs}
    assert order == ("split_k", 64, 16, 8, 14, 8)
    assert [c.loop_splits for c in configs] == [m > 64 for m in ms]


W8A8, X_FP16, INVARIANT = {"quantize_x": True}, {"x_dtype": FP16}, {"batch_invariant": True}


# Per config the programs of the launch and its workspace: partial sums and counters.
@pytest.mark.parametrize(
    ("m", "shape", "name", "options", "config", "programs", "workspace"),
    [
        (4, DEEPSEEK, "sm_90", {}, "gemv 4x2048; 8, 1", 192, (0, 0)),
        (4, DEEPSEEK, "gfx942", {}, "gemv 4x2048; 4, 1", 192, (0, 0)),
        (16, DEEPSEEK, "sm_90", {}, "split_k 16x16x512, K/14; 8, 2", 12 * 14, (12 * 14 * 16 * 16, 12)),
        (64, DEEPSEEK, "sm_90", {}, "split_k 32x16x512, K/7; 8, 2", 2 * 12 * 7, (24 * 7 * 16 * 32, 24)),
        (4096, DEEPSEEK, "sm_90", {}, "prefill 128xNx64, K/2; 8, 3", 32 * 2, (32 * 2 * 128 * 192, 32)),
        # x in fp16 takes half of K per step, x in e4m3 whole scale groups. Both take registers.
        (100, GLM, "sm_90", X_FP16, "prefill 32x64x32, K/11; 4, 3", 4 * 3 * 11, (4 * 3 * 11 * 32 * 64, 12)),
        (10000, GLM, "sm_90", X_FP16, "prefill 64xNx32; 8, 3", 157, (0, 0)),
        (33, DEEPSEEK, "sm_90", W8A8, "prefill 32x64x128, K/12; 4, 2", 2 * 3 * 12, (2 * 3 * 12 * 32 * 64, 6)),
        (65536, DEEPSEEK, "sm_90", W8A8, "prefill 64xNx128; 8, 2", 1024, (0, 0)),
        (65536, DEEPSEEK, "sm_90", W8A8 | X_FP16, "prefill 32x64x128; 4, 2", 2048 * 3, (0, 0)),
        (65536, DEEPSEEK, "sm_90", INVARIANT, "split_k 32x16x512, K/14, looped; 8, 2", 2048 * 12, (0, 0)),
        # No more than 16 splits.
        (8, (128, 16, 16384), "gfx942", {}, "split_k 16x16x512, K/16; 8, 2", 9 * 16, (9 * 16 * 16 * 16, 9)),
        (100, (40, 9, 7168), "gfx942", {}, "prefill 16x64x64, K/16; 4, 2", 14 * 16, (14 * 16 * 16 * 64, 14)),
        # All columns in one program while its accumulators fit the registers, else 128 if they divide the rows well.
        (65536, (128, 256, 6144), "sm_90", {}, "prefill 64xNx64; 8, 3", 1024, (0, 0)),
        (65536, (128, 256, 6144), "sm_90", W8A8, "prefill 64x64x128; 4, 2", 1024 * 6, (0, 0)),
        (65536, (128, 272, 6144), "sm_90", {}, "prefill 128x64x64; 8, 3", 512 * 7, (0, 0)),
        (65536, (640, 64, 7168), "sm_80", {}, "prefill 128x128x64; 8, 3", 512 * 6, (0, 0)),
    ],
)
def test_choose_table(m, shape, name, options, config, programs, workspace):
    """The string of a config; warps, stages."""
    chosen = choose(m, shape, FP8, TARGETS[name], **options)
    assert f"{chosen}; {chosen.num_warps}, {chosen.num_stages}" == config
    assert math.prod(chosen.grid(m, *shape[:-1])) == programs
    assert chosen.workspace_size(m, *shape[:-1]) == workspace


def test_newer_gpus_have_the_tiles_of_their_generation():
    """One program computes all columns where the tensor core reads weights from shared memory."""
    for arch, block_n in ((80, 64), (89, 64), (90, 0), (100, 0), (103, 0), (120, 64), (121, 64)):
        assert choose(65536, DEEPSEEK, FP8, Target("cuda", arch, 140)).block_n == block_n


@pytest.mark.parametrize(
    "field",
    [{"block_k": 256}, {"block_k": 16}, {"split_k": 0}, {"num_stages": 0}, {"regime": "tiled"}, {"block_m": 10},
     {"slices": 3}, {"num_warps": 3}, {"block_n": 24}, {"block_k": 64.0}, {"split_k": 7.5}, {"block_m": 16.0},
     {"num_stages": 2.0}, {"slices": "2"}, {"block_n": 0.0},
     {"regime": "split_k", "block_n": 0}, {"pdl": True}, {"loop_splits": True}, {"regime": "gemv", "split_k": 2}],
    ids=str,
)  # fmt: skip
def test_configs_that_no_kernel_has_are_refused(field):
    with pytest.raises(ValueError, match="KernelConfig: expected"):
        KernelConfig(**{"regime": "prefill", "block_m": 16, "block_k": 64} | field)


GPU = "NVIDIA H100 80GB HBM3"
SPLIT_FIELDS = {"regime": "split_k", "block_m": 16, "block_k": 64, "split_k": 6, "slices": 4}


def entry(formats="FP8 128x128, BF16", config=SPLIT_FIELDS, torch_for=()):
    return {"m": 16, "shape": [*GLM], "formats": formats.split(", "), "config": config, "us": 3.25,
            "torch_for": [*torch_for]}  # fmt: skip


def content(*entries, **changes):
    """A table as benchmarks/tune.py writes it."""
    head = {"schema": dispatch.TABLE_SCHEMA, "gpu": GPU, "versions": dispatch.versions(), "date": "2026-11-24"}
    return head | {"entries": [*entries]} | changes


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
    entries = [entry(pair, torch_for=["bf16"]) for pair in ("FP8 128x128, BF16", "BF16, BF16")]
    path.write_text(json.dumps(content(*entries)))
    (other := tmp_path / "other.json").write_text(json.dumps(content()))
    split, dense = KernelConfig(**SPLIT_FIELDS), (Format.BF16, Format.BF16)
    # torch.mm takes no FP8.
    expected = {(16, GLM, FP8): (split, ()), (16, GLM, dense): (split, ((BF16, BF16),))}
    for value, table in ((None, expected), (str(other), {}), ("", {})):
        dispatch.table_of.cache_clear()
        if value is not None:
            monkeypatch.setenv(dispatch.TABLE_VARIABLE, value)
        assert dispatch.table_of(gpu) == table
    monkeypatch.delenv(dispatch.TABLE_VARIABLE)
    assert dispatch.table_of(torch.device("cpu")) == {}
    with mock.patch.object(dispatch, "table_path", side_effect=RuntimeError("no home directory")):
        dispatch.table_of.cache_clear()
        assert dispatch.table_of(gpu) == {}
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
        content(3),
        content(entry("INT4, BF16")),
        content(entry(config="torch")),
        content(entry(config=SPLIT_FIELDS | {"block_k": 256})),
        content(entry(config=SPLIT_FIELDS | {"serial": True})),
        content(entry("BF16, BF16", torch_for=["fp64"])),
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
