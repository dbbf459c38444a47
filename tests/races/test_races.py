"""The kernels' IR for sm_90, executed on the CPU: no races, no access out of bounds, and every mutant is caught.

Bounds are those of a tensor's memory. Not covered: what lies below Triton's IR, PDL, and AMD's wait for its stores.
"""

import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest
import torch

from indexproj.indexer.cli.synthetic import random_matrix
from indexproj.kernels import TARGETS, KernelConfig
from indexproj.kernels import launch as original
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.reference import quantize
from numerics import relative_error

REASON = "`make test-races` makes the environment that has ttsem"
sanitize = pytest.importorskip("ttsem.sanitize", reason=REASON)
happens_before = pytest.importorskip("races.happens_before", reason=REASON)

# Configs, and rows of x that their blocks do not divide. Of K = 200 the last split gets nothing.
LAUNCHES = {
    "gemv": (KernelConfig("gemv", block_m=4, block_k=64, slices=8), 6),
    "split_k": (KernelConfig("split_k", block_m=8, block_k=32, slices=2, split_k=3), 11),
    "looped": (KernelConfig("split_k", block_m=8, block_k=32, slices=2, split_k=3, loop_splits=True), 11),
    "prefill": (KernelConfig("prefill", block_m=16, block_k=64, block_n=0), 19),
    "splits": (KernelConfig("prefill", block_m=16, block_k=64, block_n=0, split_k=3), 19),
    "halves": (KernelConfig("prefill", block_m=16, block_k=64, block_n=16, split_k=2), 19),
}


@pytest.fixture
def run(monkeypatch):
    """Launches matrices of up to 40, 9 and 24 rows; returns the error against fp64 and the counters afterwards.

    ttsem runs the launch, and raises KernelFault at a race or an access out of bounds. "W8A8" is an FP8 matrix that
    takes x in e4m3, in steps of twice the depth: x has a scale per 128 of K.
    """

    def launch(module, config, m, labels, k=200):
        counters = []

        def workspace(device, partials, count):  # the real one returns larger buffers
            if not count:
                return None, None
            counters.append(torch.zeros(count, dtype=torch.int32))
            return torch.full((partials,), torch.nan), counters[-1]

        monkeypatch.setattr(module, "workspace", workspace)
        monkeypatch.setattr(module, "target_of", lambda device: TARGETS["sm_90"])
        constants = module.constants  # ttsem runs no inline assembly
        monkeypatch.setattr(module, "constants", lambda *a: {k: k != "PACKED" and v for k, v in constants(*a).items()})
        formats = parse_pair(labels.replace("W8A8", "FP8 128x128"))
        # Cloned, as bounds are those of the storage.
        matrices = [random_matrix(f, n, k).map(torch.clone) for f, n in zip(formats, (40, 9, 24), strict=False)]
        x = torch.randn(m, k, dtype=torch.bfloat16)
        xs, activations = [x.double()] * len(formats), [None] * len(formats)
        if "W8A8" in labels:
            xs[0], activations[0] = quantize(x, ue8m0=False), "fp8"
            config = dataclasses.replace(config, block_k=2 * config.block_k)
        outs = tuple(torch.full((m, matrix.shape[0]), torch.nan) for matrix in matrices)
        ns, factors, dtypes = zip(*[(out.shape[1], 1.0, out.dtype) for out in outs], strict=True)
        own = tuple(module.Format(str(format)) for format in formats)  # a mutant has an enum of its own
        signature = module.Signature(x.device, x.dtype, k, ns, own, tuple(activations), factors, dtypes)
        module.launch(x, tuple(matrix.operands for matrix in matrices), outs, signature, config)
        exact = [taken @ matrix.dequantize(torch.float64).T for taken, matrix in zip(xs, matrices, strict=True)]
        return relative_error(outs, exact), torch.cat(counters).tolist() if counters else []

    happens_before.install(monkeypatch)
    with sanitize.session(90, cuda_is_cpu=False) as session:
        yield launch
    assert session.launches == 1
    assert session.races_unchecked == 0


LABELS = ("BF16, BF16", "FP8 128x128, BF16", "NVFP4, MXFP8", "FP8 per row, MXFP4, BF16", "W8A8, BF16")
CASES = [(*launch, labels, 200) for launch in LAUNCHES.values() for labels in LABELS]
CASES += [(None, m, "FP8 128x128, BF16", 520) for m in (3, 20, 70)]  # the default config


@pytest.mark.parametrize("order", ["", "reverse", "shuffle:1"])
@pytest.mark.parametrize(("config", "m", "labels", "k"), CASES, ids=str)
def test_kernels(config, m, labels, k, order, run, monkeypatch):
    monkeypatch.setenv("TTSEM_GRID_ORDER", order)
    error, counters = run(original, config, m, labels, k)
    assert error <= 2e-6
    assert bool(counters) == (config.has_workspace if config else m > 3)
    assert not any(counters)


ATOMIC = 'return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")'
PLAIN = "arrived = tl.load(arrived_ptr); tl.store(arrived_ptr, arrived + 1); return arrived"
SPLITS, DECODE, TWO = "split_k splits halves", "gemv split_k looped", "BF16, BF16"
ALL, RAGGED, TILED = f"{DECODE} prefill splits", "split_k prefill", "split_k looped prefill splits halves"

