"""The kernels' IR for sm_90, run on the CPU: nothing races, nothing is out of bounds, and faults put in are found.

Bounds are those of a tensor's memory. Not seen here: what lies below Triton's IR, PDL, and AMD's wait for its stores.
"""

import dataclasses
import importlib
import importlib.util
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from indexproj.kernels import TARGETS, KernelConfig
from indexproj.kernels import launch as original
from indexproj.kernels.operation import QUANTIZING
from indexproj.kernels.reference import quantize
from support import MATRICES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ttsem") is None,
    reason="ttsem has an environment of its own; `make test-races` makes it",
)

# Configs, and rows of x that their blocks do not divide; of K = 200 the last split gets nothing.
LAUNCHES = {
    "gemv": (KernelConfig("gemv", block_m=4, block_k=64, slices=8), 6),
    "split_k": (KernelConfig("split_k", block_m=8, block_k=32, slices=2, split_k=3), 11),
    "serial": (KernelConfig("split_k", block_m=8, block_k=32, slices=2, split_k=3, serial=True), 11),
    "tiled": (KernelConfig("tiled", block_m=16, block_k=64), 19),
    "splits": (KernelConfig("tiled", block_m=16, block_k=64, split_k=3), 19),
}


@pytest.fixture
def run(ttsem, monkeypatch):
    """Launches matrices of up to 40, 9 and 24 rows; returns the error against fp64 and the counters afterwards.

    "w8a8" is an FP8 matrix that takes x in e4m3: in steps that are twice as deep, as x has a scale for 128 of K.
    """

    def launch(module, config, m, encodings, k=200):
        counters = []

        def workspace(device, partials, count):
            if not count:
                return None, None
            counters.append(torch.zeros(count, dtype=torch.int32))
            return torch.full((partials,), torch.nan), counters[-1]

        monkeypatch.setattr(module, "workspace", workspace)  # the real one lends more than is asked for
        monkeypatch.setattr(module, "target_of", lambda device: TARGETS["sm_90"])
        monkeypatch.setattr(module, "_ready", {})  # a launch that ttsem takes over leaves nothing ready for the next
        names = encodings.split("-")
        rows = zip([name.replace("w8a8", "fp8") for name in names], (40, 9, 24), strict=False)
        matrices = [MATRICES[name](n, k).map(torch.clone) for name, n in rows]
        operands, kinds = tuple(matrix.operands for matrix in matrices), tuple(matrix.kind for matrix in matrices)
        x = torch.randn(m, k, dtype=torch.bfloat16)
        xs = [x.double()] * len(names)
        if names[0] == "w8a8":
            kinds, xs[0] = (QUANTIZING["fp8"][kinds[0]], *kinds[1:]), quantize(x, ue8m0=False)
            config = dataclasses.replace(config, block_k=2 * config.block_k)
        outs = tuple(torch.full((m, matrix.shape[0]), torch.nan) for matrix in matrices)
        for tensor in (x, *outs, *(tensor for matrix in matrices for tensor in matrix.tensors)):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # the bounds are seen only where memory ends
        ns, factors, dtypes = zip(*[(out.shape[1], 1.0, out.dtype) for out in outs], strict=True)
        module.launch(x, operands, outs, module.Problem(x.device, x.dtype, k, ns, kinds, factors, dtypes), config)
        exact = [taken @ matrix.dequantize(torch.float64).T for taken, matrix in zip(xs, matrices, strict=True)]
        errors = [(out - truth).abs().max() / truth.abs().max() for out, truth in zip(outs, exact, strict=True)]
        return torch.stack(errors).max().item(), torch.cat(counters).tolist() if counters else []

    return launch


