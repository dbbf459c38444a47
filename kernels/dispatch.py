"""Which kernel runs with which block sizes: a pure function, readable and testable without a GPU.

A table that `indexproj tune` measured on the user's GPU takes precedence; this module reads it.
"""

import functools
import hashlib
import json
import logging
import math
import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from triton import next_power_of_2

from .formats import Format
from .target import INTERPRETED, Target

LOGGER = logging.getLogger("indexproj")
MAX_SPLIT_K = 16


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel, apart from pointers, strides and M. Raises ValueError for sizes that no kernel has.

    Attributes:
        block_m: rows of x per program.
        block_k: columns of K per step and slice, 32, 64 or 128: whole scale groups inside one 128-wide scale block.
        split_k: splits of K, each computed by a program of its own.
        block_n: rows of a matrix per program; 0 for all rows of all matrices (prefill only). gemv: always one.
        num_stages, num_warps: Triton's: loop iterations whose loads overlap, and warps of a program.
        slices: parts of K that the warps of a program multiply side by side (gemv and split_k only).
        loop_splits: one program computes all splits of its tile (split_k only).
        pdl: programmatic dependent launch: waits for the previous kernel as late as possible (gemv and split_k, sm_90
            and newer). Off by default, as nobody has measured it.
    """

    regime: Literal["gemv", "split_k", "prefill"]
    block_m: int
    block_k: int
    split_k: int = 1
    num_stages: int = 1
    num_warps: int = 8
    block_n: int = 16
    slices: int = 1
    loop_splits: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        powers = self.block_m, self.block_n or 1, self.slices, self.num_warps
        sizes = *powers, self.block_k, self.split_k, self.num_stages
        is_looped, is_split = self.loop_splits, self.split_k > 1
        unfit = {"gemv": is_split or is_looped, "split_k": not self.block_n, "prefill": is_looped or self.pdl}
        is_size = {type(n) for n in (*sizes, self.block_n)} == {int} and min(sizes) > 0
        is_size = is_size and not any(n & (n - 1) for n in powers)
        if unfit.get(self.regime, True) or self.block_k not in (32, 64, 128) or not is_size:
            raise ValueError(
                "KernelConfig: expected gemv without splits, split_k, or prefill without loop_splits and pdl; block_k "
                "32, 64 or 128; ints, split_k and num_stages from 1 on, others powers of two (prefill: or block_n 0); "
                f"got {self!r}"
            )

    def __str__(self) -> str:
        block_n = f"x{self.block_n or 'N'}" if self.regime != "gemv" else ""
        split = f", K/{self.split_k}" if self.split_k > 1 else ""
        loop = ", looped" if self.loop_splits else ""
        return f"{self.regime} {self.block_m}{block_n}x{self.slices * self.block_k}{split}{loop}"

    def acc_size(self, *ns: int) -> int:
        """Elements of the accumulators of one program, for matrices with these numbers of rows."""
        return self.block_m * (self.block_n or sum(self.block_ns(*ns)))

    def block_ns(self, *ns: int) -> tuple[int, ...]:
        """Output columns per program, for each matrix; powers of two."""
        return tuple([self.block_n or next_power_of_2(max(n, 16)) for n in ns])

    @property
    def has_workspace(self) -> bool:
        """Whether programs exchange partial sums."""
        return not self.loop_splits and (self.split_k > 1 or self.regime == "split_k")

    def grid(self, m: int, *ns: int) -> tuple[int, int, int]:
        """Programs of a launch with m rows of x: (tiles of the outputs' columns, splits, tiles of rows)."""
        block_n = 1 if self.regime == "gemv" else self.block_n
        tiles_n = sum([cdiv(n, block_n) for n in ns]) if block_n else 1
        return tiles_n, 1 if self.loop_splits else self.split_k, cdiv(m, self.block_m)

    def workspace_size(self, m: int, *ns: int) -> tuple[int, int]:
        """(fp32 partial sums, int32 arrival counters) of a launch with m rows of x."""
        if not self.has_workspace:
            return 0, 0
        programs = math.prod(self.grid(m, *ns))
        return programs * self.acc_size(*ns), programs // self.split_k


# The limits of `choose`, from compiled code (registers, spills, loads) unless a source is given.

# FMA time grows with M; published gemv kernels lose to tensor cores from M = 5 on. Rounding x to e4m3 (W8A8) takes
# registers: 1 row.
GEMV_ROWS = 4
# Above 64 rows, split_k's weights would be read more than twice. Its tile holds 32 next to 16 rows of weights.
SPLIT_K_ROWS, SPLIT_K_TILE = 64, 32
QUANTIZED_GEMV_ROWS, QUANTIZED_SPLIT_K_ROWS = 1, 32
# fp32 accumulators of a prefill program of 8 warps: 96 registers per thread.
ACCUMULATORS = 128 * 192
# Bytes of partial sums that the last program of a tile reads: 1 us at the 105 GB/s of one SM.
REDUCED_BYTES = 100_000
# The share of SMs that saturates L2: one reads 105 KB per us alone and 49 with all others. From there on a larger tile,
# which reads less, beats more programs.
FILLED = 0.45


def choose(
    m: int,
    shape: tuple[int, ...],
    formats: tuple[Format, ...],
    target: Target,
    x_dtype: torch.dtype = torch.bfloat16,
    *,
    quantize_x: bool = False,
    batch_invariant: bool = False,
) -> KernelConfig:
    """The config for m >= 1 rows of x and matrices of these formats and of shape (D, H, K), or with more before K.

    Depends on m only through the next power of two, so a server compiles a dozen kernels, not thousands. Nothing here
    was measured on a GPU for this operation.

    Args:
        formats: of the matrices. The rules do not depend on them so far; a tuned table does.
        quantize_x: a matrix takes x in e4m3 (W8A8).
        batch_invariant: the bits of a row must not depend on m.
    """
    m, (*ns, k) = next_power_of_2(m), shape
    if batch_invariant:
        return replace(_split_k(m, k, target), loop_splits=m > SPLIT_K_ROWS)
    per_sm = 4 if m == 1 and not quantize_x else 2  # programs of gemv that run at the same time
    if m <= (QUANTIZED_GEMV_ROWS if quantize_x else GEMV_ROWS) and sum(ns) <= per_sm * target.sm_count:
        # A step is 16 bytes of x per thread.
        return KernelConfig("gemv", block_m=m, block_k=128, slices=16, num_warps=8 if target.is_cuda() else 4)
    if m <= (QUANTIZED_SPLIT_K_ROWS if quantize_x else SPLIT_K_ROWS):
        config = _split_k(m, k, target)
        # An SM holds two of these programs. Two steps of K per program beat a second wave; three would spill, and so
        # would two with quantize_x.
        for steps in (1,) if quantize_x else (1, 2):
            fewer = replace(config, split_k=cdiv(config.split_k, steps))
            if math.prod(fewer.grid(m, *ns)) <= 2 * target.sm_count:
                return fewer
    return _prefill(m, ns, k, target, x_dtype != torch.bfloat16, quantize_x)


def _split_k(m: int, k: int, target: Target) -> KernelConfig:
    """One step over 512 of K: enough programs to fill a GPU, each of which loads its weights in one go."""
    # 8 rows of x are the narrowest matrix instruction, on AMD 16.
    block_m = min(max(m, 8 if target.is_cuda() else 16), SPLIT_K_TILE)
    splits = min(MAX_SPLIT_K, cdiv(k, 512))
    return KernelConfig("split_k", block_m, block_k=64, split_k=splits, num_stages=2, block_n=16, slices=8)


def _prefill(m: int, ns: list[int], k: int, target: Target, is_fp16: bool, quantize_x: bool) -> KernelConfig:
    """The largest tile that fills the GPU: the larger, the less is read from L2 and decoded."""
    # fp16 is multiplied as fp32, which takes twice the room. x has a scale per 128 of K.
    block_k = 32 if is_fp16 else 64
    num_stages = 3 if target.is_cuda() else 2
    if quantize_x:
        block_k, num_stages = 128, num_stages - 1
    for block_m, block_n in prefill_tiles(ns, target, is_fp16, quantize_x):
        num_warps = 8 if block_m * (block_n or 192) >= 128 * 64 else 4
        config = KernelConfig("prefill", block_m, block_k, 1, num_stages, num_warps, block_n)
        tiles = math.prod(config.grid(m, *ns))
        splits = _fill(tiles, config.acc_size(*ns), cdiv(k, block_k), target)
        if tiles * splits >= FILLED * target.sm_count:
            break
    return replace(config, split_k=splits)


def prefill_tiles(ns: list[int], target: Target, is_fp16: bool, quantize_x: bool) -> list[tuple[int, int]]:
    """(block_m, block_n) from large to small."""
    tiles = [(block_m, 64) for block_m in (128, 64, 32, 16)]
    if sum(cdiv(n, 128) * 128 for n in ns) <= 1.1 * sum(cdiv(n, 64) * 64 for n in ns):
        tiles.insert(0, (128, 128))
    # Without wgmma or tcgen05, each warp decodes its own weights in registers, and all columns would not fit.
    if not isinstance(target.arch, int) or 90 <= target.arch < 120:
        columns = KernelConfig("prefill", 1, 64, block_n=0).acc_size(*ns)
        heights = (64,) if is_fp16 else (128, 64)  # 128 rows would spill
        most = ACCUMULATORS // 2 if quantize_x else ACCUMULATORS  # rounding x takes registers
        tiles = [(block_m, 0) for block_m in heights if block_m * columns <= most] + tiles
    if not quantize_x:
        return tiles
    # 64 rows would spill in fp16.
    return [(block_m, block_n) for block_m, block_n in tiles if block_m <= (32 if is_fp16 else 64)]


def _fill(tiles: int, acc_size: int, steps: int, target: Target) -> int:
    """Splits of K that fill the GPU in one wave, capped so that the last program of a tile reads few partial sums.

    Of two splits it reads one.
    """
    reduced = REDUCED_BYTES // (4 * acc_size)
    fit = max(1, min(MAX_SPLIT_K, target.sm_count // tiles, 2 if reduced == 1 else reduced))
    return cdiv(steps, cdiv(steps, fit))  # fewer where the last splits would be empty


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


TABLE_VARIABLE = "INDEXPROJ_TUNED"  # a file to read instead of the default one; empty for none
TABLE_SCHEMA = 1
OUTS = {"fp32": torch.float32, "bf16": torch.bfloat16}

Case = tuple[int, tuple[int, ...], tuple[Format, ...]]  # M (a power of two), shape, formats


# The fastest config of each measured case, which stands for all M that round up to its M, and the dtypes of the outputs
# for which torch.mm was faster.
TunedTable = dict[Case, tuple[KernelConfig, tuple[tuple[torch.dtype, ...], ...]]]


def out_dtypes(outs: str, count: int) -> tuple[torch.dtype, ...]:
    """dtypes of outputs that are measured; outs is a key of OUTS.

    Of a pair: k in bf16 and gate in that dtype; both in bf16 are one tensor, which vLLM's forward slices. Of more
    matrices: all in that dtype.
    """
    return (torch.bfloat16, OUTS[outs]) if count == 2 else (OUTS[outs],) * count


def read_table(path: Path, gpu: str) -> TunedTable:
    """Reads what benchmarks/tune.py wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, TypeError, AttributeError: it is no table, or one of another GPU or other versions.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    for key, expected in (("schema", TABLE_SCHEMA), ("gpu", gpu), ("versions", versions())):
        if found[key] != expected:
            raise ValueError(f"expected {key} {expected}, found {found[key]}")
    table: TunedTable = {}
    for entry in found["entries"]:
        formats = tuple(map(Format, entry["formats"]))
        is_bf16 = set(formats) == {Format.BF16}  # torch.mm takes no other weights
        torch_for = tuple(out_dtypes(name, len(formats)) for name in entry["torch_for"] if is_bf16)
        table[entry["m"], tuple(entry["shape"]), formats] = KernelConfig(**entry["config"]), torch_for
    return table


@functools.cache
def versions() -> dict[str, str]:
    """What measurements depend on besides the GPU. Kernels count by their text, which changes between versions."""
    names = "tile", "gemv", "split_k", "prefill", "launch"
    text = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    kernels = f"{version('indexproj')}-{hashlib.sha256(text).hexdigest()[:12]}"
    return {"indexproj": kernels, "torch": torch.__version__, "triton": triton.__version__}


def table_path(gpu: str) -> Path:
    """Where the table of a GPU is kept by default."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "indexproj" / f"{'-'.join(gpu.lower().split())}.json"


@functools.cache
def table_of(device: torch.device) -> TunedTable:
    """The table for a device, read once per process; empty without one, with a WARNING if it cannot be used."""
    chosen = os.environ.get(TABLE_VARIABLE)
    if device.type != "cuda" or INTERPRETED or chosen == "":
        return {}
    gpu = torch.cuda.get_device_name(device)
    path: Any = chosen
    try:
        path = Path(chosen) if chosen else table_path(gpu)
        if chosen is None and not path.exists():
            return {}
        table = read_table(path, gpu)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # RuntimeError: no home
        LOGGER.warning("indexproj ignores the tuned table %s: %r; run `indexproj tune` again", path, error)
        return {}
    LOGGER.info("indexproj uses the tuned table %s", path)
    return table
