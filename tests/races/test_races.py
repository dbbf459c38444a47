"""The kernels' IR for sm_90, executed on the CPU: no races, no access out of bounds, and every mutant is caught.

Bounds are those of a tensor's memory. Not covered: what lies below Triton's IR, PDL, and AMD's wait for its stores.
"""

import dataclasses
import importlib
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from indexproj.indexer.cli.synthetic import random_matrix
from indexproj.kernels import TARGETS, Format, KernelConfig
from indexproj.kernels import launch as original
from indexproj.kernels.reference import quantize
from numerics import relative_error

sanitize = pytest.importorskip("ttsem.sanitize", reason="`make test-races` makes the environment that has ttsem")

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
def ttsem(monkeypatch):
    """Launches are run by ttsem, which raises KernelFault at a race or an access out of bounds."""
    from races import happens_before

    happens_before.install(monkeypatch)
    with sanitize.session(90, cuda_is_cpu=False) as session:
        yield
    assert session.launches == 1
    assert session.races_unchecked == 0


@pytest.fixture
def run(ttsem, monkeypatch):
    """Launches matrices of up to 40, 9 and 24 rows; returns the error against fp64 and the counters afterwards.

    "W8A8" is an FP8 matrix that takes x in e4m3, in steps of twice the depth: x has a scale per 128 of K.
    """

    def launch(module, config, m, labels, k=200):
        counters = []

        def workspace(device, partials, count):
            if not count:
                return None, None
            counters.append(torch.zeros(count, dtype=torch.int32))
            return torch.full((partials,), torch.nan), counters[-1]

        monkeypatch.setattr(module, "workspace", workspace)  # the real one returns larger buffers
        monkeypatch.setattr(module, "target_of", lambda device: TARGETS["sm_90"])
        constants = module.constants  # ttsem runs no inline assembly
        monkeypatch.setattr(module, "constants", lambda *a: {k: k != "PACKED" and v for k, v in constants(*a).items()})
        module.plan_of.cache_clear()
        labels = labels.split(", ")
        formats = [Format(label.replace("W8A8", "FP8 128x128")) for label in labels]
        matrices = [random_matrix(f, n, k).map(torch.clone) for f, n in zip(formats, (40, 9, 24), strict=False)]
        x = torch.randn(m, k, dtype=torch.bfloat16)
        xs, activations = [x.double()] * len(labels), [None] * len(labels)
        if labels[0] == "W8A8":
            xs[0], activations[0] = quantize(x, ue8m0=False), "fp8"
            config = dataclasses.replace(config, block_k=2 * config.block_k)
        outs = tuple(torch.full((m, matrix.shape[0]), torch.nan) for matrix in matrices)
        for tensor in (x, *outs, *(tensor for matrix in matrices for tensor in matrix.tensors)):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # bounds are those of the storage
        ns, factors, dtypes = zip(*[(out.shape[1], 1.0, out.dtype) for out in outs], strict=True)
        own = tuple(module.Format(str(format)) for format in formats)  # a mutant has an enum of its own
        signature = module.Signature(x.device, x.dtype, k, ns, own, tuple(activations), factors, dtypes)
        module.launch(x, tuple(matrix.operands for matrix in matrices), outs, signature, config)
        exact = [taken @ matrix.dequantize(torch.float64).T for taken, matrix in zip(xs, matrices, strict=True)]
        return relative_error(outs, exact), torch.cat(counters).tolist() if counters else []

    return launch


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


@pytest.fixture
def mutated(tmp_path, monkeypatch):
    """The launch module of a copy of the kernels with one thing changed in one file."""

    def load(file, old, new):
        folder = tmp_path / "mutant"
        shutil.copytree(Path(original.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} no longer holds this once: {old}"
        (folder / file).write_text(text.replace(old, new))
        # Without the package's own __init__, which would define the torch operations a second time.
        package = types.ModuleType("mutant")
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, "mutant", package)
        return importlib.import_module("mutant.launch")

    yield load
    for name in [name for name in sys.modules if name.startswith("mutant.")]:
        del sys.modules[name]


# Places to change: (file, text that occurs once).
ORDER, BARRIER = ("tile.py", '"acq_rel"'), ("tile.py", "    tl.debug_barrier()\n")
SCOPE, LAST = ("tile.py", '"gpu"'), ("tile.py", "== SPLIT_K - 1")
ATOMIC = ("tile.py", 'return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")')
PLAIN = "arrived = tl.load(arrived_ptr); tl.store(arrived_ptr, arrived + 1); return arrived"
SLOT, PREFILL_SLOT = ("split_k.py", "partial_ptr + split * SIZE +"), ("prefill.py", "partial_ptr + split * ACC_SIZE")
RESET, PREFILL_RESET = ((file, "tl.store(arrived_ptr + tile_id, 0)") for file in ("split_k.py", "prefill.py"))
TILE, OTHER = ("prefill.py", "tile_m * tl.num_programs(0) + tl.program_id(0)"), ("tile.py", "(1 - split)")
WEIGHTS = ("tile.py", "(cols < N)[:, None] & (offs_k < SIZE)")
GROUPS = ("tile.py", "(cols < N)[:, None] & (groups < tl.cdiv(K, GROUP))")
BLOCKS, SCALES = ("tile.py", "tl.minimum(start_k, K - 1)"), ("tile.py", "w[2] + cols, mask=cols < N, other=0.0")
OUT, STACK = ("tile.py", "(rows < M) & (cols < N)"), ("gemv.py", "tiles[i + HALF]")
GEMV_X, X = ("gemv.py", "(row < M)[:, None] & (offs_k < K)"), ("split_k.py", "(rows < M)[None, None, :] & (offs_k < K)")
PREFILL_X = ("prefill.py", "(rows < M)[:, None] & (offs_k < K)[None, :]")
AMAX = ("tile.py", "tl.max(tl.abs(x), AXIS, keep_dims=True)")
SPLITS, ALL, TWO = "split_k splits halves", "gemv split_k looped prefill splits", "BF16, BF16"