@pytest.mark.parametrize("order", ["", "reverse", "shuffle:1"])
@pytest.mark.parametrize("encodings", ["dense-dense", "fp8-dense", "nvfp4-mxfp8", "fp8_row-mxfp4-dense", "w8a8-dense"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels(name, encodings, order, run, monkeypatch):
    monkeypatch.setenv("TTSEM_GRID_ORDER", order)
    config, m = LAUNCHES[name]
    error, counters = run(original, config, m, encodings)
    assert error <= 2e-6
    assert bool(counters) == config.has_workspace
    assert not any(counters)


@pytest.mark.parametrize("order", ["", "reverse", "shuffle:1"])
@pytest.mark.parametrize("m", [3, 20, 70])
def test_what_dispatch_chooses(m, order, run, monkeypatch):
    monkeypatch.setenv("TTSEM_GRID_ORDER", order)
    error, counters = run(original, None, m, "fp8-dense", k=520)
    assert error <= 2e-6
    assert bool(counters) == (m > 3)
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


BARRIER = ("tile.py", "    tl.debug_barrier()\n")
ORDER, SCOPE, LAST = ("tile.py", '"acq_rel"'), ("tile.py", '"gpu"'), ("tile.py", "== SPLIT_K - 1")
ATOMIC = ("tile.py", 'return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")')
PLAIN = "arrived = tl.load(arrived_ptr); tl.store(arrived_ptr, arrived + 1); return arrived"
SLOT, TILED_SLOT = ("split_k.py", "partial_ptr + split * SIZE +"), ("tiled.py", "partials + split * SIZE")
RESET, TILED_RESET = ((file, "tl.store(arrived_ptr + tile, 0)") for file in ("split_k.py", "tiled.py"))
WEIGHTS = ("tile.py", "(cols < N)[:, None] & (offs_k < K)")
PAIRS = ("tile.py", "(cols < N)[:, None] & (pairs < K // 2)")
GROUPS = ("tile.py", "(cols < N)[:, None] & (groups < tl.cdiv(K, GROUP))")
BLOCKS, SCALES = ("tile.py", "tl.minimum(start_k, K - 1)"), ("tile.py", "w[2] + cols, mask=cols < N, other=0.0")
OUT = ("tile.py", "(rows < M)[None, :] & (cols < N)[:, None]")
GEMV_X = ("gemv.py", "(rows < M)[:, None, None] & (offs_k < K)[None, :, :]")
X = ("split_k.py", "(rows < M)[None, None, :] & (offs_k < K)")
TILED_X = ("tiled.py", "(rows < M)[None, :] & (offs_k < K)[:, None]")
AMAX = ("tile.py", "tl.max(tl.abs(x), AXIS, keep_dims=True)")

# What stands somewhere once, what takes its place, what is found then, in which launches, of which matrices. Masks that
# change nothing where they are not needed are left out: a gemv program has no column too many, a tiled one no block of
# K, and no tile reaches a block of 128 rows that holds none of the matrix's.
MUTANTS = {
    "unchanged": (ORDER, '"acq_rel"', "nothing", "gemv split_k serial tiled splits", "dense"),
    "no barrier": (BARRIER, "", "race partial_ptr", "split_k splits", "dense-dense"),
    "relaxed": (ORDER, '"relaxed"', "race partial_ptr", "split_k splits", "dense-dense"),
    "no acquire": (ORDER, '"release"', "race partial_ptr", "split_k splits", "dense-dense"),
    "no release": (ORDER, '"acquire"', "race partial_ptr", "split_k splits", "dense-dense"),
    "scope": (SCOPE, '"cta"', "race arrived_ptr", "split_k splits", "dense-dense"),
    "not atomic": (ATOMIC, PLAIN, "race arrived_ptr", "split_k splits", "dense-dense"),
    "no waiting": (LAST, ">= 0", "race partial_ptr", "split_k splits", "dense-dense"),
    "first to arrive": (LAST, "== 0", "race partial_ptr", "split_k splits", "dense-dense"),
    "one slot": (SLOT, "partial_ptr +", "race partial_ptr", "split_k", "dense-dense"),
    "one slot, tiled": (TILED_SLOT, "partials", "race partial_ptr", "splits", "dense-dense"),
    "no reset": (RESET, "pass", "counters", "split_k", "dense-dense"),
    "no reset, tiled": (TILED_RESET, "pass", "counters", "splits", "dense-dense"),
    "weights, rows": (WEIGHTS, "(offs_k < K)", "oob_read matrices.0.0", "split_k serial tiled splits", "dense"),
    "weights, K": (
        WEIGHTS,
        "(cols < N)[:, None]",
        "oob_read matrices.0.0",
        "gemv split_k serial tiled splits",
        "dense",
    ),
    "pairs, rows": (PAIRS, "(pairs < K // 2)", "oob_read matrices.0.0", "split_k tiled", "mxfp4"),
    "pairs, K": (PAIRS, "(cols < N)[:, None]", "oob_read matrices.0.0", "gemv split_k tiled", "mxfp4"),
    "groups, rows": (GROUPS, "(groups < tl.cdiv(K, GROUP))", "oob_read matrices.0.1", "split_k tiled", "nvfp4"),
    "groups, K": (GROUPS, "(cols < N)[:, None]", "oob_read matrices.0.1", "gemv split_k tiled", "nvfp4"),
    "blocks, K": (BLOCKS, "start_k", "oob_read matrices.0.1", "gemv split_k serial", "fp8"),
    "scales of rows": (SCALES, "w[2] + cols", "oob_read matrices.0.2", "split_k tiled", "fp8_row"),
    "out, rows": (OUT, "(cols < N)[:, None]", "oob_write outs.0", "gemv split_k serial tiled splits", "dense"),
    "out, columns": (OUT, "(rows < M)[None, :]", "oob_write outs.0", "split_k serial", "dense"),
    # Columns that are too many are the first ones of the next row: a store with two values for one place.
    "out, columns, tiled": (OUT, "(rows < M)[None, :]", "poison None", "tiled splits", "dense"),
    "x, rows": (X, "(offs_k < K)", "oob_read x_ptr", "split_k serial", "dense"),
    "x, K": (X, "(rows < M)[None, None, :]", "oob_read x_ptr", "split_k serial", "dense"),
    "x, rows, gemv": (GEMV_X, "(offs_k < K)[None, :, :]", "oob_read x_ptr", "gemv", "dense"),
    "x, K, gemv": (GEMV_X, "(rows < M)[:, None, None]", "oob_read x_ptr", "gemv", "dense"),
    "x, rows, tiled": (TILED_X, "(offs_k < K)[:, None]", "oob_read x_ptr", "tiled splits", "dense"),
    "x, K, tiled": (TILED_X, "(rows < M)[None, :]", "oob_read x_ptr", "tiled splits", "dense"),
    "x, rows, w8a8": (X, "(offs_k < K)", "oob_read x_ptr", "split_k serial", "w8a8"),
    "x, K, w8a8": (X, "(rows < M)[None, None, :]", "oob_read x_ptr", "split_k serial", "w8a8"),
    "x, K, gemv, w8a8": (GEMV_X, "(rows < M)[:, None, None]", "oob_read x_ptr", "gemv", "w8a8"),
    "x, K, tiled, w8a8": (TILED_X, "(rows < M)[None, :]", "oob_read x_ptr", "tiled splits", "w8a8"),
    "amax, w8a8": (AMAX, "tl.max(x, AXIS, keep_dims=True)", "error", "gemv split_k serial tiled splits", "w8a8"),
}


@pytest.mark.parametrize(
    ("place", "new", "finding", "launch", "encodings"),
    [
        pytest.param(*mutant, launch, encodings, id=f"{name}-{launch}")
        for name, (*mutant, launches, encodings) in MUTANTS.items()
        for launch in launches.split()
    ],
)
def test_mutants_are_found(place, new, finding, launch, encodings, mutated, run, ttsem):
    module = mutated(*place, new)
    try:
        error, counters = run(module, *LAUNCHES[launch], encodings)
        found = "counters" if any(counters) else "nothing" if error <= 2e-6 else "error"
    except ttsem.KernelFault as stop:
        found = f"{stop.fault.kind} {stop.fault.buffer}"
    assert found == finding