# File, text that occurs in it once, replacement, finding, launches, matrices. Left out are launches where a mask does
# nothing: a gemv program has no extra column, and no tile reaches a block of 128 rows beyond the matrix.
MUTANTS = {
    "unchanged": ("tile.py", '"acq_rel"', '"acq_rel"', "nothing", ALL, "BF16"),
    "no barrier": ("tile.py", "    tl.debug_barrier()\n", "", "race partial_ptr", SPLITS, TWO),
    "relaxed": ("tile.py", '"acq_rel"', '"relaxed"', "race partial_ptr", SPLITS, TWO),
    "no acquire": ("tile.py", '"acq_rel"', '"release"', "race partial_ptr", SPLITS, TWO),
    "no release": ("tile.py", '"acq_rel"', '"acquire"', "race partial_ptr", SPLITS, TWO),
    "scope": ("tile.py", '"gpu"', '"cta"', "race arrived_ptr", SPLITS, TWO),
    "not atomic": ("tile.py", ATOMIC, PLAIN, "race arrived_ptr", SPLITS, TWO),
    "no waiting": ("tile.py", "== SPLIT_K - 1", ">= 0", "race partial_ptr", SPLITS, TWO),
    "first to arrive": ("tile.py", "== SPLIT_K - 1", "== 0", "race partial_ptr", SPLITS, TWO),
    "one slot": ("split_k.py", "partial_ptr + split * SIZE", "partial_ptr", "race partial_ptr", "split_k", TWO),
    "one slot, prefill": ("prefill.py", "+ split * ACC_SIZE", "", "race partial_ptr", "splits halves", TWO),
    "no reset": ("split_k.py", "tl.store(arrived_ptr + tile_id, 0)", "pass", "counters", "split_k", TWO),
    "no reset, prefill": ("prefill.py", "tl.store(arrived_ptr + tile_id, 0)", "pass", "counters", "splits halves", TWO),
    "prefill tile": ("prefill.py", " * tl.num_programs(0) + tl.program_id(0)", "", "race partial_ptr", "halves", TWO),
    "own half twice": ("tile.py", "(1 - split)", "split", "error", "halves", "BF16"),
    "stack": ("gemv.py", "tiles[i + HALF]", "tiles[i]", "error", "gemv", "BF16"),
    "weights, rows": ("tile.py", "(cols < N)[:, None] & (offs_k", "(offs_k", "oob_read matrices.0.0", TILED, "BF16"),
    "weights, K": ("tile.py", " & (offs_k < SIZE)", "", "oob_read matrices.0.0", ALL, "BF16"),
    "groups, rows": ("tile.py", "(cols < N)[:, None] & (gr", "(gr", "oob_read matrices.0.1", RAGGED, "NVFP4"),
    "groups, K": ("tile.py", " & (groups < tl.cdiv(K, GROUP))", "", "oob_read matrices.0.1", f"gemv {RAGGED}", "NVFP4"),
    "blocks, K": ("tile.py", "tl.minimum(start_k, K - 1)", "start_k", "oob_read matrices.0.1", DECODE, "FP8 128x128"),
    "row scales": ("tile.py", "cols, mask=cols < N, other=0.0", "cols", "oob_read matrices.0.2", RAGGED, "FP8 per row"),
    "out, rows": ("tile.py", "(rows < M) & ", "", "oob_write outs.0", ALL, "BF16"),
    "out, columns": ("tile.py", " & (cols < N)", "", "oob_write outs.0", "split_k looped", "BF16"),
    # Extra columns are the first ones of the next row: two values are stored to one address.
    "out, columns, prefill": ("tile.py", " & (cols < N)", "", "poison None", "prefill splits", "BF16"),
    "x, rows": ("split_k.py", "(rows < M)[None, None, :] & ", "", "oob_read x_ptr", "split_k looped", "BF16"),
    "x, K": ("split_k.py", " & (offs_k < K)", "", "oob_read x_ptr", "split_k looped", "BF16"),
    "x, rows, gemv": ("gemv.py", "(row < M)[:, None] & ", "", "oob_read x_ptr", "gemv", "BF16"),
    "x, K, gemv": ("gemv.py", " & (offs_k < K)", "", "oob_read x_ptr", "gemv", "BF16"),
    "x, rows, prefill": ("prefill.py", "(rows < M)[:, None] & ", "", "oob_read x_ptr", "prefill splits", "BF16"),
    "x, K, prefill": ("prefill.py", " & (offs_k < K)[None, :]", "", "oob_read x_ptr", "prefill splits", "BF16"),
    "amax, w8a8": ("tile.py", "tl.max(tl.abs(x)", "tl.max(x", "error", ALL, "W8A8"),
}


@pytest.mark.parametrize(
    ("file", "old", "new", "finding", "launch", "labels"),
    [
        pytest.param(*mutant, launch, labels, id=f"{name}-{launch}")
        for name, (*mutant, launches, labels) in MUTANTS.items()
        for launch in launches.split()
    ],
)
def test_mutants_are_caught(file, old, new, finding, launch, labels, tmp_path, monkeypatch, run):
    """Runs a copy of the kernels with one thing changed in one file."""
    kernels = shutil.copytree(Path(original.__file__).parent, tmp_path / "kernels")
    text = (kernels / file).read_text()
    assert text.count(old) == 1, f"{file} no longer holds this once: {old}"
    (kernels / file).write_text(text.replace(old, new))
    (kernels / "__init__.py").write_text("")  # the real one would define the torch operations a second time
    monkeypatch.syspath_prepend(tmp_path.parent)
    module = importlib.import_module(f"{tmp_path.name}.kernels.launch")
    try:
        error, counters = run(module, *LAUNCHES[launch], labels)
        found = "counters" if any(counters) else "nothing" if error <= 2e-6 else "error"
    except sanitize.KernelFault as stop:
        found = f"{stop.fault.kind} {stop.fault.buffer}"
    assert found == finding