# Place, replacement, finding, launches, matrices. Left out are launches where a mask changes nothing: a gemv program
# has no extra column, and no tile reaches a block of 128 rows beyond the matrix.
MUTANTS = {
    "unchanged": (ORDER, '"acq_rel"', "nothing", ALL, "BF16"),
    "no barrier": (BARRIER, "", "race partial_ptr", SPLITS, TWO),
    "relaxed": (ORDER, '"relaxed"', "race partial_ptr", SPLITS, TWO),
    "no acquire": (ORDER, '"release"', "race partial_ptr", SPLITS, TWO),
    "no release": (ORDER, '"acquire"', "race partial_ptr", SPLITS, TWO),
    "scope": (SCOPE, '"cta"', "race arrived_ptr", SPLITS, TWO),
    "not atomic": (ATOMIC, PLAIN, "race arrived_ptr", SPLITS, TWO),
    "no waiting": (LAST, ">= 0", "race partial_ptr", SPLITS, TWO),
    "first to arrive": (LAST, "== 0", "race partial_ptr", SPLITS, TWO),
    "one slot": (SLOT, "partial_ptr +", "race partial_ptr", "split_k", TWO),
    "one slot, prefill": (PREFILL_SLOT, "partial_ptr", "race partial_ptr", "splits halves", TWO),
    "no reset": (RESET, "pass", "counters", "split_k", TWO),
    "no reset, prefill": (PREFILL_RESET, "pass", "counters", "splits halves", TWO),
    "one tile, prefill": (TILE, "tile_m", "race partial_ptr", "halves", TWO),
    "own half twice": (OTHER, "split", "error", "halves", "BF16"),
    "stack": (STACK, "tiles[i]", "error", "gemv", "BF16"),
    "weights, rows": (WEIGHTS, "(offs_k < SIZE)", "oob_read matrices.0.0", ALL[5:] + " halves", "BF16"),
    "weights, K": (WEIGHTS, "(cols < N)[:, None]", "oob_read matrices.0.0", ALL, "BF16"),
    "groups, rows": (GROUPS, "(groups < tl.cdiv(K, GROUP))", "oob_read matrices.0.1", "split_k prefill", "NVFP4"),
    "groups, K": (GROUPS, "(cols < N)[:, None]", "oob_read matrices.0.1", "gemv split_k prefill", "NVFP4"),
    "blocks, K": (BLOCKS, "start_k", "oob_read matrices.0.1", "gemv split_k looped", "FP8 128x128"),
    "scales of rows": (SCALES, "w[2] + cols", "oob_read matrices.0.2", "split_k prefill", "FP8 per row"),
    "out, rows": (OUT, "(cols < N)", "oob_write outs.0", ALL, "BF16"),
    "out, columns": (OUT, "(rows < M)", "oob_write outs.0", "split_k looped", "BF16"),
    # Extra columns are the first ones of the next row: two values are stored to one address.
    "out, columns, prefill": (OUT, "(rows < M)", "poison None", "prefill splits", "BF16"),
    "x, rows": (X, "(offs_k < K)", "oob_read x_ptr", "split_k looped", "BF16"),
    "x, K": (X, "(rows < M)[None, None, :]", "oob_read x_ptr", "split_k looped", "BF16"),
    "x, rows, gemv": (GEMV_X, "(offs_k < K)", "oob_read x_ptr", "gemv", "BF16"),
    "x, K, gemv": (GEMV_X, "(row < M)[:, None]", "oob_read x_ptr", "gemv", "BF16"),
    "x, rows, prefill": (PREFILL_X, "(offs_k < K)[None, :]", "oob_read x_ptr", "prefill splits", "BF16"),
    "x, K, prefill": (PREFILL_X, "(rows < M)[:, None]", "oob_read x_ptr", "prefill splits", "BF16"),
    "amax, w8a8": (AMAX, "tl.max(x, AXIS, keep_dims=True)", "error", ALL, "W8A8"),
}


@pytest.mark.parametrize(
    ("place", "new", "finding", "launch", "labels"),
    [
        pytest.param(*mutant, launch, labels, id=f"{name}-{launch}")
        for name, (*mutant, launches, labels) in MUTANTS.items()
        for launch in launches.split()
    ],
)
def test_mutants_are_caught(place, new, finding, launch, labels, mutated, run):
    module = mutated(*place, new)
    try:
        error, counters = run(module, *LAUNCHES[launch], labels)
        found = "counters" if any(counters) else "nothing" if error <= 2e-6 else "error"
    except sanitize.KernelFault as stop:
        found = f"{stop.fault.kind} {stop.fault.buffer}"
    assert found == finding
